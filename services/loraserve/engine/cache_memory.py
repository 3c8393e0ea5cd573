"""The host cache's memory: peers can map it, and a GPU copies to and from it directly."""

from contextlib import ExitStack

from loraserve.engine.pool_memory import HostPool, PoolMemory
from loraserve.log import get_logger
from loraserve.transfer.shared_memory import SharedMemory


class CacheMemory:
    """``copied_from`` is the pool that the slabs come from."""

    def __init__(self, length_bytes: int, copied_from: PoolMemory) -> None:
        self._shared = SharedMemory(length_bytes, "lower engine.host_cache_bytes")
        self.pool = HostPool(self._shared.view, self._shared)
        self._copied_from = copied_from
        self._closing = ExitStack()
        self._closing.callback(self._shared.close)
        self._log = get_logger(__name__)

    def page_lock(self) -> None:
        """Where the pool is a GPU's. It takes a while: belongs in a thread. Without it copies are slower, no more."""
        if not self._copied_from.waits:
            return
        # Imported here: machines without a GPU need not have a torch that could.
        from loraserve.engine.cuda.pool import page_locked

        try:
            self._closing.enter_context(page_locked(self._shared.view, self._copied_from))
        except Exception as error:
            self._log.warning("host_cache_not_page_locked", reason=str(error), bytes=len(self.pool))
        else:
            self._log.info("host_cache_page_locked", bytes=len(self.pool))

    def close(self) -> None:
        """No copy may be under way."""
        self._closing.close()
