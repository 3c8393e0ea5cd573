"""Leases one by one: who gets them, how they end, and how long they keep an adapter in the pool."""

import pytest

from loraserve.engine.adapters.residency import Residency
from loraserve.engine.lending.leases import Lease, LeaseLimits, LeaseReader, LeaseRefusal, Leases
from loraserve.engine.schedule.events import (
    EvictAdapter,
    Instruction,
    LeasesEnded,
    LoadAdapter,
    PlanReady,
    SchedulerLimits,
)
from loraserve.messages import AdapterRef
from loraserve.story import Story

UNIT = 4096
ONE = LeaseReader("engine-1", "first life")
TWO = LeaseReader("engine-2", "first life")
LIMITS = LeaseLimits(lasts_s=5.0, longest_s=12.0, most=5, most_a_reader=3)


def adapter(version: str, units: int = 1) -> AdapterRef:
    return AdapterRef(name=f"name-{version}", version=version, rank=8, slab_bytes=UNIT * units)


A, B, C, D = (adapter(version) for version in "abcd")


class Owner:
    """A pool with the ``loaded`` adapters, and its leases."""

    def __init__(self, *loaded: AdapterRef, units: int = 2, max_loads: int = 2) -> None:
        limits = SchedulerLimits(
            kv_blocks=8, block_tokens=4, pool_bytes=units * UNIT, max_adapters=8, max_running=4, max_waiting=4,
            max_step_tokens=16, max_model_tokens=32, eos_token_ids=frozenset(), max_loads=max_loads,
        )  # fmt: skip
        self.residency = Residency(limits, Story())
        self.pool = self.residency.pool
        self.leases = Leases("owner", self.pool, LIMITS)
        for at_s, each in enumerate(loaded):
            self.load(each, now=at_s - 100.0)

    def load(self, wanted: AdapterRef, now: float) -> None:
        self.residency.start_loads([wanted], now, idle=True)
        self.residency.complete_load(wanted.version)

    def lease(self, wanted: AdapterRef, reader: LeaseReader = ONE, read_id: str = "read", now: float = 0.0) -> Lease:
        lease = self.ask(wanted, reader, read_id, now)
        assert isinstance(lease, Lease), lease
        return lease

    def ask(
        self, wanted: AdapterRef, reader: LeaseReader = ONE, read_id: str = "x", now: float = 0.0
    ) -> Lease | LeaseRefusal:
        answer = self.leases.grant(reader, read_id, wanted.version, wanted.slab_bytes, now)
        self.leases.validate()
        return answer

    def code(self, wanted: AdapterRef, reader: LeaseReader = ONE, read_id: str = "x", now: float = 0.0) -> str:
        return code(self.ask(wanted, reader, read_id, now))

    def waits(self, *wanted: AdapterRef, idle: bool = False) -> tuple[list[str], list[str]]:
        """Return what is evicted and what is loaded when requests for these wait."""
        return moves(self.residency.start_loads(wanted, 0.0, idle))


def code(answer: object) -> str:
    assert isinstance(answer, LeaseRefusal), answer
    return answer.code


def moves(instructions: list[Instruction]) -> tuple[list[str], list[str]]:
    gone = [i.version for i in instructions if isinstance(i, EvictAdapter)]
    return gone, [i.adapter.version for i in instructions if isinstance(i, LoadAdapter)]


def test_a_lease_names_offset_and_deadline() -> None:
    owner = Owner(A, B)
    lease = owner.lease(B, now=3.0)
    assert (lease.version, lease.offset_bytes, lease.deadline_s) == ("b", UNIT, 8.0)
    assert owner.leases.story.lines(lease.lease_id) == ["3.000 leased to engine-1 at 4096"]


def test_each_reason_to_refuse_a_lease_has_its_code() -> None:
    owner = Owner(A, units=3)
    owner.waits(B)
    assert owner.code(adapter("strange")) == "not_found"
    assert owner.code(B) == "loading"
    assert owner.code(adapter("a", units=2)) == "mismatch"


