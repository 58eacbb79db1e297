"""Everything that changes from step to step, in one copy to the device."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; kernels load vectors


class Staging:
    """Named arrays in one host buffer (pinned where there is CUDA) and their twins in one device buffer.

    Write into `host`, call `upload`, read `device`. The host arrays may be written again once the device has taken the copy: whoever
    waits for a result of the step has waited for that too.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        """`fields` gives shape and dtype (int32 or int64) of each array."""
        sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in fields.items()}
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype) in fields.items():
            here = slice(starts[name], starts[name] + sizes[name])
            self.host[name] = self._host[here].view(dtype).view(shape).numpy()
            self.device[name] = self._device[here].view(dtype).view(shape)

    def upload(self) -> None:
        """Copy the whole host buffer; asynchronous on CUDA."""
        self._device.copy_(self._host, non_blocking=True)
