"""Leases on a pool that loads, runs and evicts: a reader finds what it was granted until its lease ends."""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.adapters.residency import Residency
from loraserve.engine.lending.leases import Lease, LeaseLimits, LeaseReader, LeaseRefusal, Leases
from loraserve.engine.schedule.events import EvictAdapter, LoadAdapter, SchedulerLimits
from loraserve.messages import AdapterRef
from loraserve.story import Story

UNIT = 4096
POOL_UNITS = 6
ADAPTERS = [
    AdapterRef(name=f"name-{i}", version=f"v{i}", rank=8, slab_bytes=UNIT * units - i)
    for i, units in enumerate((1, 1, 2, 3, 5))
]
LIMITS = LeaseLimits(lasts_s=5.0, longest_s=12.0, most=5, most_a_reader=3)
READERS = ("engine-1", "engine-2", "engine-3")


class Held(msgspec.Struct):
    """A lease as its reader knows it; ``content`` is what was in the extent when it was granted."""

    reader: LeaseReader
    read_id: str
    version: str
    offset_bytes: int
    content: list[str]
    granted_s: float
    deadline_s: float


class LeasesMachine(RuleBasedStateMachine):
    """Models the pool's memory too: a load overwrites its extent at once, and no two loads share one."""

    @initialize(slots=st.integers(2, 5), loaded=st.lists(st.sampled_from(ADAPTERS), max_size=3, unique=True))
    def begin(self, slots: int, loaded: list[AdapterRef]) -> None:
        limits = SchedulerLimits(
            kv_blocks=8, block_tokens=4, pool_bytes=POOL_UNITS * UNIT, max_adapters=slots, max_running=4,
            max_waiting=4, max_step_tokens=16, max_model_tokens=32, eos_token_ids=frozenset(),
        )  # fmt: skip
        self.residency = Residency(limits, Story())
        self.pool = self.residency.pool
        self.leases = Leases("life", self.pool, LIMITS)
        self.memory = [""] * POOL_UNITS
        self.written = 0
        self.waiting: list[AdapterRef] = []
        self.running: list[str] = []
        self.loading: list[str] = []
        self.held: dict[str, Held] = {}
        self.past: dict[str, LeaseReader] = {}
        self.lives = dict.fromkeys(READERS, 0)
        self.epoch = 1
        self.now = 0.0
        for adapter in loaded:
            self.residency.prepare_plan(1, (adapter,))
            self.go_on()
            if self.loading:
                self.end_load(fails=False)
        self.residency.retire_copies(1, ())

    def reader(self, name: str) -> LeaseReader:
        return LeaseReader(name, f"{self.lives[name]}")

    def content(self, version: str) -> list[str]:
        entry = self.pool.get(version)
        assert entry is not None
        first = entry.offset_bytes // UNIT
        return self.memory[first : first + -(-entry.adapter.slab_bytes // UNIT)]

    def go_on(self) -> None:
        idle = not self.waiting and not self.running
        for instruction in self.residency.start_loads(self.waiting, self.now, idle):
            match instruction:
                case EvictAdapter(version=version):
                    assert all(held.version != version for held in self.held.values()), "evicted while it is read"
                case LoadAdapter(adapter, _, offset_bytes):
                    self.written += 1
                    self.loading.append(adapter.version)
                    for unit in range(offset_bytes // UNIT, -(-(offset_bytes + adapter.slab_bytes) // UNIT)):
                        self.memory[unit] = f"{adapter.version}, load {self.written}"

    def prune(self) -> None:
        self.end([lease_id for lease_id, held in self.held.items() if held.deadline_s <= self.now])

    def end(self, lease_ids: list[str]) -> None:
        for lease_id in lease_ids:
            self.past[lease_id] = self.held.pop(lease_id).reader

    def heard(self) -> None:
        """Take the ended leases and start loads, as the engine does."""
        if self.leases.take_ended():
            self.go_on()

    @rule(adapter=st.sampled_from(ADAPTERS))
    def request(self, adapter: AdapterRef) -> None:
        self.waiting.append(adapter)
        self.go_on()

    @rule()
    def begin_requests(self) -> None:
        for adapter in [adapter for adapter in self.waiting if self.residency.is_ready(adapter.version)]:
            self.waiting.remove(adapter)
            self.running.append(adapter.version)
            self.pool.start_running(adapter.version, self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end_request(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.running))
        self.running.remove(version)
        self.pool.stop_running(version, self.now)
        self.go_on()

    @precondition(lambda self: self.loading)
    @rule(fails=st.sampled_from([False, False, True]))
    def end_load(self, fails: bool) -> None:
        version = self.loading.pop(0)
        if fails:
            self.residency.fail_load(version, "it was damaged")
        else:
            self.residency.complete_load(version)
        self.go_on()

    @rule(adapters=st.lists(st.sampled_from(ADAPTERS), max_size=2, unique=True), retires=st.booleans())
    def plan(self, adapters: list[AdapterRef], retires: bool) -> None:
        self.epoch += 1
        self.residency.prepare_plan(self.epoch, tuple(adapters))
        if retires:
            self.residency.retire_copies(self.epoch, tuple(adapter.version for adapter in adapters))
        self.go_on()

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.5]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data(), name=st.sampled_from(READERS), read=st.integers(0, 3), other_size=st.booleans())
    def grant(self, data: st.DataObject, name: str, read: int, other_size: bool) -> None:
        here = [entry.adapter for entry in self.pool.entries() if entry.is_complete]
        adapter = data.draw(st.sampled_from(here * 3 + ADAPTERS))
        reader, read_id = self.reader(name), f"read-{read}"
        size = adapter.slab_bytes + (other_size and read == 0)
        answer = self.leases.grant(reader, read_id, adapter.version, size, self.now)
        self.prune()
        own = {i: held for i, held in self.held.items() if held.reader.name == name}
        self.end([lease_id for lease_id, held in own.items() if held.reader != reader])
        own = {i: held for i, held in own.items() if held.reader == reader}
        again = [i for i, held in own.items() if (held.read_id, held.version) == (read_id, adapter.version)]
        expected = self.refusal(adapter, size, again, len(own))
        if expected:
            assert isinstance(answer, LeaseRefusal)
            assert answer.code == expected
        else:
            assert isinstance(answer, Lease)
            assert [answer.lease_id] == again or answer.lease_id not in self.held | self.past
            self.held.setdefault(answer.lease_id, self.seen(answer))
        self.heard()

    def refusal(self, adapter: AdapterRef, size: int, again: list[str], own: int) -> str:
        entry = self.pool.get(adapter.version)
        if entry is None:
            return "not_found"
        if not entry.is_complete:
            return "loading"
        if size != adapter.slab_bytes:
            return "mismatch"
        if again:
            return ""
        if adapter.version in self.pool.not_lendable:
            return "making_room"
        return "too_many_leases" if own == LIMITS.most_a_reader or len(self.held) == LIMITS.most else ""

    def seen(self, lease: Lease) -> Held:
        content = self.content(lease.version)
        assert len(set(content)) == 1
        assert content[0].startswith(f"{lease.version},"), "granted on what is another adapter's"
        return Held(
            lease.reader, lease.read_id, lease.version, lease.offset_bytes, content, self.now, lease.deadline_s
        )  # fmt: skip

    @precondition(lambda self: self.held or self.past)
    @rule(data=st.data(), name=st.sampled_from(READERS), of_another=st.booleans(), renews=st.booleans())
    def renew_or_release(self, data: st.DataObject, name: str, of_another: bool, renews: bool) -> None:
        lease_id = data.draw(st.sampled_from([*self.held, *self.past]))
        owner = self.held[lease_id].reader if lease_id in self.held else self.past[lease_id]
        reader = self.reader(name) if of_another else owner
        answer = (self.leases.renew if renews else self.leases.release)(reader, lease_id, self.now)
        self.prune()
        held = self.held.get(lease_id)
        if held is not None and reader != owner:
            assert isinstance(answer, LeaseRefusal)
            assert answer.code == "not_yours"
        elif renews and held is None:
            assert isinstance(answer, LeaseRefusal)
            assert answer.code == "expired"
        elif renews and held is not None:
            assert isinstance(answer, Lease)
            assert answer.deadline_s == min(self.now + LIMITS.lasts_s, held.granted_s + LIMITS.longest_s)
            held.deadline_s = answer.deadline_s
        else:
            assert answer is (held is not None)
            self.end([lease_id] if held is not None else [])
        self.heard()

    @rule(name=st.sampled_from(READERS))
    def reader_dies(self, name: str) -> None:
        self.lives[name] += 1

    @rule(name=st.sampled_from(READERS))
    def a_past_life_is_told_of(self, name: str) -> None:
        """Report a reader's death, perhaps long after, when its next process has leases."""
        if self.lives[name]:
            gone = LeaseReader(name, f"{self.lives[name] - 1}")
            self.leases.end_reader(gone, self.now)
            self.end([lease_id for lease_id, held in self.held.items() if held.reader == gone])
            self.heard()

    @rule()
    def expire(self) -> None:
        self.leases.expire(self.now)
        self.prune()
        self.heard()

    @invariant()
    def what_is_leased_stays(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.validate()
        self.leases.validate()
        assert len(self.leases) == len(self.held) == self.pool.leases
        for held in self.held.values():
            assert self.content(held.version) == held.content
            first = held.offset_bytes // UNIT
            assert self.memory[first : first + len(held.content)] == held.content

    def teardown(self) -> None:
        """Let all leases end by their deadlines; then each waiting request gets its room."""
        if not hasattr(self, "pool"):
            return
        self.now += LIMITS.longest_s
        self.expire()
        assert len(self.leases) == self.pool.leases == 0
        turns = 0
        while self.waiting or self.running:
            while self.loading:
                self.end_load(fails=False)
            self.begin_requests()
            for version in self.running:
                self.pool.stop_running(version, self.now)
            self.running.clear()
            self.go_on()
            turns += 1
            assert turns < 500, "a request waits for ever"


TestLeases = LeasesMachine.TestCase
TestLeases.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
