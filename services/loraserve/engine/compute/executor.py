"""Runs a model runner's steps in threads, so that they do not block the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from loraserve.engine.compute.protocol import Runner
from loraserve.engine.schedule.events import StepBatch, StepResult

T = TypeVar("T")


class StepExecutor:
    """Submits steps in one thread. If the runner accepts steps ahead, a second thread waits for their results."""

    def __init__(self) -> None:
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")
        self._wait = ThreadPoolExecutor(max_workers=1, thread_name_prefix="result")

    def call(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._compute, function, *arguments)

    def submit(self, runner: Runner, batch: StepBatch) -> asyncio.Future[StepResult]:
        """Submit a step, which runs after all earlier steps. Returns a future of its result."""
        if not runner.steps_ahead:
            return self.call(lambda: runner.submit(batch).result())
        submitted = self._compute.submit(runner.submit, batch)
        return asyncio.get_running_loop().run_in_executor(self._wait, lambda: submitted.result().result())

    def close(self) -> None:
        for executor in (self._compute, self._wait):
            executor.shutdown(wait=True, cancel_futures=True)
