"""A cancelled wait for a thread ends only when the thread has finished."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from loraserve.threads import run_in_thread


async def begun(event: Event) -> None:
    while not event.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_a_second_cancel_does_not_leave_the_thread_behind() -> None:
    running, release, over = Event(), Event(), Event()

    def work() -> None:
        running.set()
        release.wait()
        over.set()

    async def main() -> None:
        with ThreadPoolExecutor(1) as threads:
            task = asyncio.create_task(run_in_thread(threads, work))
            await begun(running)
            for _ in range(2):
                task.cancel()
                await asyncio.wait([task], timeout=0.05)
            left_behind = task.done()
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not left_behind
            assert over.is_set()

    asyncio.run(main())


def test_cancellation_calls_stop() -> None:
    running, stop = Event(), Event()

    def work() -> None:
        running.set()
        stop.wait()
        raise ValueError("no caller receives this error")

    async def main() -> None:
        with ThreadPoolExecutor(1) as threads:
            task = asyncio.create_task(run_in_thread(threads, work, stop.set))
            await begun(running)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert stop.is_set()

    asyncio.run(main())


def test_a_cancelled_function_that_has_not_started_never_runs() -> None:
    running, release, ran = Event(), Event(), Event()

    async def main() -> None:
        with ThreadPoolExecutor(1) as threads:
            first = asyncio.create_task(run_in_thread(threads, lambda: (running.set(), release.wait())))
            await begun(running)
            second = asyncio.create_task(run_in_thread(threads, ran.set))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            release.set()
            await first
        assert not ran.is_set()

    asyncio.run(main())
