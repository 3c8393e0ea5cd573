"""The roll-out of plans as a state machine that maps events to instructions.

A roll-out loads new copies before it publishes the plan, and removes old copies afterwards (make-before-break)::

    IDLE       --begin-->         PREPARING    engines load and pin the copies of the new plan
    PREPARING  --begin-->         PREPARING    a newer plan replaces this one
    PREPARING  --cancel-->        IDLE         engines unpin the prepared copies
    PREPARING  --all_prepared-->  WRITING      the plan without the failed copies is written to disk
    WRITING    --written-->       RETIRING     the plan is published, and engines unpin all other copies
    WRITING    --write_failed-->  RETIRING     the old plan stays, and engines unpin the prepared copies
    RETIRING   --begin-->         PREPARING    a newer plan does not wait for the unpinning
    RETIRING   --all_retired-->   IDLE

A copy that cannot be prepared is left out of the plan, and the old copy that it should replace stays. The epoch of a
roll-out is greater than every epoch that engines have reported. Late messages of a failed roll-out therefore never
match a newer one, even if the planner died or the disk was full.

Between roll-outs, the machine corrects engines that deviate from the plan. A restarted engine is asked to load its
planned copies at once. Engines unpin copies that are not in the plan, such as those of an earlier planner process.
"""

from collections.abc import Mapping
from enum import StrEnum
from math import inf

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Plan
from loraserve.planner.rollout import events
from loraserve.planner.rollout.copies import CopyId, copy_id, pinned_versions, replace_absent_copies, versions_by_engine
from loraserve.planner.rollout.events import Begin, Event, Instruction
from loraserve.story import Story

NO_PLAN = Plan(epoch=0, created_unix_s=0.0, placements=())
RETRY_S = 5.0
"""Seconds before a request is repeated, if the engine's reports do not show its effect. Report delays are shorter."""


class Phase(StrEnum):
    IDLE = "IDLE"
    PREPARING = "PREPARING"
    WRITING = "WRITING"
    RETIRING = "RETIRING"


class Trigger(StrEnum):
    BEGIN = "begin"
    CANCEL = "cancel"
    ALL_PREPARED = "all_prepared"
    WRITTEN = "written"
    WRITE_FAILED = "write_failed"
    ALL_RETIRED = "all_retired"


TRANSITIONS: dict[tuple[Phase, Trigger], Phase] = {
    (Phase.IDLE, Trigger.BEGIN): Phase.PREPARING,
    (Phase.PREPARING, Trigger.BEGIN): Phase.PREPARING,
    (Phase.PREPARING, Trigger.CANCEL): Phase.IDLE,
    (Phase.PREPARING, Trigger.ALL_PREPARED): Phase.WRITING,
    (Phase.WRITING, Trigger.WRITTEN): Phase.RETIRING,
    (Phase.WRITING, Trigger.WRITE_FAILED): Phase.RETIRING,
    (Phase.RETIRING, Trigger.BEGIN): Phase.PREPARING,
    (Phase.RETIRING, Trigger.ALL_RETIRED): Phase.IDLE,
}


class Attempt(msgspec.Struct):
    """The roll-out under way.

    ``incarnations``: the incarnation of each engine that was asked to prepare and is not lost. ``waiting``: engines
    whose answer is outstanding. ``absent``: why a copy is missing. ``silent``: live engines whose Prepare failed.
    ``plan``: the plan to write. ``applied``: the plan was written. ``refused``: why the whole roll-out failed.
    """

    epoch: int
    begin: Begin
    incarnations: dict[str, str] = msgspec.field(default_factory=dict)
    waiting: set[str] = msgspec.field(default_factory=set)
    absent: dict[CopyId, str] = msgspec.field(default_factory=dict)
    silent: set[str] = msgspec.field(default_factory=set)
    plan: Plan | None = None
    applied: bool = False
    refused: str = ""

    def failures(self) -> tuple[str, ...]:
        failures = [f"{engine}: {reason}" for (engine, _), reason in sorted(self.absent.items())]
        return (*failures, self.refused) if self.refused else tuple(failures)


class LastRequest(msgspec.Struct, frozen=True):
    """The last Prepare or Retire to an engine. ``ended_s``: when Prepare ended (inf before), or Retire was sent."""

    incarnation: str
    epoch: int
    ended_s: float


