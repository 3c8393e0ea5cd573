"""Running work in threads so that cancellation waits for the thread.

A thread cannot be stopped. If it writes to memory that the caller gives away after a cancellation, the caller must wait
until the thread is done.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(
    threads: ThreadPoolExecutor, function: Callable[[], T], stop: Callable[[], object] = lambda: None
) -> T:
    """Run ``function`` in a thread and return its result.

    If this is cancelled, it ends only when the function is not running any more; a function that has not begun never
    begins. ``stop`` is then called, for functions that check from time to time whether they are still needed.
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
    """Wait until the future is done, ignoring its outcome and cancellations. Return whether this was cancelled."""
    # A deadline may cancel a task that its caller has cancelled already, so there can be several cancellations.
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    if not work.cancelled():
        # Marks the exception as retrieved, so that asyncio does not report it.
        work.exception()
    return cancelled
