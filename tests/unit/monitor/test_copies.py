"""Which holders are named to an engine that lacks an adapter."""

from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraserve.messages import EngineCapabilities, EngineLoad
from loraserve.messages.transfer import Abilities
from loraserve.monitor.copies import MAX_HOLDERS, CopyIndex
from loraserve.testing.reports import adapter_ref, engine_seen, resident

ABLE = Abilities(protocol=1, host="h", neighbourhood="n", transports=("shm",), device="cpu")
names = st.sampled_from([f"engine-{n}" for n in range(4)])


def holding(
    engine: str, *adapters: int, incarnation: str = "i1", **changes: Any
) -> tuple[EngineLoad, EngineCapabilities]:
    held = tuple(resident(adapter_ref(n)) for n in adapters)
    seen = engine_seen(engine, incarnation=incarnation, resident=held, **{"abilities": ABLE, **changes})
    return seen.load, seen.capabilities


def names_of(index: CopyIndex, number: int, asked_by: str = "engine-9") -> list[str]:
    return [holder.engine for holder in index.holders(f"v{number}", asked_by)]


def test_holders_are_named_with_their_last_incarnation_and_never_to_themselves() -> None:
    index = CopyIndex()
    index.report(*holding("engine-0", 1, 2))
    index.report(*holding("engine-1", 2))
    index.report(*holding("engine-0", 2, incarnation="i2"))
    assert names_of(index, 1) == []
    assert sorted(names_of(index, 2)) == ["engine-0", "engine-1"]
    assert [h.incarnation for h in index.holders("v2", "engine-1")] == ["i2"]


def test_only_some_of_many_holders_are_named_and_different_ones_to_each_asker() -> None:
    index = CopyIndex()
    for number in range(4 * MAX_HOLDERS):
        index.report(*holding(f"engine-{number}", 1))
    told = [tuple(names_of(index, 1, f"engine-{number}")) for number in range(4 * MAX_HOLDERS)]
    assert {len(each) for each in told} == {MAX_HOLDERS}
    assert len(set(told)) > MAX_HOLDERS


def test_cached_adapters_are_held_too_with_the_abilities_of_the_cache() -> None:
    by_ipc = msgspec.structs.replace(ABLE, transports=("cuda_ipc",), device="cuda")
    index = CopyIndex()
    index.report(*holding("engine-0", 1, 2, abilities=by_ipc, cached=("v2", "v3"), cache_abilities=ABLE))
    found = {number: [holder.abilities for holder in index.holders(f"v{number}", "")] for number in (1, 2, 3)}
    assert found == {1: [by_ipc], 2: [by_ipc], 3: [ABLE]}
    index.report(*holding("engine-0", 1, 2, abilities=by_ipc))
    assert names_of(index, 3) == []


def test_the_cache_is_read_if_the_pool_cannot_be() -> None:
    index = CopyIndex()
    for abilities in (None, msgspec.structs.replace(ABLE, transports=())):
        index.report(*holding("engine-0", 1, abilities=abilities, cached=("v1",), cache_abilities=ABLE))
        assert [holder.abilities for holder in index.holders("v1", "")] == [ABLE]
        index.validate()


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = CopyIndex()
        self.truth: dict[str, set[int]] = {}

    @rule(engine=names, adapters=st.sets(st.integers(0, 5)), able=st.booleans())
    def report(self, engine: str, adapters: set[int], able: bool) -> None:
        self.index.report(*holding(engine, *adapters, abilities=ABLE if able else None))
        self.truth[engine] = adapters if able else set()

    @rule(engine=names)
    def dies(self, engine: str) -> None:
        self.index.drop(engine)
        self.truth[engine] = set()

    @invariant()
    def the_index_matches_the_reports(self) -> None:
        self.index.validate()
        for number in range(6):
            assert set(names_of(self.index, number)) == {e for e, held in self.truth.items() if number in held}


TestIndexMachine = IndexMachine.TestCase
