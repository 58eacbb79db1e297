#!/usr/bin/env bash
# Make the virtual environment $VENV from the pip lines given as arguments, with uv: the one that is there, or one that pip installs first.
# Where uv cannot (an index that only pip can reach, say), pip does it.
set -euo pipefail
: "${VENV:?the folder of the virtual environment}" "${PYTHON:?the Python to build on}"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "The workbench needs Python 3.11 or newer, got $("$PYTHON" --version 2>&1). Name another: make env BASE_PYTHON=python3.12" >&2
    exit 1
fi

pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
if uv=$(command -v uv); then
    "$uv" venv --quiet --seed --allow-existing --python "$PYTHON" "$VENV" # seeded: `make model` needs pip
else
    if ! "$PYTHON" -m venv "$VENV"; then
        echo "Python's venv module is incomplete here. On Debian: apt-get install python3-venv" >&2
        exit 1
    fi
    "${pip[@]}" install --quiet --no-compile -c constraints.txt uv && uv=$VENV/bin/uv
fi

# uv reads none of pip's settings: pass on those that say where packages come from and which are allowed.
settings=$("${pip[@]}" config list) # the environment's come first
setting() { sed -n "s/^[^=]*[.]$1='\(..*\)'\$/\1/p" <<<"$settings" | head -n 1 | sed 's/\\n/ /g'; }
pass_on() { # pass_on VARIABLE VALUE: unless it is set already
    if [ -n "$2" ] && [ -z "${!1:-}" ]; then export "$1=$2"; fi
}
pass_on UV_FIND_LINKS "$(setting find-links | xargs -n 1 | paste -s -d ,)"
pass_on UV_DEFAULT_INDEX "$(setting index-url)"
pass_on UV_INDEX "$(setting extra-index-url)"
pass_on UV_INDEX_STRATEGY unsafe-best-match # the best version of all indexes, as pip does
pass_on SSL_CERT_FILE "$(setting cert)"
for file in $(setting constraint); do set -- "$@" -c "$file"; done

# Byte code is made when a module is first imported: compiling everything that came along cost 40 s of CPU.
if [ -z "$uv" ] || ! "$uv" pip install --quiet --no-compile-bytecode --python "$VENV/bin/python" "$@"; then
    echo "uv could not install everything; pip does." >&2
    "${pip[@]}" install --quiet --no-compile "$@"
fi
"${pip[@]}" check
