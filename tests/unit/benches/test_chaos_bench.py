"""The requests, checks and counts of scripts/bench chaos."""

import asyncio
import mmap
import os
from random import Random

from chaotic.cluster import Victims
from chaotic.counts import FAULTS, Counts
from chaotic.traffic import Traffic
from chaotic.truth import Case, distinct
from harness.driver import Asked
from harness.peer_memory import DAMAGED_BYTES, flip, held_by, left_of, mapped_by

from loraserve.transfer.shm import SharedMemory

CASE = Case("pirate", (1, 2), (5, 6, 7))


class Engines:
    """A driver whose engines all return ``tokens``, and optionally an ``error``."""

    def __init__(self, tokens: list[int], error: str = "", ends: bool = True) -> None:
        self.said = [(tokens, error)]
        self.ends = ends

    async def ask(self, engine: str, adapter: object, prompt: object, most: int) -> Asked:
        asked = Asked("1", engine, "pirate", most, None)
        tokens, error = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        asked.add(0, tokens, "length" if self.ends and not error else None, 0.0)
        if error:
            asked.fail(error)
        return asked

    async def finished(self, asked: Asked, timeout_s: float) -> bool:
        await asyncio.sleep(0 if self.ends else timeout_s)
        return asked.over.is_set()


def counted(engines: Engines, usable: bool = True, deadline_s: float = 30.0) -> Counts:
    counts = Counts()
    victims = Victims(None, None, {"pirate": None}, counts)  # type: ignore[arg-type, dict-item]
    victims.usable = {"engine-0", "engine-1"} if usable else set()
    traffic = Traffic(engines, victims, [CASE], Random(0), counts, deadline_s)  # type: ignore[arg-type]
    asyncio.run(traffic.serve(CASE))
    assert not traffic.at
    return counts


def test_right_tokens_are_no_fault() -> None:
    counts = counted(Engines([5, 6, 7]))
    assert (counts.requests, counts.tokens, sum(counts.faults().values())) == (1, 3, 0)


def test_wrong_tokens_of_unfinished_requests_are_counted() -> None:
    assert counted(Engines([5, 0, 0])).wrong_tokens == 2
    assert counted(Engines([5, 6])).wrong_tokens == 1
    assert counted(Engines([9], "killed")).wrong_tokens == 1


def test_requests_of_a_killed_engine_are_resubmitted() -> None:
    engines = Engines([5], "killed")
    engines.said.append(([5, 6, 7], ""))
    counts = counted(engines)
    assert (counts.resubmitted, sum(counts.faults().values())) == (1, 0)


def test_a_request_failed_by_a_living_engine_is_a_fault() -> None:
    engines = Engines([], "adapter_unavailable: no source")
    engines.said.append(([5, 6, 7], ""))
    assert counted(engines).failed_requests == 1


def test_requests_that_never_end_are_stuck() -> None:
    assert counted(Engines([5], ends=False), deadline_s=0.05).stuck_requests == 1
    assert counted(Engines([5]), usable=False, deadline_s=0.05).stuck_requests == 1


def test_a_corrupted_copy_is_not_requested_from_its_owner() -> None:
    victims = Victims(None, None, {}, Counts())  # type: ignore[arg-type]
    victims.usable = {"engine-0", "engine-1"}
    victims.poisoned = {("engine-0", "pirate")}
    assert victims.askable("pirate") == ["engine-1"]
    assert victims.askable("json") == ["engine-0", "engine-1"]


def test_prompts_with_equal_outputs_of_two_adapters_are_left_out() -> None:
    same = Case("json", CASE.prompt, CASE.tokens)
    other = Case("french", CASE.prompt, (8,))
    assert distinct([CASE, same, other]) == [other]


def test_every_fault_is_a_count_and_shown() -> None:
    counts = Counts(stuck_requests=3)
    counts.note("one was stuck")
    assert set(FAULTS) <= set(counts.figures())
    assert counts.faults()["stuck_requests"] == 3
    assert "one was stuck" in counts.text()


def test_memory_is_corrupted_at_the_given_offsets_only() -> None:
    # Of a size that no other memory of this process has.
    length = 301 * mmap.PAGESIZE
    memory = SharedMemory(length)
    try:
        memory.view[:] = bytes([5]) * len(memory.view)
        assert flip(os.getpid(), length, [1000])
        damaged = [place for place, byte in enumerate(memory.view) if byte != 5]
        assert damaged == list(range(1000, 1000 + DAMAGED_BYTES))
        assert not flip(os.getpid(), length + mmap.PAGESIZE, [0])
        assert memory.name in held_by(os.getpid()) & mapped_by(os.getpid())
        assert left_of({memory.name, "another"}) == {memory.name}
    finally:
        memory.view.release()
        memory.close()


def test_the_table_says_that_resubmitted_requests_are_not_counted_as_failed() -> None:
    text = Counts(resubmitted=3).text()
    assert "resubmitted: failed with a killed engine and sent again by this bench" in text
    assert Counts(resubmitted=3).faults()["failed_requests"] == 0
