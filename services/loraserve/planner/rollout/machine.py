"""What engines were last asked for, so that they are asked again in time and not more often. Pure."""

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from math import inf

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Plan
from loraserve.planner.rollout.copies import Copy, by_engine, copy_of, pinned, prepared
from loraserve.planner.rollout.events import (
    Begin,
    Ended,
    EnginesSeen,
    Event,
    GiveUp,
    Instruction,
    Prepare,
    PrepareAnswered,
    PrepareFailed,
    Publish,
    Replan,
    Retire,
    RetireEnded,
    Write,
    WriteFailed,
    Written,
)

RETRY_S = 5.0
"""An engine that does not hold what it should is asked again after this long; reports are late by less."""


class Asked(msgspec.Struct, frozen=True):
    """``ended_s`` is infinite while there is no answer."""

    incarnation: str
    epoch: int
    ended_s: float


def due(asked: Mapping[str, Asked], load: EngineLoad, now: float) -> bool:
    """An engine that was restarted at once, else a while after it answered or did not."""
    last = asked.get(load.engine)
    return last is None or last.incarnation != load.incarnation or now - last.ended_s >= RETRY_S


class Phase(StrEnum):
    IDLE = "IDLE"
    PREPARING = "PREPARING"
    WRITING = "WRITING"
    RETIRING = "RETIRING"


class Attempt(msgspec.Struct):
    """``incarnations`` are of engines that were asked and not lost since, ``silent`` those of them that did not answer
    in time, ``absent`` copies not there, with reasons."""

    epoch: int
    begin: Begin
    incarnations: dict[str, str]
    waiting: set[str]
    absent: dict[Copy, str]
    silent: set[str] = msgspec.field(default_factory=set)
    phase: Phase = Phase.PREPARING
    plan: Plan | None = None
    applied: bool = False
    refused: str = ""

    @property
    def failed(self) -> tuple[str, ...]:
        failed = [f"{engine}: {reason}" for (engine, _), reason in sorted(self.absent.items())]
        return (*failed, self.refused) if self.refused else tuple(failed)


KEPT_LINES = 1000


