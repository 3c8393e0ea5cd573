"""The scheduler against a model of what it promises: whatever happens on the way, every request gets the tokens of its
solo run, nothing leaks, and everything ends.
"""

from collections.abc import Iterator
from hashlib import blake2b

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.batch import Sampled, StepResult
from loraserve.engine.events import (
    AdapterLoaded,
    AdapterLoadFailed,
    CopiesRetired,
    Emit,
    Event,
    EvictAdapter,
    LoadAdapter,
    PlanPrepared,
    PlanReady,
    Reject,
    RequestAborted,
    RequestArrived,
    RunStep,
    StepDone,
    StepFailed,
)
from loraserve.engine.limits import SchedulerLimits
from loraserve.engine.scheduler import Scheduler
from loraserve.messages import AdapterRef, Admit, SamplingParams

BLOCK = 4
EOS = 0
VOCAB = 23
SIZES = (1, 1, 2, 3)
ADAPTERS = [AdapterRef(name=f"a{i}", version=f"v{i}", rank=8, slab_bytes=4096 * n) for i, n in enumerate(SIZES)]


def next_token(version: str, history: list[int]) -> int:
    """What the fake model draws: any function of the adapter and everything before."""
    digest = blake2b(f"{version}{history}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") % VOCAB


def solo(admit: Admit, limit: int) -> tuple[list[int], str]:
    """Output and finish reason of the request alone."""
    version = admit.adapter.version if admit.adapter else ""
    history = list(admit.prompt_tokens)
    output: list[int] = []
    most = min(admit.sampling.max_tokens, limit - len(history))
    while True:
        token = next_token(version, history)
        if token == EOS and not admit.sampling.ignore_eos:
            return output, "stop"
        history.append(token)
        output.append(token)
        if len(output) >= most:
            return output, "length"


