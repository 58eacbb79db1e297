"""Where a row comes from: device, versions, commit, and the state of the GPU's clock."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from workbench.results.replay import commit_of_code, versions_of_code

# (bytes/s copied, bf16 FLOP/s) measured on the device; no floor is claimed for any other.
MEASURED_RATES = {"H100": (3.02e12, 711e12)}
# Newer drivers name the bits of throttling "event reasons"; older ones know only the second query.
QUERIES = ("clocks.sm,temperature.gpu,clocks_event_reasons.active", "clocks.sm,temperature.gpu,clocks_throttle_reasons.active")


def rates(device: str) -> tuple[float, float] | None:
    """(bytes/s, FLOP/s) of a device by its name, None where nobody measured them."""
    return next((found for name, found in MEASURED_RATES.items() if name in device), None)


@cache
def cpu_name() -> str:
    """The processor's own name and the number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU ({model}, {os.cpu_count()} cores)"


@cache
def provenance(uses_cuda: bool) -> dict[str, Any]:
    """Versions, driver and commit, as columns of a row."""
    commit, versions = commit_of_code(), versions_of_code()
    cuda = ""
    if uses_cuda:
        import torch

        cuda = torch.version.cuda or ""
    return {
        "torch": versions.get("torch", ""),
        "triton": versions.get("triton", ""),
        "cuda": cuda,
        "driver": (_nvidia_smi("driver_version") or [""])[0] if uses_cuda else "",
        "commit": commit.removesuffix("+changes"),
        "dirty": commit.endswith("+changes"),
    }


def gpu_state() -> dict[str, Any]:
    """SM clock, temperature and throttle bits of the current CUDA device now; empty where nvidia-smi says nothing."""
    for query in QUERIES:
        found = _nvidia_smi(query)
        if found:
            clock, temperature, throttle = found
            return {"sm_clock_mhz": _number(clock), "temperature_c": _number(temperature), "throttle": throttle}
    return {"sm_clock_mhz": None, "temperature_c": None, "throttle": ""}


def stolen_s(file: Path = Path("/proc/stat")) -> float:
    """CPU seconds, of all cores since the start, in which a virtual machine wanted to run and its host ran something else.

    0 on a machine of one's own; NaN where the kernel does not count it. Source: `steal`, the eighth time in /proc/stat (proc_stat(5)).
    """
    try:
        times = file.read_text(encoding="utf-8").splitlines()[0].split()
        return int(times[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return float("nan")


def now() -> str:
    """UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _nvidia_smi(query: str) -> list[str] | None:
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", f"GPU-{uuid.removeprefix('GPU-')}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [part.strip() for part in done.stdout.strip().split(",")]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
