"""The scheduler compared with a model of its contract.

Whatever happens, each request gets the tokens of its solo run, nothing leaks, and all requests end.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.adapters.lifecycle import LEAVING_STATES, LifecycleState, PoolEntry
from loraserve.engine.schedule.blocks import chain_digest, root_digest
from loraserve.engine.schedule.events import (
    CANCELLED,
    PENDING_TOKEN,
    AdapterArriving,
    AdapterDamaged,
    AdapterExpected,
    AdapterLoaded,
    AdapterLoadFailed,
    CancelLoad,
    CopiesRequested,
    CopiesRetired,
    Emit,
    Event,
    EvictAdapter,
    LoadAdapter,
    PlanReady,
    Reject,
    RequestAborted,
    RequestArrived,
    RunStep,
    Sampled,
    SchedulerLimits,
    SequenceStep,
    StepBatch,
    StepDone,
    StepFailed,
    StepResult,
)
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.messages import AdapterRef, Admit, SamplingParams

BLOCK = 4
EOS = 0
VOCAB = 13
SIZES = (1, 1, 2, 3)
PROMPTS = st.one_of(
    st.builds(lambda token, length: [token] * length, st.integers(1, 2), st.integers(1, 18)),
    st.lists(st.integers(1, 2), min_size=1, max_size=18),
)
"""Prompts with common prefixes, so that requests share blocks."""
ADAPTERS = [AdapterRef(name=f"a{i}", version=f"v{i}", rank=8, slab_bytes=4096 * n) for i, n in enumerate(SIZES)]


def next_token(version: str, history: list[int]) -> int:
    """Return the fake model's token: a function of the adapter and all preceding tokens."""
    digest = blake2b(f"{version}{history}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") % VOCAB


def version_of(admit: Admit) -> str:
    return admit.adapter.version if admit.adapter else ""


def most_tokens(admit: Admit, limit: int) -> int:
    return min(admit.sampling.max_tokens, limit - len(admit.prompt_tokens))


def solo(admit: Admit, limit: int) -> tuple[list[int], str]:
    """Return the output and the finish reason of the request when it runs alone."""
    history = list(admit.prompt_tokens)
    output: list[int] = []
    while True:
        token = next_token(version_of(admit), history)
        if token == EOS and not admit.sampling.ignore_eos and len(output) >= admit.sampling.min_tokens:
            return [*output, token], "stop"
        history.append(token)
        output.append(token)
        if len(output) >= most_tokens(admit, limit):
            return output, "length"


