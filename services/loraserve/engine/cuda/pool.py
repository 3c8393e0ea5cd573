"""The adapter pool in GPU memory, written and read back through page-locked memory, beside the steps."""

import numpy as np
import torch

from loraserve.engine.cuda.errors import device_errors
from loraserve.engine.pool_memory import Bytes, Digest

READ_BYTES = 8 << 20
"""Read back at a time."""


class DevicePool:
    """One flat tensor of the slabs' dtype. Copies run on a stream of their own, so that no step waits for one."""

    waits = True

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(elements, dtype=dtype, device=device)
        self._bytes = self.tensor.view(torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            # The zeros come first: they are written on the stream that is current now.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __len__(self) -> int:
        return self._bytes.numel()

    def write(self, offset_bytes: int, data: Bytes) -> None:
        staged = torch.empty(len(data), dtype=torch.uint8, pin_memory=self._stream is not None)
        np.copyto(staged.numpy(), np.frombuffer(data, np.uint8))
        self._copy(self._bytes[offset_bytes : offset_bytes + len(data)], staged)

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None:
        staged = torch.empty(min(length_bytes, READ_BYTES), dtype=torch.uint8, pin_memory=self._stream is not None)
        for start in range(offset_bytes, offset_bytes + length_bytes, READ_BYTES):
            part = staged[: min(READ_BYTES, offset_bytes + length_bytes - start)]
            self._copy(part, self._bytes[start : start + len(part)])
            digest.update(part.numpy().data)

    def _copy(self, into: torch.Tensor, data: torch.Tensor) -> None:
        if self._stream is None:
            into.copy_(data)
            return
        with device_errors():
            with torch.cuda.stream(self._stream):
                into.copy_(data, non_blocking=True)
            self._stream.synchronize()
