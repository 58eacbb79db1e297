"""Where an op runs: Triton for CUDA tensors, plain torch for CPU tensors, Triton's interpreter where a test asks for it.

Triton is installed on Linux only; elsewhere the references still work, so a missing Triton is an error only on the first launch.
"""

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Missing:
        """Stands for Triton where it is not installed: decorators return their function, anything else is inert."""

        def jit(self, function: Any) -> Any:
            return function

        def __getattr__(self, name: str) -> "_Missing":
            return self

    triton = tl = _Missing()  # type: ignore[assignment]

# Triton reads the variable when a kernel is decorated, so it counts as it was at import.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = ["IS_INTERPRETED", "num_processors", "tl", "triton", "uses_triton", "wide_dtype"]


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor launches Triton kernels (CUDA and ROCm tensors, or any tensor under TRITON_INTERPRET=1)."""
    return tensor.is_cuda or IS_INTERPRETED


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that references compute in: fp32 for narrower inputs, the input's own otherwise."""
    return torch.promote_types(dtype, torch.float32)


_processors: dict[int, int] = {}


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device, read once; 1 for the CPU (the interpreter)."""
    if device.type != "cuda":
        return 1
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _processors:
        _processors[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _processors[index]