def test_leases_are_bounded_per_reader_and_in_all() -> None:
    owner = Owner(A)
    for number in range(LIMITS.most_a_reader):
        owner.lease(A, ONE, f"read-{number}")
    assert owner.code(A, ONE) == "too_many_leases"
    for number in range(LIMITS.most - LIMITS.most_a_reader):
        owner.lease(A, TWO, f"read-{number}")
    assert owner.code(A, LeaseReader("engine-3", "")) == "too_many_leases"
    owner.lease(A, ONE, "once the others have expired", now=LIMITS.lasts_s)


def test_a_read_that_asks_again_gets_the_same_lease() -> None:
    owner = Owner(A, B)
    lease = owner.lease(A, read_id="read")
    again = owner.lease(A, read_id="read", now=4.0)
    assert (again.lease_id, again.deadline_s, len(owner.leases)) == (lease.lease_id, 5.0, 1)
    assert owner.lease(A, TWO, read_id="read").lease_id != lease.lease_id
    assert owner.lease(B, read_id="read").lease_id != lease.lease_id
    assert owner.lease(A, read_id="read", now=5.0).lease_id != lease.lease_id, "that one has expired"


def test_renewals_extend_the_deadline_up_to_a_limit() -> None:
    owner = Owner(A)
    lease_id = owner.lease(A).lease_id
    deadlines = []
    for now in (4.0, 8.0, 11.0, 11.9):
        renewed = owner.leases.renew(ONE, lease_id, now)
        assert isinstance(renewed, Lease)
        deadlines.append(renewed.deadline_s)
    assert deadlines == [9.0, 12.0, 12.0, 12.0]
    assert code(owner.leases.renew(ONE, lease_id, 12.0)) == "expired"
    assert [(ended.lease.lease_id, ended.reason) for ended in owner.leases.take_ended()] == [(lease_id, "expired")]


def test_a_release_may_come_twice_and_says_whether_the_lease_was_held() -> None:
    owner = Owner(A)
    lease_id, late_id = owner.lease(A).lease_id, owner.lease(A, read_id="late").lease_id
    assert owner.leases.release(ONE, lease_id, 1.0) is True
    assert owner.leases.release(ONE, lease_id, 1.0) is False
    assert owner.leases.release(ONE, late_id, 5.0) is False, "its time was over"
    assert owner.leases.release(ONE, "made up", 1.0) is False
    assert owner.pool.leases == 0


@pytest.mark.parametrize("other", [TWO, LeaseReader(ONE.name, "another life")])
def test_a_reader_cannot_end_or_renew_the_lease_of_another(other: LeaseReader) -> None:
    owner = Owner(A)
    lease_id = owner.lease(A).lease_id
    assert code(owner.leases.release(other, lease_id, 1.0)) == "not_yours"
    assert code(owner.leases.renew(other, lease_id, 1.0)) == "not_yours"
    assert owner.leases.release(ONE, lease_id, 1.0) is True


def test_all_leases_of_a_reader_end_with_it_and_those_of_others_do_not() -> None:
    owner = Owner(A, B)
    for each in (A, B):
        owner.lease(each, ONE)
    kept = owner.lease(A, TWO)
    owner.leases.end_reader(ONE, 1.0)
    assert [(ended.lease.version, ended.reason) for ended in owner.leases.take_ended()] == [
        ("a", "reader_gone"), ("b", "reader_gone")
    ]  # fmt: skip
    assert owner.leases.release(TWO, kept.lease_id, 1.0) is True


def test_leases_of_a_reader_s_earlier_process_end() -> None:
    owner = Owner(A, B)
    before = owner.lease(A, ONE)
    owner.lease(B, LeaseReader(ONE.name, "second life"))
    assert code(owner.leases.renew(ONE, before.lease_id, 1.0)) == "expired"
    assert len(owner.leases) == 1


