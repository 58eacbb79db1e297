#!/usr/bin/env bash
# Make the virtual environment $VENV from the pip lines given as arguments: with uv if it is there, else with venv and pip.
set -euo pipefail
: "${VENV:?the folder of the virtual environment}" "${PYTHON:?the Python to build on}"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "The workbench needs Python 3.11 or newer, got $("$PYTHON" --version 2>&1). Name another: make env BASE_PYTHON=python3.12" >&2
    exit 1
fi

if command -v uv >/dev/null; then
    # uv reads none of pip's settings: pass on the one that says where wheels lie on this machine.
    [ -n "${PIP_FIND_LINKS:-}" ] && export UV_FIND_LINKS="${UV_FIND_LINKS:-$PIP_FIND_LINKS}"
    uv venv --allow-existing --python "$PYTHON" "$VENV"
    uv pip install --python "$VENV/bin/python" "$@"
else
    if ! "$PYTHON" -m venv "$VENV"; then
        echo "Python's venv module is incomplete here. On Debian: apt-get install python3-venv" >&2
        exit 1
    fi
    # Byte code is made when a module is first imported: compiling everything that came along cost 40 s of CPU.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
    "$VENV/bin/python" -m pip check
fi