class Rollout:
    """The state machine that rolls out one plan after another.

    ``plan`` is the last published plan. ``epoch`` is the greatest epoch used by a roll-out or reported by an engine.
    ``story`` records events by adapter version and by ``story_subject(epoch)``.
    """

    def __init__(self, plan: Plan = NO_PLAN) -> None:
        self.plan = plan
        self.epoch = plan.epoch
        self.phase = Phase.IDLE
        self.engines: dict[str, EngineLoad] = {}
        self.story = Story()
        self._attempt: Attempt | None = None
        self._left_out: dict[str, str] = {}
        """Engines left out of earlier roll-outs, each with its incarnation at that time."""
        self._last_prepare: dict[str, LastRequest] = {}
        self._last_retire: dict[str, LastRequest] = {}
        self._now = 0.0

    def handle(self, event: Event, now: float) -> list[Instruction]:
        self._now = now
        match event:
            case Begin():
                return self._begin(event)
            case events.Cancel():
                return self._cancel()
            case events.EnginesSeen(engines, adapters):
                return self._see_engines(engines, adapters)
            case events.PrepareAnswered(engine, incarnation, epoch, failed):
                self._note_prepare_ended(engine, epoch)
                return self._take_prepared(engine, incarnation, epoch, failed)
            case events.PrepareFailed(engine, epoch, reason):
                self._note_prepare_ended(engine, epoch)
                self._tell(epoch, f"{engine} did not prepare: {reason}")
                return self._do_without(engine, reason) if self.waits_for(engine, epoch, Phase.PREPARING) else []
            case events.Written(epoch):
                return self._publish(epoch)
            case events.WriteFailed(epoch, reason):
                return self._keep_old_plan(epoch, reason)
            case events.RetireEnded(engine, epoch):
                return self._take_retired(engine) if self.waits_for(engine, epoch, Phase.RETIRING) else []

    def lacks_copies(self, now: float) -> bool:
        """Return whether any ready engine lacks planned copies and may now be asked to load them."""
        planned = versions_by_engine(self.plan.placements)
        return any(
            planned.get(load.engine, set()) - pinned_versions(load)
            for load in self.engines.values()
            if _is_due(self._last_prepare, load, now)
        )

    def waits_for(self, engine: str, epoch: int, phase: Phase) -> bool:
        """Return whether the current roll-out has this epoch and phase, and still waits for the engine's answer."""
        attempt = self._attempt
        return attempt is not None and (attempt.epoch, self.phase) == (epoch, phase) and engine in attempt.waiting

    def validate(self) -> None:
        """Check all invariants of the state. Raises AssertionError with the violated invariant."""
        copies = [copy_id(p) for p in self.plan.placements]
        assert len(copies) == len(set(copies)), "a copy is planned twice"
        for version in {v for _, v in copies}:
            total = sum(p.share for p in self.plan.placements if p.version == version)
            assert abs(total - 1) < 1e-6, f"shares of {version} sum to {total}"
        assert self.epoch >= self.plan.epoch, "a published epoch was never given to a roll-out"
        attempt = self._attempt
        assert (attempt is None) == (self.phase is Phase.IDLE), "only an idle roll-out has no attempt"
        if attempt is None:
            return
        assert attempt.epoch <= self.epoch
        assert attempt.applied == (attempt.epoch == self.plan.epoch), "an attempt is in force before it is written"
        assert not attempt.applied or self.phase is Phase.RETIRING, "an attempt is in force before it is written"
        assert bool(attempt.waiting) != (self.phase is Phase.WRITING), "engines are waited for except while writing"
        assert (attempt.plan is None) == (self.phase is Phase.PREPARING), "the plan is fixed when writing begins"
        is_retiring = self.phase is Phase.RETIRING
        assert is_retiring or {engine for engine, _ in attempt.absent}.isdisjoint(attempt.waiting)
        assert attempt.absent.keys() <= {copy_id(p) for p in attempt.begin.placements}

    def _advance(self, trigger: Trigger) -> None:
        assert (self.phase, trigger) in TRANSITIONS, f"{trigger} is no transition of {self.phase}"
        self.phase = TRANSITIONS[self.phase, trigger]

    def _begin(self, begin: Begin) -> list[Instruction]:
        assert self.phase is not Phase.WRITING, "a roll-out begins while the plan of the last is being written"
        instructions: list[Instruction] = [*self._end_attempt()]
        self._advance(Trigger.BEGIN)
        self.epoch += 1
        attempt = self._attempt = Attempt(self.epoch, begin)
        for engine, versions in sorted(versions_by_engine(begin.placements).items()):
            if engine not in self.engines:
                attempt.absent.update({(engine, version): "it is not ready" for version in versions})
                continue
            attempt.incarnations[engine] = self.engines[engine].incarnation
            attempt.waiting.add(engine)
            instructions.append(self._prepare(engine, attempt.epoch, versions, begin.adapters))
        self._tell(attempt.epoch, f"began with {len(begin.placements)} copies on {len(attempt.waiting)} engines")
        return [*instructions, *self._write_when_prepared()]

    def _cancel(self) -> list[Instruction]:
        if self.phase is not Phase.PREPARING:
            return []
        epoch = self._current().epoch
        ended = self._end_attempt()
        self._advance(Trigger.CANCEL)
        return [*ended, *self._retire_everywhere(epoch)]

    def _take_prepared(self, engine: str, incarnation: str, epoch: int, failed: Mapping[str, str]) -> list[Instruction]:
        for version, reason in failed.items():
            self._tell(epoch, f"{engine} did not prepare {version}: {reason}")
        if not self.waits_for(engine, epoch, Phase.PREPARING):
            return []
        attempt = self._current()
        planned = {version for e, version in map(copy_id, attempt.begin.placements) if e == engine}
        attempt.absent.update({(engine, v): reason for v, reason in failed.items() if v in planned})
        attempt.incarnations[engine] = incarnation
        attempt.waiting.discard(engine)
        return self._write_when_prepared()

    def _do_without(self, engine: str, reason: str) -> list[Instruction]:
        """Continue without an engine's answer. Copies that are pinned in its last report count as prepared.

        The plan thus loses only the copies that the engine lacks. An adapter that would have no copy keeps its old
        copies on this engine in the plan. If the engine was lost, all new copies on it count as failed.
        """
        attempt = self._current()
        load = self.engines.get(engine)
        if load is None or load.incarnation != attempt.incarnations[engine]:
            return self._lose({engine: reason})
        held = pinned_versions(load)
        planned = [copy_id(p) for p in attempt.begin.placements if p.engine == engine]
        attempt.absent.update({copy: reason for copy in planned if copy[1] not in held})
        attempt.waiting.discard(engine)
        attempt.silent.add(engine)
        self._left_out[engine] = load.incarnation
        return self._write_when_prepared()

    def _lose(self, reasons: Mapping[str, str]) -> list[Instruction]:
        """Continue without lost engines and the copies planned on them. ``reasons``: by engine, why it was lost."""
        attempt = self._current()
        for engine, reason in reasons.items():
            attempt.absent.update({copy_id(p): reason for p in attempt.begin.placements if p.engine == engine})
            attempt.waiting.discard(engine)
            self._left_out[engine] = attempt.incarnations.pop(engine)
        return self._write_when_prepared()

    def _write_when_prepared(self) -> list[Instruction]:
        attempt = self._current()
        if attempt.waiting:
            return []
        self._advance(Trigger.ALL_PREPARED)
        begin = attempt.begin
        copies = replace_absent_copies(
            begin.placements,
            attempt.absent,
            before=self.plan.placements,
            engines=self.engines,
            answered=attempt.incarnations.keys() - attempt.silent,
            drained=begin.drained,
        )
        drained = tuple(sorted(begin.drained))
        attempt.plan = Plan(epoch=attempt.epoch, created_unix_s=begin.unix_s, placements=copies, drained=drained)
        return [events.Write(attempt.plan)]

    def _publish(self, epoch: int) -> list[Instruction]:
        attempt = self._current()
        assert attempt.plan is not None
        assert attempt.epoch == epoch, f"epoch {epoch} was written while {attempt.epoch} was to be"
        self._advance(Trigger.WRITTEN)
        before, self.plan, attempt.applied = self.plan, attempt.plan, True
        self._tell(epoch, f"published with {len(self.plan.placements)} copies, {len(attempt.absent)} left out")
        self._tell_changed_copies(before, self.plan)
        return [events.Publish(self.plan), *self._begin_retiring()]

    def _keep_old_plan(self, epoch: int, reason: str) -> list[Instruction]:
        attempt = self._current()
        self._advance(Trigger.WRITE_FAILED)
        attempt.refused = f"epoch {epoch} could not be written, epoch {self.plan.epoch} stays: {reason}"
        self._tell(epoch, attempt.refused)
        return self._begin_retiring()

    def _begin_retiring(self) -> list[Instruction]:
        attempt = self._current()
        attempt.waiting = set(self.engines)
        retired = self._retire_everywhere(attempt.epoch)
        return [*retired, *self._end_when_retired()]

    def _take_retired(self, engine: str) -> list[Instruction]:
        self._current().waiting.discard(engine)
        return self._end_when_retired()

    def _end_when_retired(self) -> list[Instruction]:
        if self._current().waiting:
            return []
        ended = self._end_attempt()
        self._advance(Trigger.ALL_RETIRED)
        return [*ended]

    def _end_attempt(self) -> list[events.RolloutEnded]:
        """End the current roll-out, if there is one, and return its RolloutEnded. The caller advances the phase."""
        attempt = self._attempt
        if attempt is None:
            return []
        if self.phase is Phase.PREPARING:
            attempt.refused = f"epoch {attempt.epoch} was given up for a newer plan"
        self._attempt = None
        self._tell(attempt.epoch, "in force" if attempt.applied else f"not in force: {attempt.refused}")
        return [events.RolloutEnded(attempt.epoch, attempt.applied, attempt.failures())]

    def _see_engines(self, engines: tuple[EngineLoad, ...], adapters: Mapping[str, AdapterRef]) -> list[Instruction]:
        self.engines = {load.engine: load for load in engines}
        self.epoch = max([self.epoch, *(load.adapters.plan_epoch for load in engines)])
        match self.phase:
            case Phase.IDLE:
                return [*self._hold_to_plan(adapters), *self._notice_returned()]
            case Phase.PREPARING:
                return self._notice_lost()
            case Phase.WRITING:
                # The result of the write decides which plan is in force, so no engine is corrected before.
                return []
            case Phase.RETIRING:
                lost = sorted(self._current().waiting - self.engines.keys())
                return [i for engine in lost for i in self._take_retired(engine)]

    def _notice_lost(self) -> list[Instruction]:
        running = {engine: load.incarnation for engine, load in self.engines.items()}
        asked = self._current().incarnations
        lost = [engine for engine, incarnation in asked.items() if running.get(engine) != incarnation]
        return self._lose(dict.fromkeys(lost, "it was lost while the plan was being prepared"))

    def _notice_returned(self) -> list[Instruction]:
        running = {engine: load.incarnation for engine, load in self.engines.items()}
        returned = [engine for engine, lost in self._left_out.items() if running.get(engine, lost) != lost]
        for engine in returned:
            del self._left_out[engine]
        return [events.Replan(engine) for engine in returned]

    def _hold_to_plan(self, adapters: Mapping[str, AdapterRef]) -> list[Instruction]:
        """Return instructions to load planned copies that engines lack, and to unpin copies that are not planned."""
        if not self.plan.epoch:
            return []  # The plan was lost, so engines must keep the copies that they hold.
        instructions: list[Instruction] = []
        planned = versions_by_engine(self.plan.placements)
        for engine, load in sorted(self.engines.items()):
            wanted, held = planned.get(engine, set()), pinned_versions(load)
            is_behind = load.adapters.plan_epoch > self.plan.epoch and engine not in self._last_retire
            if (held - wanted or is_behind) and _is_due(self._last_retire, load, self._now):
                instructions.append(self._retire(engine, self.epoch))
            if (wanted - held) & adapters.keys() and _is_due(self._last_prepare, load, self._now):
                instructions.append(self._prepare(engine, self.epoch, wanted, adapters))
        return instructions

    def _prepare(self, engine: str, epoch: int, versions: set[str], adapters: Mapping[str, AdapterRef]) -> Instruction:
        self._last_prepare[engine] = LastRequest(self.engines[engine].incarnation, epoch, inf)
        return events.Prepare(engine, epoch, tuple(adapters[v] for v in sorted(versions) if v in adapters))

    def _note_prepare_ended(self, engine: str, epoch: int) -> None:
        last = self._last_prepare.get(engine)
        if last is not None and last.epoch == epoch:
            self._last_prepare[engine] = msgspec.structs.replace(last, ended_s=self._now)

    def _retire_everywhere(self, epoch: int) -> list[Instruction]:
        return [self._retire(engine, epoch) for engine in sorted(self.engines)]

    def _retire(self, engine: str, epoch: int) -> Instruction:
        self._last_retire[engine] = LastRequest(self.engines[engine].incarnation, epoch, self._now)
        return events.Retire(engine, epoch, tuple(sorted(versions_by_engine(self.plan.placements).get(engine, ()))))

    def _current(self) -> Attempt:
        assert self._attempt is not None, "no roll-out is under way"
        return self._attempt

    def _tell(self, epoch: int, text: str) -> None:
        self.story.tell(story_subject(epoch), self._now, text)

    def _tell_changed_copies(self, before: Plan, after: Plan) -> None:
        """Add a story entry for each adapter whose copies or shares differ between the plans."""
        old, new = _describe_copies(before), _describe_copies(after)
        for version in old.keys() | new.keys():
            if old.get(version) != new.get(version):
                copies = new.get(version, "no engine")
                self.story.tell(version, self._now, f"plan epoch {after.epoch}: copies on {copies}")


def story_subject(epoch: int) -> str:
    return f"epoch-{epoch}"


def _is_due(requests: Mapping[str, LastRequest], load: EngineLoad, now: float) -> bool:
    """Return whether an engine may be asked: at once if new or restarted, else ``RETRY_S`` after ``ended_s``."""
    last = requests.get(load.engine)
    return last is None or last.incarnation != load.incarnation or now - last.ended_s >= RETRY_S


def _describe_copies(plan: Plan) -> dict[str, str]:
    copies: dict[str, list[str]] = {}
    for placement in plan.placements:
        text = f"{placement.engine} ({placement.share:.0%} of its requests)"
        copies.setdefault(placement.version, []).append(text)
    return {version: ", ".join(sorted(texts)) for version, texts in copies.items()}