class Rollout:
    """``plan`` is the last that was published, ``epoch`` the greatest that was given to an attempt or heard of."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.epoch = plan.epoch
        self.engines: dict[str, EngineLoad] = {}
        self._attempt: Attempt | None = None
        self._left_out: dict[str, str] = {}
        """Engines that the last roll-outs lost, with the incarnation that was lost."""
        self._asked: dict[str, Asked] = {}
        self._retired: dict[str, Asked] = {}
        """By engine, what it was last asked to prepare and to retire."""
        self._lines: deque[tuple[int, str]] = deque(maxlen=KEPT_LINES)

    @property
    def phase(self) -> Phase:
        return self._attempt.phase if self._attempt else Phase.IDLE

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What to do about one event."""
        match event:
            case Begin():
                return self._begin(event)
            case GiveUp():
                return self._give_up(now)
            case EnginesSeen(engines, adapters):
                return self._seen(engines, adapters, now)
            case PrepareAnswered(engine, incarnation, epoch, failed):
                self._note_end(engine, epoch, now)
                return self._answered(engine, incarnation, epoch, failed)
            case PrepareFailed(engine, epoch, reason):
                self._note_end(engine, epoch, now)
                self._tell(epoch, f"{engine} did not prepare: {reason}")
                return self._silent(engine, reason) if self.waits_for(engine, epoch, Phase.PREPARING) else []
            case Written(epoch):
                return self._written(epoch, now)
            case WriteFailed(epoch, reason):
                return self._write_failed(epoch, reason, now)
            case RetireEnded(engine, epoch):
                return self._retire_ended(engine) if self.waits_for(engine, epoch, Phase.RETIRING) else []

    def lacks(self, now: float) -> bool:
        """Whether engines do not hold what is planned, although they were asked for it a while ago."""
        planned = by_engine(self.plan.placements)
        late = (load for load in self.engines.values() if due(self._asked, load, now))
        return any(planned.get(load.engine, set()) - pinned(load) for load in late)

    def waits_for(self, engine: str, epoch: int, phase: Phase) -> bool:
        """Answers that come twice, or for an attempt that is over, are nobody's."""
        attempt = self._attempt
        return attempt is not None and (attempt.epoch, attempt.phase) == (epoch, phase) and engine in attempt.waiting

    def story(self, epoch: int) -> list[str]:
        """What happened to one of the last epochs."""
        return [text for about, text in self._lines if about == epoch]

    def validate(self) -> None:
        """Every invariant of the state; raises AssertionError naming the one that broke."""
        copies = [copy_of(p) for p in self.plan.placements]
        assert len(copies) == len(set(copies)), "a copy is planned twice"
        for version in {v for _, v in copies}:
            total = sum(p.share for p in self.plan.placements if p.version == version)
            assert abs(total - 1) < 1e-6, f"shares of {version} sum to {total}"
        assert self.epoch >= self.plan.epoch, "an epoch is published that was never given"
        attempt = self._attempt
        if attempt is None:
            return
        assert attempt.epoch <= self.epoch
        assert attempt.applied == (attempt.epoch == self.plan.epoch), "an attempt is in force before it is written"
        assert (attempt.phase is Phase.WRITING) or attempt.waiting, "a roll-out waits for nobody"
        assert {engine for engine, _ in attempt.absent}.isdisjoint(attempt.waiting) or attempt.phase is Phase.RETIRING
        assert attempt.absent.keys() <= {copy_of(p) for p in attempt.begin.placements}

    def _begin(self, begin: Begin) -> list[Instruction]:
        assert self.phase is not Phase.WRITING, "a plan is begun before the last was written"
        ended = self._end() if self._attempt else []
        self.epoch += 1
        attempt = self._attempt = Attempt(self.epoch, begin, {}, set(), {})
        instructions: list[Instruction] = [*ended]
        for engine, versions in sorted(by_engine(begin.placements).items()):
            if engine not in self.engines:
                attempt.absent.update({(engine, version): "it is not ready" for version in versions})
                continue
            attempt.incarnations[engine] = self.engines[engine].incarnation
            attempt.waiting.add(engine)
            instructions.append(self._prepare(engine, attempt.epoch, versions, begin.adapters))
        self._tell(attempt.epoch, f"begun: {len(begin.placements)} copies on {len(attempt.waiting)} engines")
        return [*instructions, *self._write_when_prepared()]

    def _give_up(self, now: float) -> list[Instruction]:
        attempt = self._attempt
        if attempt is None or attempt.phase is not Phase.PREPARING:
            return []
        return [*self._end(), *self._retire_all(attempt.epoch, now)]

    def _answered(self, engine: str, incarnation: str, epoch: int, failed: Mapping[str, str]) -> list[Instruction]:
        for version, reason in failed.items():
            self._tell(epoch, f"{engine} did not prepare {version}: {reason}")
        attempt = self._attempt
        if attempt is None or not self.waits_for(engine, epoch, Phase.PREPARING):
            return []
        planned = {version for e, version in map(copy_of, attempt.begin.placements) if e == engine}
        attempt.absent.update({(engine, v): reason for v, reason in failed.items() if v in planned})
        attempt.incarnations[engine] = incarnation
        attempt.waiting.discard(engine)
        return self._write_when_prepared()

    def _silent(self, engine: str, reason: str) -> list[Instruction]:
        """Only what it was last seen to hold counts: where one copy found no room, the others are there all the same.

        Where it would be planned nowhere, what was not seen stays planned there as it does on an engine that was lost.
        """
        attempt = self._attempt
        assert attempt is not None, "nothing is under way"
        load = self.engines.get(engine)
        if load is None or load.incarnation != attempt.incarnations[engine]:
            return self._lose({engine: reason})
        held = pinned(load)
        planned = [copy_of(p) for p in attempt.begin.placements if p.engine == engine]
        attempt.absent.update({copy: reason for copy in planned if copy[1] not in held})
        attempt.waiting.discard(engine)
        attempt.silent.add(engine)
        self._left_out[engine] = load.incarnation
        return self._write_when_prepared()

    def _lose(self, reasons: Mapping[str, str]) -> list[Instruction]:
        """None of these engines' copies of this attempt is there any more."""
        attempt = self._attempt
        assert attempt is not None, "nothing is under way"
        for engine, reason in reasons.items():
            attempt.absent.update({copy_of(p): reason for p in attempt.begin.placements if p.engine == engine})
            attempt.waiting.discard(engine)
            self._left_out[engine] = attempt.incarnations.pop(engine)
        return self._write_when_prepared()

    def _write_when_prepared(self) -> list[Instruction]:
        attempt = self._attempt
        if attempt is None or attempt.phase is not Phase.PREPARING or attempt.waiting:
            return []
        begin = attempt.begin
        answered = attempt.incarnations.keys() - attempt.silent
        before = self.plan.placements
        copies = prepared(begin.placements, attempt.absent, before, self.engines, answered, begin.drained)
        drained = tuple(sorted(begin.drained))
        attempt.plan = Plan(epoch=attempt.epoch, created_unix_s=begin.unix_s, placements=copies, drained=drained)
        attempt.phase = Phase.WRITING
        return [Write(attempt.plan)]

    def _written(self, epoch: int, now: float) -> list[Instruction]:
        attempt = self._attempt
        assert attempt is not None, "a plan was written that nobody asked for"
        assert attempt.plan is not None
        assert attempt.epoch == epoch, f"epoch {epoch} was written, {attempt.epoch} was to be"
        self.plan, attempt.applied = attempt.plan, True
        self._tell(epoch, f"published: {len(self.plan.placements)} copies, {len(attempt.absent)} left out")
        return [Publish(self.plan), *self._begin_retiring(now)]

    def _write_failed(self, epoch: int, reason: str, now: float) -> list[Instruction]:
        attempt = self._attempt
        assert attempt is not None, "a plan was written that nobody asked for"
        attempt.refused = f"epoch {epoch} could not be written, epoch {self.plan.epoch} stays: {reason}"
        self._tell(epoch, attempt.refused)
        return self._begin_retiring(now)

    def _begin_retiring(self, now: float) -> list[Instruction]:
        attempt = self._attempt
        assert attempt is not None
        attempt.phase = Phase.RETIRING
        attempt.waiting = set(self.engines)
        retired = self._retire_all(attempt.epoch, now)
        return [*retired, *([] if attempt.waiting else self._end())]

    def _retire_ended(self, engine: str) -> list[Instruction]:
        attempt = self._attempt
        assert attempt is not None
        attempt.waiting.discard(engine)
        return [] if attempt.waiting else self._end()

    def _end(self) -> list[Instruction]:
        attempt = self._attempt
        assert attempt is not None
        if attempt.phase is Phase.PREPARING:
            attempt.refused = f"epoch {attempt.epoch} was given up for a newer plan"
        self._attempt = None
        self._tell(attempt.epoch, "in force" if attempt.applied else f"came to nothing: {attempt.refused}")
        return [Ended(attempt.epoch, attempt.applied, attempt.failed)]

    def _seen(
        self, engines: tuple[EngineLoad, ...], adapters: Mapping[str, AdapterRef], now: float
    ) -> list[Instruction]:
        self.engines = {load.engine: load for load in engines}
        self.epoch = max([self.epoch, *(load.plan_epoch for load in engines)])
        match self.phase:
            case Phase.PREPARING:
                return self._notice_lost()
            case Phase.RETIRING:
                return [i for engine in self._gone() for i in self._retire_ended(engine)]
            case _:
                return [*self._hold_to_plan(adapters, now), *self._notice_back()]

    def _gone(self) -> list[str]:
        return sorted(self._attempt.waiting - self.engines.keys()) if self._attempt else []

    def _notice_lost(self) -> list[Instruction]:
        assert self._attempt is not None
        now = {engine: load.incarnation for engine, load in self.engines.items()}
        lost = [engine for engine, was in self._attempt.incarnations.items() if now.get(engine) != was]
        return self._lose(dict.fromkeys(lost, "it was lost while the plan was being prepared"))

    def _notice_back(self) -> list[Instruction]:
        back = [e for e, lost in self._left_out.items() if e in self.engines and self.engines[e].incarnation != lost]
        for engine in back:
            del self._left_out[engine]
        return [Replan(engine) for engine in back]

    def _hold_to_plan(self, adapters: Mapping[str, AdapterRef], now: float) -> list[Instruction]:
        """Engines that do not hold what is published: ask for what is missing, retire what is too much."""
        if not self.plan.epoch:
            return []  # What engines hold then is all that is known of the plan that was.
        instructions: list[Instruction] = []
        planned = by_engine(self.plan.placements)
        for engine, load in sorted(self.engines.items()):
            wanted, held = planned.get(engine, set()), pinned(load)
            unfinished = load.plan_epoch > self.plan.epoch and engine not in self._retired
            if (held - wanted or unfinished) and due(self._retired, load, now):
                instructions.append(self._retire(engine, self.epoch, now))
            if (wanted - held) & adapters.keys() and due(self._asked, load, now):
                instructions.append(self._prepare(engine, self.epoch, wanted, adapters))
        return instructions

    def _prepare(self, engine: str, epoch: int, versions: set[str], adapters: Mapping[str, AdapterRef]) -> Prepare:
        self._asked[engine] = Asked(self.engines[engine].incarnation, epoch, inf)
        return Prepare(engine, epoch, tuple(adapters[v] for v in sorted(versions) if v in adapters))

    def _retire_all(self, epoch: int, now: float) -> list[Instruction]:
        return [self._retire(engine, epoch, now) for engine in sorted(self.engines)]

    def _retire(self, engine: str, epoch: int, now: float) -> Retire:
        self._retired[engine] = Asked(self.engines[engine].incarnation, epoch, now)
        return Retire(engine, epoch, tuple(sorted(by_engine(self.plan.placements).get(engine, ()))))

    def _note_end(self, engine: str, epoch: int, now: float) -> None:
        asked = self._asked.get(engine)
        if asked is not None and asked.epoch == epoch:
            self._asked[engine] = msgspec.structs.replace(asked, ended_s=now)

    def _tell(self, epoch: int, text: str) -> None:
        self._lines.append((epoch, text))
