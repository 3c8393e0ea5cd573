"""Roll-outs with the engines' real residency, in random order of events and failures of planners, engines, messages."""

from collections.abc import Iterable

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraserve.engine.adapters.residency import Residency
from loraserve.engine.schedule.events import Instruction as EngineInstruction
from loraserve.engine.schedule.events import LoadAdapter, PlanReady, SchedulerLimits
from loraserve.messages import EngineLoad, Placement, Plan
from loraserve.planner.rollout.copies import CopyId, copy_id, versions_by_engine
from loraserve.planner.rollout.events import (
    Begin,
    Cancel,
    EnginesSeen,
    Event,
    Instruction,
    Prepare,
    PrepareAnswered,
    PrepareFailed,
    Publish,
    Retire,
    RetireEnded,
    Write,
    WriteFailed,
    Written,
)
from loraserve.planner.rollout.machine import RETRY_S, Phase, Rollout
from loraserve.story import Story
from loraserve.testing.reports import adapter_ref, engine_load, resident

UNIT = 4096
ENGINES = ("e0", "e1", "e2")
ADAPTERS = tuple(adapter_ref(n, UNIT) for n in range(4))
REFS = {a.version: a for a in ADAPTERS}
LIMITS = SchedulerLimits(
    kv_blocks=8, block_tokens=4, pool_bytes=16 * UNIT, max_adapters=16, max_running=4, max_waiting=4,
    max_step_tokens=16, max_model_tokens=32, eos_token_ids=frozenset(),
)  # fmt: skip
NOTHING = Plan(epoch=0, created_unix_s=0.0, placements=())


class Engine:
    """An engine with its real residency; the test decides when loads end."""

    def __init__(self, name: str, incarnation: int) -> None:
        self.name, self.incarnation = name, f"i{incarnation}"
        self.residency = Residency(LIMITS, Story())
        self.loading: list[str] = []

    def report(self) -> EngineLoad:
        entries = [e for e in self.residency.pool.entries() if e.is_complete]
        held = tuple(resident(e.adapter, pinned=e.planned) for e in entries)
        epoch = self.residency.plan_epoch
        return engine_load(self.name, incarnation=self.incarnation, resident=held, plan_epoch=epoch)

    def pins(self) -> set[str]:
        return {e.adapter.version for e in self.residency.pool.entries() if e.planned}

    def carry_out(self, instructions: Iterable[EngineInstruction]) -> list[PlanReady]:
        """Carry out instructions and return the answers; loads that they start are then under way."""
        answers: list[PlanReady] = []
        for instruction in [*instructions, *self.residency.start_loads([], 0.0, idle=True)]:
            match instruction:
                case LoadAdapter(adapter):
                    self.loading.append(adapter.version)
                case PlanReady():
                    answers.append(instruction)
        return answers


class Sent(msgspec.Struct, frozen=True):
    """A message on its way to an engine, from the planner with this number."""

    planner: int
    incarnation: str
    message: Prepare | Retire


