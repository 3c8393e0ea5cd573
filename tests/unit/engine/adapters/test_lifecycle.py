"""The states of an adapter in the pool: the table of transitions, its diagram, and the pool that follows it."""

import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraserve.engine.adapters import lifecycle
from loraserve.engine.adapters.lifecycle import (
    COMPLETE_STATES,
    LEAVING_STATES,
    LOADING_STATES,
    TRANSITIONS,
    WANTED_LOADS,
    LifecycleEvent,
    LifecycleState,
    next_state,
)
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.messages import AdapterRef

GRANULE = 16
ADAPTERS = [AdapterRef(name=f"name-{v}", version=v, rank=8, slab_bytes=GRANULE) for v in ("a", "b", "c", "d")]


def test_the_diagram_shows_exactly_the_table() -> None:
    edges = re.findall(r"^\s+(\w+) --> (\w+): ([\w ]+)$", lifecycle.__doc__ or "", re.MULTILINE)
    table = [(before.value, after.value, event.value) for (before, event), after in TRANSITIONS.items()]
    assert sorted(edges) == sorted(table)


def test_every_state_is_reached_and_left() -> None:
    assert {before for before, _ in TRANSITIONS} == set(LifecycleState)
    assert set(TRANSITIONS.values()) == set(LifecycleState)
    assert {event for _, event in TRANSITIONS} == set(LifecycleEvent)


def test_the_groups_of_states_cover_all_states_but_absent() -> None:
    in_pool = LOADING_STATES | COMPLETE_STATES | LEAVING_STATES
    assert in_pool == set(LifecycleState) - {LifecycleState.ABSENT}
    assert WANTED_LOADS < LOADING_STATES
    assert not LOADING_STATES & (COMPLETE_STATES | LEAVING_STATES)


def test_an_event_that_a_state_does_not_allow_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="an adapter that is resident cannot become: load failed"):
        next_state(LifecycleState.RESIDENT, LifecycleEvent.LOAD_FAILED)


class LifecycleMachine(RuleBasedStateMachine):
    """Drives the pool with every event of the table and compares its states with those that the table gives."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AdapterPool(2 * GRANULE, 2, GRANULE)
        self.expected = {adapter.version: LifecycleState.ABSENT for adapter in ADAPTERS}
        self.running = dict.fromkeys(self.expected, 0)
        self.leases: list[tuple[str, int]] = []
        self.now = 0.0
        self.reads = 0

    def follow(self, version: str, event: LifecycleEvent) -> None:
        self.expected[version] = TRANSITIONS[self.expected[version], event]

    def in_state(self, *states: LifecycleState) -> list[str]:
        return sorted(version for version, state in self.expected.items() if state in states)

    def leave(self) -> None:
        removed = {entry.adapter.version for entry in self.pool.remove_leaving()}
        leased = {version for version, _ in self.leases}
        leaving = self.in_state(LifecycleState.DAMAGED, LifecycleState.FAILED)
        assert removed == {v for v in leaving if not self.running[v] and v not in leased}
        for version in removed:
            self.follow(version, LifecycleEvent.RELEASED)

    @precondition(lambda self: self.in_state(LifecycleState.ABSENT))
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.in_state(LifecycleState.ABSENT)))
        self.now += 1.0
        placed = self.pool.place(next(a for a in ADAPTERS if a.version == version), self.now)
        if placed is not None:
            for entry in placed.evicted:
                self.follow(entry.adapter.version, LifecycleEvent.EVICTED)
            self.follow(version, LifecycleEvent.PLACED)

    @precondition(lambda self: self.in_state(*WANTED_LOADS))
    @rule(data=st.data(), same=st.booleans())
    def announce_read(self, data: st.DataObject, same: bool) -> None:
        version = data.draw(st.sampled_from(self.in_state(*WANTED_LOADS)))
        self.reads += 1
        entry = self.pool.get(version)
        assert entry is not None
        number = entry.announced.number if same and entry.announced is not None else self.reads
        entry.announce_read(number, 1)
        assert entry.announced is not None
        assert entry.announced.number == number
        self.follow(version, LifecycleEvent.READ_ANNOUNCED)

    @precondition(lambda self: any(not self.running[v] for v in self.in_state(*WANTED_LOADS)))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([v for v in self.in_state(*WANTED_LOADS) if not self.running[v]]))
        entry = self.pool.apply(version, LifecycleEvent.CANCELLED)
        assert entry.announced is None, "no step may begin with a cancelled read"
        self.follow(version, LifecycleEvent.CANCELLED)

    @precondition(lambda self: self.in_state(*LOADING_STATES))
    @rule(data=st.data(), event=st.sampled_from([LifecycleEvent.LOADED, LifecycleEvent.LOAD_FAILED]))
    def end_load(self, data: st.DataObject, event: LifecycleEvent) -> None:
        version = data.draw(st.sampled_from(self.in_state(*LOADING_STATES)))
        self.pool.apply(version, event)
        self.follow(version, event)
        self.leave()

    @precondition(lambda self: self.in_state(LifecycleState.RESIDENT))
    @rule(data=st.data())
    def find_damage(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.in_state(LifecycleState.RESIDENT)))
        self.pool.apply(version, LifecycleEvent.DAMAGE_FOUND)
        self.follow(version, LifecycleEvent.DAMAGE_FOUND)
        assert version in self.pool.not_lendable, "a damaged adapter gets no new leases"
        self.leave()

    @precondition(lambda self: self.in_state(LifecycleState.RESIDENT, LifecycleState.ARRIVING))
    @rule(data=st.data())
    def start_running(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.in_state(LifecycleState.RESIDENT, LifecycleState.ARRIVING)))
        self.pool.start_running(version, self.now)
        self.running[version] += 1

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def stop_running(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(v for v, count in self.running.items() if count)))
        self.pool.stop_running(version, self.now)
        self.running[version] -= 1
        self.leave()

    @precondition(lambda self: self.in_state(LifecycleState.RESIDENT))
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.in_state(LifecycleState.RESIDENT)))
        self.leases.append((version, self.pool.lease(version).generation))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        self.pool.end_lease(*lease)
        self.leave()

    @rule(version=st.sampled_from(["a", "b", "c", "d"]), event=st.sampled_from(list(LifecycleEvent)))
    def refuse_what_the_table_does_not_list(self, version: str, event: LifecycleEvent) -> None:
        entry = self.pool.get(version)
        if entry is not None and (entry.state, event) not in TRANSITIONS:
            with pytest.raises(ValueError, match="cannot become"):
                self.pool.apply(version, event)

    @invariant()
    def the_pool_is_in_the_expected_states(self) -> None:
        self.pool.validate()
        assert {version: self.pool.state(version) for version in self.expected} == self.expected
        assert self.pool.loading == len(self.in_state(*LOADING_STATES))


TestLifecycle = LifecycleMachine.TestCase
TestLifecycle.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
