"""Memory of this machine that a GPU copies to and from by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from loraserve.engine.cuda.pool import DevicePool
from loraserve.engine.pool_memory import PoolMemory

FOR_ALL_CONTEXTS = 1
"""cudaHostRegisterPortable."""


@contextmanager
def page_locked(memory: memoryview, pool: PoolMemory) -> Iterator[None]:
    """While it lasts ``memory`` stays where it is, for copies between it and the pool's GPU. Raises RuntimeError."""
    if not isinstance(pool, DevicePool) or pool.tensor.device.type != "cuda":
        raise RuntimeError("the pool is not a GPU's")
    address = np.frombuffer(memory, np.uint8).ctypes.data
    # On another device a context would be made, of some hundred MB.
    with torch.cuda.device(pool.tensor.device):
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, len(memory), FOR_ALL_CONTEXTS)))
    try:
        yield
    finally:
        with torch.cuda.device(pool.tensor.device):
            torch.cuda.cudart().cudaHostUnregister(address)
