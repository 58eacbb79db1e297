"""Which path every public op took: a test can prove that no reference ran on CUDA.

`calls[(op, path, device type)]` counts calls, path being "reference", "triton", "flash" or "loop" (the naive loop, where it was asked for).
"""

from collections import Counter
from typing import Literal

Path = Literal["reference", "triton", "flash", "loop"]

calls: Counter[tuple[str, str, str]] = Counter()


def count(op: str, path: Path, device_type: str) -> None:
    """Note one call of `op`."""
    calls[(op, path, device_type)] += 1


def references_on(device_type: str) -> dict[str, int]:
    """The ops whose reference ran on that kind of device, with the number of calls. Empty is what a GPU test wants to see."""
    return {op: n for (op, path, device), n in calls.items() if path == "reference" and device == device_type and n}