class Device:
    """A fake device: computes steps in order from their content, its KV and the tokens that it sampled itself.

    ``tokens`` is what each request is given to read, whether or not it stops before: the KV at a position is that of
    all tokens up to there under the request's adapter, or None where a failed step left it.
    """

    def __init__(self) -> None:
        self.admits: dict[str, Admit] = {}
        self.resident: dict[int, str] = {}
        self._tokens: dict[str, list[int]] = {}
        self.kv: dict[tuple[int, int], tuple[str, tuple[int, ...]] | None] = {}
        self._drawn: dict[str, int] = {}
        self._spoilt: set[str] = set()

    def compute(self, batch: StepBatch, discarded: Collection[str] = ()) -> dict[str, int]:
        """Return the sampled tokens by request. The results of the ``discarded`` requests are not valid."""
        drawn = {part.request_id: self._part(part, part.request_id in discarded) for part in batch.sequences}
        self._drawn = {part.request_id: drawn[part.request_id] for part in batch.sequences if part.sample}
        return self._drawn

    def fail(self, batch: StepBatch) -> None:
        self._spoilt |= {part.request_id for part in batch.sequences}
        self.compute(batch)

    def damage(self, version: str, steps: Iterable[StepBatch]) -> None:
        """Invalidate everything that was or is being computed with this adapter."""
        self.kv = {place: None if was and was[0] == version else was for place, was in self.kv.items()}
        parts = [part for batch in steps for part in batch.sequences]
        self._spoilt |= {p.request_id for p in parts if version_of(self.admits[p.request_id]) == version}

    def _part(self, part: SequenceStep, discarded: bool) -> int:
        admit = self.admits[part.request_id]
        end = part.start + len(part.tokens)
        places = [(part.blocks[position // BLOCK], position % BLOCK) for position in range(end)]
        if discarded or part.request_id in self._spoilt:
            self.kv.update(dict.fromkeys(places[part.start :]))
            return 1
        version = version_of(admit)
        assert self.resident.get(part.slot, "") == version, "the slot holds another adapter"
        tokens = self._stream(admit, end + 1)
        fed = [self._drawn[part.request_id] if token == PENDING_TOKEN else token for token in part.tokens]
        assert fed == tokens[part.start : end], "the step computes a wrong token"
        for position, place in enumerate(places):
            content = (version, tuple(tokens[: position + 1]))
            assert position >= part.start or self.kv.get(place) == content, f"stale KV at {position}"
            self.kv[place] = content
        if part.sample and part.sampling.changes_logits(part.output_index):
            assert part.history == tokens[:end], "penalties need the whole history"
        return tokens[end]

    def _stream(self, admit: Admit, length: int) -> list[int]:
        tokens = self._tokens.setdefault(admit.request_id, list(admit.prompt_tokens))
        while len(tokens) < length:
            tokens.append(next_token(version_of(admit), tokens))
        return tokens


class SchedulerMachine(RuleBasedStateMachine):
    steps_ahead = 0

    @initialize(
        blocks=st.integers(6, 20),
        budget=st.integers(4, 16),
        prefix_cache=st.booleans(),
        pool=st.integers(4, 9),
        slots=st.integers(1, 4),
    )
    def begin(self, blocks: int, budget: int, prefix_cache: bool, pool: int, slots: int) -> None:
        self.scheduler = Scheduler(
            SchedulerLimits(
                kv_blocks=blocks,
                block_tokens=BLOCK,
                pool_bytes=4096 * pool,
                max_adapters=slots,
                max_running=4,
                max_waiting=6,
                max_step_tokens=budget,
                max_model_tokens=24,
                eos_token_ids=frozenset([EOS]),
                prefix_cache=prefix_cache,
                steps_ahead=self.steps_ahead,
            )
        )
        self.now = 0.0
        self.device = Device()
        self.live: set[str] = set()
        self.output: dict[str, list[int]] = {}
        self.steps: deque[StepBatch] = deque()
        self.loads: list[LoadAdapter] = []
        self.cancelled: set[str] = set()
        """Loads under way that were cancelled."""
        self.reads: dict[str, int] = {}
        """The announced read of each version that is loading."""
        self.reads_told = 0
        self.verified: dict[str, int] = {}
        """The verified read of each version; 0 if none was announced."""
        self.began_with: dict[str, int] = {}
        """The read that each early start in flight depends on."""
        self.count = 0
        self.plan_epoch = 0
        self.plans_open = 0

    def tell(self, event: Event) -> None:
        self.now += 1.0
        for instruction in self.scheduler.handle(event, self.now):
            match instruction:
                case RunStep(batch):
                    self.sent(batch)
                case LoadAdapter(slot=slot):
                    assert slot not in self.device.resident, "a slot is filled twice"
                    self.loads.append(instruction)
                case CancelLoad(version):
                    assert version not in self.cancelled, "a load is cancelled twice"
                    assert version in {load.adapter.version for load in self.loads}
                    self.cancelled.add(version)
                case EvictAdapter(version=version, slot=slot):
                    assert self.device.resident.pop(slot, version) == version
                case Emit(_, delta):
                    self.emitted(delta.request_id, delta.index, delta.tokens, delta.finish)
                case Reject(request_id):
                    self.live.remove(request_id)
                case PlanReady():
                    self.plans_open -= 1

    def sent(self, batch: StepBatch) -> None:
        assert len(self.steps) <= self.steps_ahead, "more steps in flight than allowed"
        assert sum(len(part.tokens) for part in batch.sequences) <= self.scheduler.limits.max_step_tokens
        assert len({part.request_id for part in batch.sequences}) == len(batch.sequences) > 0
        for part in batch.sequences:
            assert part.request_id in self.live, "a step contains a request that ended"
            self.sent_part(part)
            if part.slot >= 0 and part.slot not in self.device.resident:
                self.began_with[part.request_id] = self.reads[version_of(self.device.admits[part.request_id])]
        self.steps.append(batch)

    def sent_part(self, part: SequenceStep) -> None:
        """Check that a part continues where its request's last step in flight ends, which must be the newest step."""
        admit = self.device.admits[part.request_id]
        own = [other for batch in self.steps for other in batch.sequences if other.request_id == part.request_id]
        if own:
            assert own[-1] in self.steps[-1].sequences, "the part continues from an older step"
            assert part.start == own[-1].start + len(own[-1].tokens)
        draws = bool(own) and own[-1].sample
        assert part.tokens == (PENDING_TOKEN,) if draws else PENDING_TOKEN not in part.tokens
        index = len(self.output[part.request_id]) + sum(other.sample for other in own)
        assert part.sample == (part.start + len(part.tokens) == len(admit.prompt_tokens) + index)
        assert part.output_index == index < most_tokens(admit, self.scheduler.max_model_tokens)
        assert not (draws and part.sampling.changes_logits(index)), "the history that it needs is not known"

    def emitted(self, request_id: str, index: int, tokens: tuple[int, ...], finish: str | None) -> None:
        assert request_id in self.live, "a token of a request that ended"
        assert index == len(self.output[request_id]), "a token is missing or repeated"
        self.output[request_id].extend(tokens)
        expected, reason = solo(self.device.admits[request_id], self.scheduler.max_model_tokens)
        assert self.output[request_id] == expected[: len(self.output[request_id])]
        if finish is not None:
            assert (self.output[request_id], finish) == (expected, reason)
            self.live.remove(request_id)

    @rule(
        prompt=PROMPTS,
        adapter=st.sampled_from([None, *ADAPTERS]),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
        min_tokens=st.sampled_from([0, 0, 3]),
        penalty=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    )
    def arrive(
        self,
        prompt: list[int],
        adapter: AdapterRef | None,
        max_tokens: int,
        ignore_eos: bool,
        min_tokens: int,
        penalty: float,
    ) -> None:
        self.count += 1
        admit = Admit(
            request_id=f"r{self.count}",
            gateway="gateway-0",
            prompt_tokens=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=max_tokens, ignore_eos=ignore_eos, min_tokens=min_tokens, presence_penalty=penalty
            ),
            adapter=adapter,
        )
        self.device.admits[admit.request_id] = admit
        self.live.add(admit.request_id)
        self.output[admit.request_id] = []
        self.tell(RequestArrived(admit))
        if admit.request_id in self.live:
            self.tell(RequestArrived(admit))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.live.remove(request_id)
        self.tell(RequestAborted(request_id))

    @precondition(lambda self: self.steps)
    @rule(steps=st.integers(1, 6), late=st.booleans())
    def finish_steps(self, steps: int, late: bool) -> None:
        """Finish several steps at a time, so that requests make progress between other events."""
        while self.steps and steps:
            self.finish_step(late)
            self.scheduler.validate()
            steps -= 1

    def finish_step(self, late: bool = False) -> None:
        """Finish the oldest step; ``late`` says that the layers of all early starts came too late."""
        batch = self.steps.popleft()
        began = {p.request_id: self.began_with.pop(p.request_id, 0) for p in batch.sequences}
        versions = {request_id: version_of(self.device.admits[request_id]) for request_id in began}
        resident = self.device.resident.values()
        discarded = {
            r for r, read in began.items()
            if read and (late or versions[r] not in resident or self.verified[versions[r]] != read)
        }  # fmt: skip
        drawn = self.device.compute(batch, discarded)
        sampled = tuple(Sampled(request_id=request_id, token=token) for request_id, token in drawn.items())
        were_late = tuple(request_id for request_id, read in began.items() if read and late)
        self.tell(StepDone(StepResult(step_id=batch.step_id, sampled=sampled, duration_s=0.01, late=were_late)))

    @precondition(lambda self: self.loads and not self.steps_ahead)
    @rule(data=st.data(), tokens=st.integers(1, 8), anew=st.booleans())
    def arrives(self, data: st.DataObject, tokens: int, anew: bool) -> None:
        """Announce progress of a read; ``anew`` starts another read, after the last one failed."""
        self.arrives_of(data.draw(st.sampled_from([load.adapter.version for load in self.loads])), tokens, anew)

    def arrives_of(self, version: str, tokens: int, anew: bool) -> None:
        if anew or version not in self.reads:
            self.reads_told += 1
            self.reads[version] = self.reads_told
        self.tell(AdapterArriving(version, self.reads[version], tokens))

    @precondition(lambda self: self.loads and not self.steps_ahead)
    @rule(data=st.data(), prompt=PROMPTS, ends=st.sampled_from(["loads", "breaks", "late", "fails", "goes on"]))
    def begin_early(self, data: st.DataObject, prompt: list[int], ends: str) -> None:
        """Start a request early, and then end the read in some way or let it go on."""
        load = data.draw(st.sampled_from(self.loads))
        self.arrive(prompt, load.adapter, 3, False, 0, 0.0)
        if self.steps:
            self.finish_step()
        if load not in self.loads:
            return
        self.arrives_of(load.adapter.version, 1, anew=False)
        if ends == "breaks":
            self.arrives_of(load.adapter.version, 1, anew=True)
        if ends in ("loads", "breaks", "late"):
            self.loads.remove(load)
            self.end_load(load)
        elif ends == "fails":
            self.loads.remove(load)
            self.fail_load(load)
        if self.steps:
            self.finish_step(late=ends == "late")

    @precondition(lambda self: self.steps)
    @rule()
    def fail_step(self) -> None:
        batch = self.steps.popleft()
        for part in batch.sequences:
            self.began_with.pop(part.request_id, None)
        self.device.fail(batch)
        self.tell(StepFailed(batch.step_id, "boom"))
        assert not {s.request_id for s in batch.sequences} & self.live

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.integers(0, 4))
    def finish_load(self, data: st.DataObject, fails: int) -> None:
        """End a load. A cancelled one mostly ends as cancelled, but may have ended before that."""
        load = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        if load.adapter.version in self.cancelled and fails < 3:
            self.end_cancelled(load)
        elif fails == 4:
            self.fail_load(load)
        else:
            self.end_load(load)

    def fail_load(self, load: LoadAdapter) -> None:
        self.cancelled.discard(load.adapter.version)
        self.reads.pop(load.adapter.version, None)
        self.tell(AdapterLoadFailed(load.adapter.version, "not_found", "gone"))

    def end_load(self, load: LoadAdapter) -> None:
        self.cancelled.discard(load.adapter.version)
        self.device.resident[load.slot] = load.adapter.version
        read = self.verified[load.adapter.version] = self.reads.pop(load.adapter.version, 0)
        self.tell(AdapterLoaded(load.adapter.version, read))

    def end_cancelled(self, load: LoadAdapter) -> None:
        self.cancelled.remove(load.adapter.version)
        self.reads.pop(load.adapter.version, None)
        live = self.live.copy()
        self.tell(AdapterLoadFailed(load.adapter.version, CANCELLED, "nobody wants it any more"))
        assert self.live == live, "a cancelled load must not reject new requests"

    @precondition(lambda self: self.device.resident)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.device.resident.values())))
        self.device.damage(version, self.steps)
        self.tell(AdapterDamaged(version))
        begun = {request_id for request_id, output in self.output.items() if output} & self.live
        assert version not in {version_of(self.device.admits[request_id]) for request_id in begun}

    @rule(adapters=st.lists(st.sampled_from(ADAPTERS), unique_by=lambda a: a.version, max_size=3))
    def plan(self, adapters: list[AdapterRef]) -> None:
        self.plan_epoch += 1
        self.plans_open += 1
        self.tell(CopiesRequested(self.plan_epoch, tuple(adapters)))
        self.tell(CopiesRetired(self.plan_epoch, tuple(a.version for a in adapters)))

    @rule(adapter=st.sampled_from(ADAPTERS))
    def expect(self, adapter: AdapterRef) -> None:
        self.tell(AdapterExpected(adapter))

    @rule(seconds=st.sampled_from([2.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def state_is_consistent(self) -> None:
        self.scheduler.validate()
        in_steps = {part.request_id for batch in self.steps for part in batch.sequences}
        listed = set(self.scheduler.load().queue.request_ids)
        assert self.live <= listed <= self.live | in_steps, "a request is held longer than its steps"
        assert self.scheduler.is_idle == (not listed and not self.steps)

    @invariant()
    def loads_are_wanted_or_cancelled(self) -> None:
        residency = self.scheduler.residency
        wanted = {s.version for s in self.scheduler.waiting}.union(
            residency._plan.missing, residency._candidates.versions()
        )
        for entry in residency.pool.entries():
            if entry.state in LEAVING_STATES:
                continue
            cancelled = entry.state is LifecycleState.CANCELLED
            assert cancelled == (not entry.is_complete and entry.adapter.version in self.cancelled)
            assert entry.is_complete or cancelled or entry.running or entry.adapter.version in wanted, (
                "a load that no request and no plan needs"
            )

    @invariant()
    def prefetched_bytes_are_useful_wasted_or_undecided(self) -> None:
        entries = [e for e in self.scheduler.residency.pool.entries() if e.prefetch and e.is_complete]
        undecided = Counter[str]()
        for entry in entries:
            undecided[entry.prefetch] += 0 if entry.ran else entry.adapter.slab_bytes
        for counts in self.scheduler.counters().prefetched:
            decided = counts.useful_bytes + counts.wasted_bytes
            assert counts.loaded_bytes == decided + undecided.pop(counts.kind, 0)
        assert not any(undecided.values())

    @invariant()
    def cached_blocks_hold_the_content_of_their_digests(self) -> None:
        for digest, block in self.scheduler.blocks._cached.items():
            contents = [self.device.kv.get((block, offset)) for offset in range(BLOCK)]
            assert None not in contents, "KV of a failed step is cached"
            version, tokens = contents[-1]
            name = root_digest(version)
            for start in range(0, len(tokens), BLOCK):
                name = chain_digest(name, tokens[start : start + BLOCK])
            assert name == digest

    @invariant()
    def steps_in_flight_keep_their_blocks_and_slots(self) -> None:
        held = {s.request_id: s for s in self.scheduler.running}
        writer: dict[int, str] = {}
        for part in (part for batch in self.steps for part in batch.sequences):
            assert tuple(held[part.request_id].blocks[: len(part.blocks)]) == part.blocks
            version = version_of(self.device.admits[part.request_id])
            there = self.device.resident.get(part.slot, "") == version
            assert there or self.entry_of(version).slot == part.slot, "the extent may belong to another adapter"
            for position in range(part.start, part.start + len(part.tokens)):
                assert writer.setdefault(part.blocks[position // BLOCK], part.request_id) == part.request_id

    def entry_of(self, version: str) -> PoolEntry:
        entry = self.scheduler.residency.pool.get(version)
        assert entry is not None
        return entry

    def teardown(self) -> None:
        """Without new events all requests end in a bounded number of turns and release everything."""
        if not hasattr(self, "scheduler"):
            return
        for _ in self.turns():
            if self.steps:
                self.finish_step()
            while self.loads:
                load = self.loads.pop()
                (self.end_cancelled if load.adapter.version in self.cancelled else self.end_load)(load)
            self.scheduler.validate()
        assert not self.live, [self.scheduler.story.lines(r) for r in self.live]
        assert self.plans_open == 0, "a plan was never answered"
        assert self.scheduler.is_idle
        assert self.scheduler.blocks.free == self.scheduler.limits.kv_blocks
        assert all(entry.running == 0 for entry in self.scheduler.residency.pool.entries())

    def turns(self) -> Iterator[int]:
        for turn in range(600):
            if not self.steps and not self.loads:
                return
            yield turn
        raise AssertionError("requests do not end")


class OneAhead(SchedulerMachine):
    steps_ahead = 1


class TwoAhead(SchedulerMachine):
    steps_ahead = 2


SETTINGS = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestNoneAhead = SchedulerMachine.TestCase
TestNoneAhead.settings = SETTINGS
TestOneAhead = OneAhead.TestCase
TestOneAhead.settings = SETTINGS
TestTwoAhead = TwoAhead.TestCase
TestTwoAhead.settings = SETTINGS
