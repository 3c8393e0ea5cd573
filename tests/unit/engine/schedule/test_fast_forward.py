"""Skipping quiet steps reaches the same state as handling them one by one."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engine.schedule.events import (
    AdapterLoaded,
    Instruction,
    LoadAdapter,
    RequestArrived,
    RunStep,
    Sampled,
    SchedulerLimits,
    StepBatch,
    StepDone,
    StepResult,
)
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.messages import AdapterRef, Admit, SamplingParams

TOKEN = 7
ADAPTERS = [AdapterRef(name=f"a{i}", version=f"v{i}", rank=8, slab_bytes=4096) for i in range(3)]


class Engine:
    """A scheduler and its step in flight."""

    def __init__(self, **limits: Any) -> None:
        defaults: dict[str, Any] = {
            "kv_blocks": 40,
            "block_tokens": 4,
            "pool_bytes": 8192,
            "max_adapters": 4,
            "max_running": 4,
            "max_waiting": 100,
            "max_step_tokens": 16,
            "max_model_tokens": 100,
            "eos_token_ids": frozenset({0}),
            "prefix_cache": False,
        }
        self.scheduler = Scheduler(SchedulerLimits(**{**defaults, **limits}))
        self.batch: StepBatch | None = None
        self.loading: list[str] = []

    def arrive(self, number: int, prompt: int, output: int, adapter: AdapterRef | None = None) -> None:
        admit = Admit(
            request_id=f"r{number}",
            gateway="gateway",
            prompt_tokens=(number + 10,) * prompt,
            sampling=SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
            adapter=adapter,
        )
        self._execute(self.scheduler.handle(RequestArrived(admit), 0.0))

    def load(self) -> None:
        if self.loading:
            self._execute(self.scheduler.handle(AdapterLoaded(self.loading.pop(0)), 0.0))

    def step(self) -> None:
        assert self.batch is not None
        sampled = tuple(Sampled(request_id=s.request_id, token=TOKEN) for s in self.batch.sequences if s.sample)
        result = StepResult(step_id=self.batch.step_id, sampled=sampled, duration_s=0.01)
        self.batch = None
        self._execute(self.scheduler.handle(StepDone(result), 0.0))

    def skip(self, steps: int) -> None:
        self.batch = self.scheduler.skip_steps(steps, TOKEN)
        self.scheduler.validate()

    def _execute(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, RunStep):
                self.batch = instruction.batch
            elif isinstance(instruction, LoadAdapter):
                self.loading.append(instruction.adapter.version)
        self.scheduler.validate()


Action = tuple[str, int, int, int]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, 20), st.integers(1, 40), st.integers(-1, 2)),
        st.tuples(st.just("load"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("steps"), st.integers(1, 30), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(actions=ACTIONS, kv_blocks=st.integers(12, 60), max_running=st.integers(1, 6))
def test_skipped_steps_reach_the_state_of_single_ones(actions: list[Action], kv_blocks: int, max_running: int) -> None:
    single = Engine(kv_blocks=kv_blocks, max_running=max_running)
    fast = Engine(kv_blocks=kv_blocks, max_running=max_running)
    for number, (kind, first, second, third) in enumerate(actions):
        for engine in (single, fast):
            if kind == "arrive":
                engine.arrive(number, first, second, ADAPTERS[third] if third >= 0 else None)
            elif kind == "load":
                engine.load()
        if kind == "steps":
            _run_both(single, fast, first)
        assert single.scheduler.load() == fast.scheduler.load()
        assert single.scheduler.counters() == fast.scheduler.counters()
        assert single.batch == fast.batch


def _run_both(single: Engine, fast: Engine, steps: int) -> None:
    done = 0
    while done < steps and fast.batch is not None:
        quiet = min(fast.scheduler.quiet_steps(), steps - done)
        if quiet:
            fast.skip(quiet)
        else:
            fast.step()
        for _ in range(quiet or 1):
            single.step()
        done += quiet or 1


def test_most_steps_of_a_long_output_are_quiet() -> None:
    engine = Engine()
    engine.arrive(1, prompt=5, output=50)
    engine.step()
    assert engine.scheduler.quiet_steps() == 48, "the last of 49 more tokens ends the request"


def test_no_step_is_quiet_with_a_prefix_cache() -> None:
    engine = Engine(prefix_cache=True)
    engine.arrive(1, prompt=5, output=50)
    engine.step()
    assert engine.scheduler.quiet_steps() == 0


def test_no_step_is_quiet_while_a_waiting_request_may_start() -> None:
    engine = Engine()
    engine.arrive(1, prompt=5, output=50)
    engine.step()
    engine.arrive(2, prompt=5, output=50)
    assert engine.scheduler.quiet_steps() == 0