class RolloutMachine(RuleBasedStateMachine):
    """The planner, its disk, engines, and messages that arrive late, twice or never."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.planner = 1
        self.disk = NOTHING
        self.disk_is_full = False
        self.writing: Plan | None = None
        """The plan that a thread of the planner is writing."""
        self.rollout = Rollout(NOTHING)
        self.incarnations = dict.fromkeys(ENGINES, 1)
        self.engines = {name: Engine(name, 1) for name in ENGINES}
        self.wire: list[Sent] = []
        self.answers: list[tuple[int, Event]] = []
        self.published: list[Plan] = []
        self.begun: set[CopyId] = set()
        self.held: dict[tuple[str, str], set[CopyId]] = {}
        """Copies of the roll-out on live engines that timed out, by engine and incarnation."""
        self.see()

    def handle(self, event: Event) -> None:
        self.follow(self.rollout.handle(event, self.now))
        self.rollout.validate()

    def follow(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Prepare(engine) | Retire(engine):
                    self.wire.append(Sent(self.planner, self.engines[engine].incarnation, instruction))
                case Write(plan):
                    assert self.writing is None
                    self.writing = plan
                case Publish(plan):
                    self.publish(plan)

    @precondition(lambda self: self.writing)
    @rule()
    def end_write(self) -> None:
        plan, self.writing = self.writing, None
        assert plan is not None
        assert set().union(*self.held.values()) <= {copy_id(p) for p in plan.placements}, (
            "copies that engines hold are planned"
        )
        if self.disk_is_full:
            self.handle(WriteFailed(plan.epoch, "full"))
        else:
            self.disk = plan
            self.handle(Written(plan.epoch))

    def publish(self, plan: Plan) -> None:
        assert plan == self.disk, "a published plan is on disk"
        assert all(plan.epoch > old.epoch for old in self.published), "epochs only grow"
        self.published.append(plan)

    def arrive(self, sent: Sent) -> None:
        """Deliver a message, unless the engine has restarted since it was sent."""
        engine = self.engines[sent.message.engine]
        if engine.incarnation != sent.incarnation:
            return
        match sent.message:
            case Prepare(_, epoch, adapters):
                self.answer(sent.planner, engine, engine.carry_out(engine.residency.prepare_plan(epoch, adapters)))
            case Retire(name, epoch, keep):
                before = {e.adapter.version: e.plan_epoch for e in engine.residency.pool.entries() if e.planned}
                self.answer(sent.planner, engine, engine.carry_out(engine.residency.retire_copies(epoch, keep)))
                newer = {version for version, pinned_epoch in before.items() if pinned_epoch > epoch}
                assert newer <= engine.pins(), "a late retire took what a newer plan had pinned"
                self.answers.append((sent.planner, RetireEnded(name, epoch)))

    def answer(self, planner: int, engine: Engine, ready: list[PlanReady]) -> None:
        self.answers += [
            (planner, PrepareAnswered(engine.name, engine.incarnation, r.epoch, dict(r.failed))) for r in ready
        ]

    @precondition(lambda self: not self.writing)
    @rule(
        pairs=st.sets(st.tuples(st.sampled_from(ENGINES), st.sampled_from(sorted(REFS))), max_size=6),
        drained=st.sets(st.sampled_from(ENGINES), max_size=1),
    )
    def begin(self, pairs: set[tuple[str, str]], drained: set[str]) -> None:
        count = {v: sum(w == v for _, w in pairs) for _, v in pairs}
        wanted = tuple(Placement(version=v, name=REFS[v].name, engine=e, share=1 / count[v]) for e, v in sorted(pairs))
        self.begun, self.held = {copy_id(p) for p in wanted}, {}
        self.handle(Begin(wanted, REFS, frozenset(drained), 1.0))

    @rule()
    def cancel(self) -> None:
        self.handle(Cancel())

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data: st.DataObject, again: bool) -> None:
        """Messages arrive in any order: those of a dead planner may arrive after those of its successor."""
        place = data.draw(st.integers(0, len(self.wire) - 1))
        self.arrive(self.wire[place] if again else self.wire.pop(place))

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """The message never arrives, or its answer is late."""
        sent = self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))
        self.answers.append((sent.planner, _silence(sent.message)))

    @precondition(lambda self: self.rollout.phase is Phase.PREPARING)
    @rule(engine=st.sampled_from(ENGINES), loads=st.integers(0, 3))
    def time_out(self, engine: str, loads: int) -> None:
        """The engine is alive and loading, but its answer is late."""
        at, epoch = self.engines[engine], self.rollout.epoch
        for sent in [s for s in self.wire if (s.message.engine, s.message.epoch) == (engine, epoch)]:
            self.arrive(sent)
        for _ in at.loading[:loads]:
            self.end_load(at, fails=False)
        self.see()
        if self.rollout.waits_for(engine, epoch, Phase.PREPARING):
            self.held[engine, at.incarnation] = self.begun & {(engine, version) for version in at.pins()}
            self.handle(PrepareFailed(engine, epoch, "no answer"))

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), again=st.booleans())
    def hear(self, data: st.DataObject, again: bool) -> None:
        place = data.draw(st.integers(0, len(self.answers) - 1))
        planner, answer = self.answers[place] if again else self.answers.pop(place)
        if planner == self.planner:
            self.handle(answer)

    @rule(engine=st.sampled_from(ENGINES), fails=st.booleans())
    def load(self, engine: str, fails: bool) -> None:
        at = self.engines[engine]
        if at.loading:
            self.end_load(at, fails)

    def end_load(self, at: Engine, fails: bool) -> None:
        version = at.loading.pop(0)
        ended = at.residency.fail_load(version, "gone") if fails else at.residency.complete_load(version)
        self.answer(self.planner, at, at.carry_out(ended))

    @rule()
    def see(self, engines: tuple[str, ...] = ENGINES) -> None:
        seen = {(name, self.engines[name].incarnation) for name in engines}
        self.held = {silent: held for silent, held in self.held.items() if silent in seen}
        self.handle(EnginesSeen(tuple(self.engines[name].report() for name in engines), REFS))

    @rule(engine=st.sampled_from(ENGINES))
    def miss(self, engine: str) -> None:
        """The monitor takes the engine for dead or starting."""
        self.see(tuple(name for name in ENGINES if name != engine))

    @rule(engine=st.sampled_from(ENGINES))
    def kill_engine(self, engine: str) -> None:
        self.incarnations[engine] += 1
        self.engines[engine] = Engine(engine, self.incarnations[engine])

    @rule(loses_disk=st.integers(0, 9), ends_write=st.booleans())
    def kill_planner(self, loses_disk: int, ends_write: bool) -> None:
        self.planner += 1
        if self.writing and not self.disk_is_full and ends_write:
            # The thread ended its write after the planner died.
            self.disk = self.writing
        self.writing = None
        if loses_disk == 9:
            # If no engine knows an epoch either, epochs start again at 1.
            self.disk, self.published = NOTHING, []
        self.rollout, self.held = Rollout(self.disk), {}
        self.see()

    @rule(full=st.booleans())
    def fill_disk(self, full: bool) -> None:
        self.disk_is_full = full

    @rule()
    def pass_time(self) -> None:
        self.now += RETRY_S

    @invariant()
    def the_plan_in_force_is_on_disk(self) -> None:
        assert self.rollout.plan == self.disk
        assert (self.rollout.phase is Phase.WRITING) == (self.writing is not None)

    def teardown(self) -> None:
        """Without further failures, engines end up with exactly the copies of the published plan."""
        self.disk_is_full = False
        for _ in range(4):
            self.settle()
        if self.rollout.plan == NOTHING:
            return  # The plan was lost, and engines keep what they hold until there is another.
        assert self.rollout.phase is Phase.IDLE
        planned = versions_by_engine(self.rollout.plan.placements)
        assert {name: engine.pins() for name, engine in self.engines.items()} == {
            name: planned.get(name, set()) for name in ENGINES
        }
        assert len({copy_id(p) for p in self.rollout.plan.placements}) == len(self.rollout.plan.placements)

    def settle(self) -> None:
        """Complete everything that is under way, and let some time pass."""
        for _ in range(50):
            if self.writing:
                self.end_write()
            while self.wire:
                sent = self.wire.pop(0)
                self.arrive(sent)
                if self.engines[sent.message.engine].incarnation != sent.incarnation:
                    self.answers.append((sent.planner, _silence(sent.message)))
            for engine in self.engines.values():
                while engine.loading:
                    self.end_load(engine, fails=False)
            while self.answers:
                planner, answer = self.answers.pop(0)
                if planner == self.planner:
                    self.handle(answer)
        # Requests whose answers were lost with the planner time out.
        for name in ENGINES:
            self.handle(PrepareFailed(name, self.rollout.epoch, "no answer"))
            self.handle(RetireEnded(name, self.rollout.epoch))
        self.now += RETRY_S
        self.see()


def _silence(message: Prepare | Retire) -> Event:
    if isinstance(message, Prepare):
        return PrepareFailed(message.engine, message.epoch, "no answer")
    return RetireEnded(message.engine, message.epoch)


TestRollout = RolloutMachine.TestCase
TestRollout.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
