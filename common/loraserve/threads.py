"""Work in threads that writes to memory somebody else may get next."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(
    threads: ThreadPoolExecutor, function: Callable[[], T], stop: Callable[[], object] = lambda: None
) -> T:
    """Also where this is cancelled it ends only once no thread is at it, and what has not begun never does.

    Nothing stops a thread, and the memory may be another's as soon as this has ended. ``stop`` is called when this is
    cancelled, for a function that looks now and then whether anybody still wants it.
    """
    job = threads.submit(function)
    work = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        job.cancel()
        stop()
        await wait_finished(work)
        raise


async def wait_finished(work: "asyncio.Future[T]") -> bool:
    """Waits until it is over, whatever happens; what came of it is nobody's any more. Whether this was cancelled."""
    # A deadline may cancel what a caller has cancelled already: each time it is still waited for.
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    if not work.cancelled():
        # Nobody asks for it any more; asyncio would complain.
        work.exception()
    return cancelled
