"""An interrupt during the block raises KeyboardInterrupt once, after the block. Other handlers stay as they are."""

import signal
import threading
from collections.abc import Iterator

import pytest

from loraserve.interrupts import INTERRUPTS, hold_back_interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, as in `up`."""
    before = [signal.signal(number, signal.default_int_handler) for number in INTERRUPTS]
    yield
    assert [signal.getsignal(number) for number in INTERRUPTS] == [signal.default_int_handler] * 2
    for number, handler in zip(INTERRUPTS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_it_is_raised_at_the_end(numbers: list[signal.Signals]) -> None:
    done = []

    def work() -> None:
        with hold_back_interrupts():
            for number in numbers:
                signal.raise_signal(number)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]


def test_without_a_signal_nothing_is_raised() -> None:
    before = [signal.getsignal(number) for number in INTERRUPTS]
    with hold_back_interrupts():
        pass
    assert [signal.getsignal(number) for number in INTERRUPTS] == before


def test_it_wins_over_an_import_that_failed() -> None:
    def work() -> None:
        with hold_back_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ImportError("torch")

    with pytest.raises(KeyboardInterrupt) as raised:
        work()
    assert isinstance(raised.value.__context__, ImportError)


def test_an_import_that_fails_by_itself_says_so() -> None:
    with pytest.raises(ImportError, match="torch"), hold_back_interrupts():
        raise ImportError("torch")


def test_other_handlers_are_called_at_once() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    with hold_back_interrupts():
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
    signal.signal(signal.SIGINT, before)


def test_the_block_works_in_other_threads() -> None:
    done = []

    def work() -> None:
        with hold_back_interrupts():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
