"""The host cache under leases, loads and damage: a reader always reads what was saved."""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.adapter.format import make_uniform_layout
from loraserve.engine.host_cache.cache import CachedSlab, HostCache
from loraserve.engine.lending.leases import Lease, LeaseLimits, LeaseReader, Leases
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape

UNIT = 4096
HEADER = make_uniform_layout(ModelShape(1, 8, 1, 1, 8, 8, 8), "float32", 1)
ADAPTERS = [
    AdapterRef(name=f"name-{i}", version=f"v{i}", rank=8, slab_bytes=UNIT * units - i)
    for i, units in enumerate((1, 1, 1, 2, 2, 3, 5))
]
LIMITS = LeaseLimits(lasts_s=5.0, longest_s=12.0, most=6, most_a_reader=6)
READER = LeaseReader("engine-1", "life")
adapters = st.sampled_from(ADAPTERS)


class Reading(msgspec.Struct):
    """A read under way and the content of its extent when it began."""

    slab: CachedSlab
    content: list[str]


class HostCacheMachine(RuleBasedStateMachine):
    """Models the cache's memory too: only saves write to it."""

    @initialize(units=st.integers(1, 8), here=st.lists(adapters, max_size=4, unique=True))
    def begin(self, units: int, here: list[AdapterRef]) -> None:
        self.pool: set[str] = set()
        self.cache = HostCache(UNIT * units + 100, self.pool.__contains__)
        self.leases = Leases("cache", self.cache, LIMITS)
        self.memory = [""] * units
        self.saves = 0
        self.saving: list[AdapterRef] = []
        self.loads: list[Reading] = []
        self.leased: dict[str, Reading] = {}
        self.now = 0.0
        for adapter in here:
            self.offer(adapter, 1.0)
            if self.saving:
                self.end_save(fails=False, last=True)

    def units(self, adapter: AdapterRef) -> range:
        slab = self.cache.get(adapter.version)
        assert slab is not None
        return range(slab.offset_bytes // UNIT, -(-(slab.offset_bytes + adapter.slab_bytes) // UNIT))

    def reading(self, slab: CachedSlab) -> Reading:
        content = [self.memory[unit] for unit in self.units(slab.adapter)]
        assert len(set(content)) == 1
        assert content[0].startswith(f"{slab.adapter.version},"), "what is to be read is not what was saved"
        return Reading(slab, content)

    def one(self, data: st.DataObject) -> AdapterRef:
        """Draw an adapter, most often one that is cached."""
        here = [slab.adapter for slab in self.cache.entries()]
        return data.draw(st.sampled_from(here * 6 + ADAPTERS))

    @rule(adapter=adapters, uses=st.integers(1, 5))
    def used(self, adapter: AdapterRef, uses: int) -> None:
        for _ in range(uses):
            self.cache.uses.add(adapter.version, self.now)

    @rule(adapter=adapters, reload_s=st.sampled_from([0.1, 1.0, 5.0]))
    def leave_the_pool(self, adapter: AdapterRef, reload_s: float) -> None:
        self.cache.uses.add(adapter.version, self.now)
        self.offer(adapter, reload_s)

    def offer(self, adapter: AdapterRef, reload_s: float) -> None:
        before = {slab.adapter.version: msgspec.structs.replace(slab) for slab in self.cache.entries()}
        self.pool.discard(adapter.version)
        offset = self.cache.offer(adapter, HEADER, reload_s, self.now)
        gone = before.keys() - {slab.adapter.version for slab in self.cache.entries()}
        assert all(before[version].evictable for version in gone), "what is read or saved left"
        if offset is None:
            assert not gone, "a slab was dropped although the new one was not kept"
            return
        lost = sum(self.worth(before[version]) for version in gone)
        came = self.cache.get(adapter.version)
        assert came is not None
        assert lost <= self.worth(came) + 1e-9, "what left was worth more"
        self.saves += 1
        self.saving.append(adapter)
        for unit in self.units(adapter):
            self.memory[unit] = f"{adapter.version}, save {self.saves}"

    def worth(self, slab: CachedSlab) -> float:
        return (
            0.0
            if slab.adapter.version in self.pool
            else self.cache.uses.get(slab.adapter.version, self.now) * slab.reload_s
        )

    @precondition(lambda self: self.saving)
    @rule(fails=st.sampled_from([False, False, False, True]), last=st.booleans())
    def end_save(self, fails: bool, last: bool) -> None:
        version = self.saving.pop(-1 if last else 0).version
        (self.cache.save_failed if fails else self.cache.save_done)(version, self.now)
        assert (version in self.cache.versions) is not fails

    @rule(adapter=adapters)
    def loaded_into_the_pool(self, adapter: AdapterRef) -> None:
        self.pool.add(adapter.version)

    @rule(data=st.data())
    def begin_load(self, data: st.DataObject) -> None:
        adapter = self.one(data)
        slab = self.cache.begin_read(adapter.version)
        assert (slab is not None) is (adapter.version in self.cache.versions)
        if slab is not None:
            self.loads.append(self.reading(slab))

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def end_load(self, data: st.DataObject) -> None:
        load = data.draw(st.sampled_from(self.loads))
        self.loads.remove(load)
        self.cache.end_read(load.slab)

    @rule(data=st.data(), read=st.integers(0, 2))
    def lease(self, data: st.DataObject, read: int) -> None:
        adapter = self.one(data)
        answer = self.leases.grant(READER, f"read-{read}", adapter.version, adapter.slab_bytes, self.now)
        self.expired()
        if isinstance(answer, Lease):
            slab = self.cache.get(adapter.version)
            assert slab is not None
            assert slab.is_readable or answer.lease_id in self.leased
            self.leased.setdefault(answer.lease_id, self.reading(slab))
        else:
            assert adapter.version not in self.cache.versions or len(self.leased) == LIMITS.most

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(list(self.leased)))
        self.leases.release(READER, lease_id, self.now)
        self.leased.pop(lease_id)
        self.expired()

    @rule(data=st.data(), really=st.sampled_from([False, False, True]))
    def damage(self, data: st.DataObject, really: bool) -> None:
        adapter = self.one(data)
        if not really:
            return
        self.cache.damage(adapter.version, self.now)
        assert adapter.version not in self.cache.versions

    @rule(seconds=st.sampled_from([0.5, 4.5, 300.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.leases.expire(self.now)
        self.expired()

    def expired(self) -> None:
        for ended in self.leases.take_ended():
            self.leased.pop(ended.lease.lease_id, None)

    @invariant()
    def what_is_read_stays(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.validate()
        self.leases.validate()
        for reading in [*self.loads, *self.leased.values()]:
            adapter = reading.slab.adapter
            assert self.cache.get(adapter.version) is reading.slab, "it left while it was read"
            assert [self.memory[unit] for unit in self.units(adapter)] == reading.content
        for adapter in self.saving:
            slab = self.cache.get(adapter.version)
            assert slab is not None
            assert not slab.is_complete

    def teardown(self) -> None:
        """End all reads: every slab can leave then."""
        if not hasattr(self, "cache"):
            return
        while self.saving:
            self.end_save(fails=False, last=False)
        for load in self.loads:
            self.cache.end_read(load.slab)
        self.leases.end_reader(READER, self.now)
        self.loads, self.leased = [], {}
        self.what_is_read_stays()
        assert all(slab.evictable for slab in self.cache.entries())


TestHostCache = HostCacheMachine.TestCase
TestHostCache.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