def test_a_lease_does_not_hold_for_a_slab_that_was_loaded_again() -> None:
    owner = Owner(A, units=1)
    before = owner.lease(A)
    owner.leases.release(ONE, before.lease_id, 1.0)
    owner.load(B, 2.0)
    owner.load(A, 3.0)
    after = owner.lease(A, now=4.0)
    assert (after.offset_bytes, after.version) == (before.offset_bytes, before.version)
    assert after.generation > before.generation
    assert after.lease_id != before.lease_id
    assert code(owner.leases.renew(ONE, before.lease_id, 4.0)) == "expired"
    assert owner.leases.release(ONE, before.lease_id, 4.0) is False
    assert owner.leases.release(ONE, after.lease_id, 4.0) is True


def test_a_leased_adapter_is_not_chosen_as_victim() -> None:
    owner = Owner(A, B)
    owner.lease(A)
    assert owner.waits(C) == (["b"], ["c"]), "a is unused for longer, but read"


def test_if_all_adapters_are_leased_a_request_waits_until_a_lease_ends() -> None:
    owner = Owner(A, B)
    leases = [owner.lease(each) for each in (A, B)]
    assert (owner.pool.eviction.free_bytes, owner.pool.eviction.room_bytes) == (0, 0)
    assert owner.waits(C) == ([], [])
    owner.leases.release(ONE, leases[1].lease_id, 1.0)
    assert (owner.pool.eviction.free_bytes, owner.pool.eviction.room_bytes) == (UNIT, UNIT)
    assert owner.residency.handle(LeasesEnded(), 0.0) == []
    assert owner.waits(C) == (["b"], ["c"])


def test_readers_that_take_turns_cannot_starve_a_request() -> None:
    owner = Owner(A, units=1)
    lease = owner.lease(A)
    assert owner.waits(B) == ([], [])
    assert owner.code(A, TWO) == "making_room"
    assert isinstance(owner.leases.renew(ONE, lease.lease_id, 1.0), Lease), "who reads already may end that"
    assert owner.lease(A).lease_id == lease.lease_id
    owner.leases.release(ONE, lease.lease_id, 2.0)
    assert owner.waits(B) == (["a"], ["b"])


def test_an_adapter_is_lent_again_once_no_request_waits_for_its_room() -> None:
    owner = Owner(A, units=1)
    owner.lease(A)
    owner.waits(B)
    owner.waits()
    owner.lease(A, TWO)


def test_only_adapters_that_leases_alone_keep_are_withheld_from_readers() -> None:
    owner = Owner(A, B)
    owner.lease(A)
    owner.pool.start_running("b", 0.0)
    owner.waits(adapter("double", units=2))
    owner.lease(A, TWO)


def test_leases_to_end_stay_closed_while_other_loads_run() -> None:
    owner = Owner(adapter("a", units=2), units=3, max_loads=1)
    owner.lease(adapter("a", units=2))
    assert owner.waits(adapter("double", units=2), C, D) == ([], ["c"])
    assert owner.code(adapter("a", units=2), TWO) == "making_room"


def test_a_plan_waits_for_a_lease_to_end_though_no_request_is_left() -> None:
    owner = Owner(A, units=1)
    lease = owner.lease(A)
    owner.residency.prepare_plan(1, (B,))
    assert owner.residency.start_loads([], 0.0, idle=True) == []
    assert owner.code(A, TWO) == "making_room"
    owner.leases.release(ONE, lease.lease_id, 1.0)
    assert owner.waits(idle=True) == (["a"], ["b"])
    assert owner.residency.complete_load("b") == [PlanReady(1, {})]


def test_blockers_may_be_leased_as_leases_end_by_themselves() -> None:
    owner = Owner(A, B)
    owner.lease(A)
    owner.pool.start_running("b", 0.0)
    assert owner.residency.find_blockers(C, 1) == {"a"}
