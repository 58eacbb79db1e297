"""A real JupyterLab on 127.0.0.1 with settings of its own, and a connection to the kernel behind its page."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 60
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # Cells out of sight are in the page too, so that it can be asked about all of them.
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@dataclass(frozen=True)
class Lab:
    """A running server: its address, its token, and the folder where its kernels leave their connection files."""

    url: str
    token: str
    runtime: Path

    def page(self, notebook: str) -> str:
        return f"{self.url}/lab/tree/{notebook}?reset&token={self.token}"

    def get(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.url}/api/{path}", headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def evaluate(self, code: str, expression: str, timeout_s: float = 60) -> str:
        """Run `code` in the notebook's own kernel, beside the page, and return the repr of `expression`."""
        from jupyter_client.blocking import BlockingKernelClient

        (session,) = self.get("sessions")
        client = BlockingKernelClient(connection_file=str(self.runtime / f"kernel-{session['kernel']['id']}.json"))
        client.load_connection_file()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=timeout_s)
            reply = client.execute(code, user_expressions={"value": expression}, store_history=False, reply=True, timeout=timeout_s)
        finally:
            client.stop_channels()
        content = reply["content"]
        assert content["status"] == "ok", content
        value = content["user_expressions"]["value"]
        assert value["status"] == "ok", value
        return value["data"]["text/plain"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_settings(folder: Path) -> None:
    for name, settings in SETTINGS.items():
        file = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings), encoding="utf-8")


@contextmanager
def running_lab(root: Path, scratch: Path, python_path: Path) -> Iterator[Lab]:
    """JupyterLab over the folder `root`; ends with the block. Raises RuntimeError with the server's log if it does not start."""
    write_settings(scratch / "settings")
    port, token = free_port(), secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(scratch / "config"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "PYTHONPATH": str(python_path),
    }
    server = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={root}", f"--port={port}"]
    server += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    log = scratch / "jupyter.log"
    with log.open("wb") as out:
        process = subprocess.Popen(server, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=root)
    try:
        lab = Lab(f"http://127.0.0.1:{port}", token, scratch / "runtime")
        wait_until_up(lab, process, log)
        yield lab
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(lab: Lab, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            lab.get("status")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(
        f"JupyterLab must answer within {START_S} s, got exit status {process.poll()}:\n{log.read_text(errors='replace')[-4000:]}"
    )
