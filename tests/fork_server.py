"""New processes without the seconds that importing torch and transformers takes: a server imports them once and forks for every call.

A forked child is a new interpreter in which the preloaded packages have been imported and nothing of this project has.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# A minute is plenty on an idle machine; a busy one is no reason for a red test.
TIMEOUT_S = 300


class ForkServer:
    """A process that has imported `preload` and runs code in forks of itself, one at a time. A context manager."""

    def __init__(self, *preload: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *preload], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=TIMEOUT_S)

    def run(self, code: str, *arguments: object, path: tuple[Path, ...], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `code` with `arguments` as its sys.argv[1:], `path` in front of sys.path and these environment variables added.

        The return code is as subprocess has it: negative for a signal, SIGALRM where it took longer than TIMEOUT_S.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            call = {"code": code, "argv": ["-c", *map(str, arguments)], "path": [str(p) for p in path], "cwd": str(cwd)}
            print(json.dumps(call | {"variables": variables, "output": folder}), file=self._process.stdin, flush=True)
            returncode = int(self._process.stdout.readline())
            stdout, stderr = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([code], returncode, stdout, stderr)


def _serve(preload: list[str]) -> None:
    import gc
    import importlib

    for name in preload:
        importlib.import_module(name)
    # What is here stays: the children need not look through it for garbage (pytest collects ten times at its end).
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(call: dict) -> None:
    """What a child does; it never returns to the server's loop."""
    import signal
    import traceback

    returncode = 1
    try:
        for number, name in enumerate(("stdout", "stderr"), start=1):
            os.dup2(os.open(Path(call["output"]) / name, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.alarm(TIMEOUT_S)
        os.environ.update(call["variables"])
        os.chdir(call["cwd"])
        sys.argv, sys.path[:0] = call["argv"], call["path"]
        exec(compile(call["code"], "<call>", "exec"), {"__name__": "__main__"})
        returncode = 0
    except SystemExit as stop:
        returncode = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(returncode)


if __name__ == "__main__":
    _serve(sys.argv[1:])
