"""Runs a model runner's steps in threads, so that the event loop stays free while a step computes."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from loraserve.engine.compute.protocol import Runner
from loraserve.engine.schedule.events import StepBatch, StepResult

T = TypeVar("T")


class StepExecutor:
    """One thread submits steps. If the runner accepts steps ahead, another waits for their results meanwhile."""

    def __init__(self) -> None:
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")
        self._wait = ThreadPoolExecutor(max_workers=1, thread_name_prefix="result")

    def call(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._compute, function, *arguments)

    def submit(self, runner: Runner, batch: StepBatch) -> asyncio.Future[StepResult]:
        """Start a step behind the steps submitted before it."""
        if not runner.steps_ahead:
            return self.call(lambda: runner.submit(batch).result())
        submitted = self._compute.submit(runner.submit, batch)
        return asyncio.get_running_loop().run_in_executor(self._wait, lambda: submitted.result().result())

    def close(self) -> None:
        for executor in (self._compute, self._wait):
            executor.shutdown(wait=True, cancel_futures=True)
