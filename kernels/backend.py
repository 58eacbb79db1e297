"""Where an op runs: Triton for CUDA tensors, plain torch for CPU tensors, Triton's interpreter where a test asks for it.

Triton is installed on Linux only; elsewhere the references still work, so a missing Triton is an error only on the first launch.
"""

import os
from contextlib import nullcontext
from typing import Any, ClassVar

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Missing:
        """Stands for Triton where it is not installed: decorators return their function, anything else is inert."""

        def jit(self, function: Any = None, **options: Any) -> Any:
            return function or (lambda decorated: decorated)

        def __getattr__(self, name: str) -> "_Missing":
            return self

        def __call__(self, *arguments: Any) -> "_Missing":
            return self

    triton = tl = _Missing()  # type: ignore[assignment]

# Triton's decorator without its types: kernels are a dialect, and launches pass plain numbers for its constants.
jit: Any = triton.jit

# Triton reads the variable when a kernel is decorated, so it counts as it was at import.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = [
    "IS_INTERPRETED",
    "Beside",
    "dot",
    "jit",
    "num_processors",
    "overlapped",
    "tl",
    "triton",
    "uses_triton",
    "wait_for_previous",
    "wide_dtype",
]


@jit
def dot(a, b, acc, WIDE: tl.constexpr):  # type: ignore[valid-type]
    """acc + a b with fp32 accumulation; fp32 inputs are multiplied exactly (no TF32). WIDE: the interpreter's bf16 product is wrong."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def wait_for_previous(WAITS: tl.constexpr):  # type: ignore[valid-type]
    """Until the kernel before has finished and its results can be read. With WAITS, every program of a kernel must come here before it
    returns, and before it reads or writes anything that changes within a step: what stands above overlaps with the kernel before.
    """
    if WAITS:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor launches Triton kernels (CUDA and ROCm tensors, or any tensor under TRITON_INTERPRET=1)."""
    return tensor.is_cuda or IS_INTERPRETED


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that references compute in: fp32 for narrower inputs, the input's own otherwise."""
    return torch.promote_types(dtype, torch.float32)


class Beside:
    """`with beside:` is work that a CUDA graph being recorded may run at the same time as what is launched after it, until `join()`.

    Outside of a recording, or where it does not apply, it runs in order.
    """

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device, *, applies: bool = True) -> None:
        self._stream = None
        if applies and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        self._inside = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._inside.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)

    def join(self) -> None:
        """What is launched from now on sees the results."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


_processors: dict[int, int] = {}
_capabilities: dict[int, tuple[int, int]] = {}


def overlapped(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that calls `wait_for_previous`: programmatic dependent launch where the device has it (sm_90 on)."""
    if device.type != "cuda" or torch.version.hip:
        return {"WAITS": False}
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return {"WAITS": True, "launch_pdl": True} if _capabilities[index] >= (9, 0) else {"WAITS": False}


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device, read once. For the CPU an H100's number: the interpreter then runs the grids that a GPU would."""
    if device.type != "cuda":
        return 132
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _processors:
        _processors[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _processors[index]
