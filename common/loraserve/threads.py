"""Runs functions in threads. A cancelled caller waits until its thread has finished.

Python cannot stop a thread. A cancelled caller must not reuse memory while its thread may still write to it.
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

    If this coroutine is cancelled before the function starts, the function never runs. If it is cancelled later, it
    calls ``stop``, which may ask the function to end early, and waits until the function returns.
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
    """Wait until the future is done, whatever its outcome. Return whether the caller was cancelled meanwhile."""
    # Several cancellations can arrive, for example from the caller and from a deadline.
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
