"""Work that is called off: before it begins, while it runs and when it is over, and a task that is cancelled itself."""

import asyncio

import pytest

from loraserve.engine.loading.loader import CalledOff, Cancellable


class Work:
    """Waits until it is let go, and notes what became of it."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.ended = ""

    async def do(self) -> str:
        self.ended = "begun"
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.ended = "cleaned up"
            raise
        self.ended = "done"
        return "result"


def test_work_that_nobody_cancels_gives_its_result() -> None:
    async def main() -> None:
        work, all_ = Work(), Cancellable()
        all_.expect("a")
        task = asyncio.create_task(all_.run("a", work.do()))
        work.go.set()
        assert await task == "result"
        all_.cancel("a")

    asyncio.run(main())


def test_it_is_called_off_once_the_work_has_ended() -> None:
    async def main() -> None:
        work, all_ = Work(), Cancellable()
        all_.expect("a")
        task = asyncio.create_task(all_.run("a", work.do()))
        await asyncio.sleep(0)
        all_.cancel("b")
        all_.cancel("a")
        with pytest.raises(CalledOff):
            await task
        assert work.ended == "cleaned up"
        assert task.cancelling() == 0

    asyncio.run(main())


def test_what_is_called_off_before_it_begins_never_does() -> None:
    async def main() -> None:
        work, all_ = Work(), Cancellable()
        all_.expect("a")
        task = asyncio.create_task(all_.run("a", work.do()))
        all_.cancel("a")
        with pytest.raises(CalledOff):
            await task
        assert work.ended == ""

    asyncio.run(main())


def test_a_task_that_is_cancelled_itself_ends_as_that() -> None:
    async def main() -> None:
        work, all_ = Work(), Cancellable()
        all_.expect("a")
        task = asyncio.create_task(all_.run("a", work.do()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.ended == "cleaned up"

    asyncio.run(main())


def test_a_name_is_free_again_once_its_work_is_over() -> None:
    async def main() -> None:
        all_ = Cancellable()
        for _ in range(2):
            work = Work()
            all_.expect("a")
            work.go.set()
            assert await asyncio.create_task(all_.run("a", work.do())) == "result"

    asyncio.run(main())