class SchedulerMachine(RuleBasedStateMachine):
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
            )
        )
        self.now = 0.0
        self.admits: dict[str, Admit] = {}
        self.live: set[str] = set()
        self.output: dict[str, list[int]] = {}
        self.step: RunStep | None = None
        self.loads: list[LoadAdapter] = []
        self.resident: dict[int, str] = {}
        self.kv: dict[int, dict[int, tuple[str, tuple[int, ...]]]] = {}
        self.count = 0
        self.plan_epoch = 0
        self.plans_open = 0

    def tell(self, event: Event) -> None:
        self.now += 1.0
        for instruction in self.scheduler.handle(event, self.now):
            match instruction:
                case RunStep():
                    assert self.step is None, "two steps at once"
                    self.step = instruction
                case LoadAdapter(slot=slot):
                    assert slot not in self.resident, "a slot is filled twice"
                    self.loads.append(instruction)
                case EvictAdapter(version, slot):
                    assert self.resident.pop(slot, version) == version
                case Emit(_, delta):
                    self.emitted(delta.request_id, delta.index, delta.tokens, delta.finish)
                case Reject(request_id):
                    self.live.discard(request_id)
                case PlanReady():
                    self.plans_open -= 1

    def emitted(self, request_id: str, index: int, tokens: tuple[int, ...], finish: str | None) -> None:
        assert request_id in self.live, "a token for a request that ended"
        assert index == len(self.output[request_id]), "a token is missing or repeated"
        self.output[request_id].extend(tokens)
        expected, reason = solo(self.admits[request_id], self.scheduler.max_model_tokens)
        assert self.output[request_id] == expected[: len(self.output[request_id])]
        if finish is not None:
            assert (self.output[request_id], finish) == (expected, reason)
            self.live.remove(request_id)

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=18),
        adapter=st.sampled_from([None, *ADAPTERS]),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
    )
    def arrive(self, prompt: list[int], adapter: AdapterRef | None, max_tokens: int, ignore_eos: bool) -> None:
        self.count += 1
        admit = Admit(
            request_id=f"r{self.count}",
            gateway="gateway-0",
            prompt_tokens=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
            adapter=adapter,
        )
        self.admits[admit.request_id] = admit
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
        if self.step is None or request_id not in {s.request_id for s in self.step.batch.sequences}:
            assert request_id not in self.scheduler.load().request_ids

    @precondition(lambda self: self.step is not None)
    @rule()
    def finish_step(self) -> None:
        assert self.step is not None
        batch, self.step = self.step.batch, None
        sampled = []
        for part in batch.sequences:
            admit = self.admits[part.request_id]
            version = admit.adapter.version if admit.adapter else ""
            assert (self.resident.get(part.slot, "") if part.slot >= 0 else "") == version, "wrong adapter in the slot"
            self.compute(part.blocks, part.start, part.tokens, version, part.history)
            if part.sample:
                sampled.append(Sampled(request_id=part.request_id, token=next_token(version, part.history)))
        assert sum(len(p.tokens) for p in batch.sequences) <= self.scheduler.limits.max_step_tokens
        self.tell(StepDone(StepResult(step_id=batch.step_id, sampled=tuple(sampled), duration_s=0.01)))

    def compute(
        self, blocks: tuple[int, ...], start: int, tokens: tuple[int, ...], version: str, history: list[int]
    ) -> None:
        """The KV the model reads must be that of exactly this history under this adapter."""
        for position in range(start):
            content = self.kv.get(blocks[position // BLOCK], {}).get(position % BLOCK)
            assert content == (version, tuple(history[: position + 1])), f"stale KV at {position}"
        for position, token in enumerate(tokens, start):
            assert history[position] == token
            self.kv.setdefault(blocks[position // BLOCK], {})[position % BLOCK] = (
                version,
                tuple(history[: position + 1]),
            )

    @precondition(lambda self: self.step is not None)
    @rule()
    def fail_step(self) -> None:
        assert self.step is not None
        step, self.step = self.step, None
        self.tell(StepFailed(step.batch.step_id, "boom"))
        assert not {s.request_id for s in step.batch.sequences} & self.live

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.integers(0, 4))
    def finish_load(self, data: st.DataObject, fails: int) -> None:
        load = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        if fails == 4:
            self.tell(AdapterLoadFailed(load.adapter.version, "not_found", "gone"))
        else:
            self.resident[load.slot] = load.adapter.version
            self.tell(AdapterLoaded(load.adapter.version))

    @rule(adapters=st.lists(st.sampled_from(ADAPTERS), unique_by=lambda a: a.version, max_size=3))
    def plan(self, adapters: list[AdapterRef]) -> None:
        self.plan_epoch += 1
        self.plans_open += 1
        self.tell(PlanPrepared(self.plan_epoch, tuple(adapters)))
        self.tell(CopiesRetired(self.plan_epoch, tuple(a.version for a in adapters)))

    @invariant()
    def consistent(self) -> None:
        self.scheduler.validate()
        assert self.live == set(self.scheduler.load().request_ids) - self.aborting()

    def aborting(self) -> set[str]:
        return {s.request_id for s in self.scheduler.running if s.aborted}

    def teardown(self) -> None:
        """Once nothing new comes, everything ends within a bounded number of turns and gives all back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in self.turns():
            if self.step is not None:
                self.finish_step()
            while self.loads:
                load = self.loads.pop()
                self.resident[load.slot] = load.adapter.version
                self.tell(AdapterLoaded(load.adapter.version))
            self.scheduler.validate()
        assert not self.live, [self.scheduler.story(r) for r in self.live]
        assert self.plans_open == 0, "a plan was never answered"
        assert self.scheduler.idle
        assert self.scheduler.blocks.free == self.scheduler.limits.kv_blocks
        assert all(entry.running == 0 for entry in self.scheduler.residency.pool.entries())

    def turns(self) -> Iterator[int]:
        for turn in range(600):
            if self.step is None and not self.loads:
                return
            yield turn
        raise AssertionError("requests do not end")


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
