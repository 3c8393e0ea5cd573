"""What happens in one run of the twin: requests and faults with their times, drawn from a seed. All plain data.

A schedule is a JSON value, so that a shrunk one can be printed and run again. Each fault has its own seed, so that
removing one fault leaves the others as they are.
"""

from collections.abc import Iterable
from random import Random

import msgspec

from loraserve.messages import SamplingParams
from loraserve.testing.twin.model import MAX_TOKENS, true_answer

START_S, END_S = 1.0, 4.0
"""Requests arrive and faults begin between these times, in virtual seconds."""
ADAPTERS = ("a", "b", "c", "d")
"""Registered before the run. A pool holds about two of them."""
ENGINES = ("engine-0", "engine-1", "engine-2")
OTHERS = ("gateway-0", "router", "monitor", "planner", "store")


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """A client's request. The client leaves after ``leaves_after_s`` if it is set."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    adapter: str = ""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    leaves_after_s: float | None = None

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
        )


class Register(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An operator registers an adapter, again until the store acknowledges it, and then asks for an answer with it."""

    at_s: float
    name: str


class Kill(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Kill -9, and a new start ``down_s`` later."""

    at_s: float
    process: str
    down_s: float


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """SIGTERM, and a new start ``down_s`` after the process ended."""

    at_s: float
    process: str
    down_s: float


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """SIGSTOP, and SIGCONT after ``for_s``."""

    at_s: float
    process: str
    for_s: float


class Disturb(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A share of the messages from one process to another is lost, sent twice, or delayed by up to ``delay_s``."""

    at_s: float
    for_s: float
    sender: str
    receiver: str
    kind: str
    share: float = 1.0
    delay_s: float = 0.0
    seed: int = 0


class Cut(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A partition: nothing passes from ``process`` to ``others``, and if ``both_ways`` nothing back."""

    at_s: float
    for_s: float
    process: str
    others: tuple[str, ...]
    both_ways: bool


class BadStore(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Reads of slabs take ``delay_s``, or fail."""

    at_s: float
    for_s: float
    delay_s: float = 0.0
    fails: bool = False


class StepClock(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The wall clock of a process jumps."""

    at_s: float
    process: str
    step_s: float


Fault = Kill | Stop | Pause | Disturb | Cut | BadStore | StepClock
Happening = Ask | Register | Fault


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    engines: int
    steps_ahead: int
    plan_interval_s: float = 3.0
    happenings: tuple[Happening, ...]

    @property
    def asks(self) -> tuple[Ask, ...]:
        return tuple(each for each in self.happenings if isinstance(each, Ask))

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(each for each in self.happenings if not isinstance(each, Ask | Register))

    def without(self, happening: Happening) -> "Schedule":
        left = tuple(each for each in self.happenings if each is not happening)
        return msgspec.structs.replace(self, happenings=left)

    def describe(self) -> str:
        """Return one line for each happening, for people."""
        lines = [f"  {each.at_s:6.3f} s  {each!r}" for each in self.happenings]
        return "\n".join([f"{self.engines} engines, {self.steps_ahead} steps ahead:", *lines])


def fault_end_s(fault: Fault) -> float:
    """Return when a fault has ended, apart from its consequences. A drain may take longer than a kill."""
    match fault:
        case Kill(at_s=at_s, down_s=down_s):
            return at_s + down_s
        case Stop(at_s=at_s, down_s=down_s):
            return at_s + 8.0 + down_s
        case StepClock(at_s=at_s):
            return at_s
        case _:
            return fault.at_s + fault.for_s


def draw_schedule(seed: int) -> Schedule:
    rng = Random(seed)
    engines = rng.choice((2, 2, 3))
    names = (*ENGINES[:engines], *OTHERS)
    prefix = tuple(rng.randrange(200) for _ in range(8))
    happenings: list[Happening] = [_draw_ask(rng, prefix) for _ in range(rng.choice((1, 2, 3, 3, 4, 6)))]
    if rng.random() < 0.15:
        happenings.append(Register(at_s=_time(rng), name=f"new-{rng.randrange(4)}"))
    happenings += [_draw_fault(rng, names, engines) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
    happenings.sort(key=lambda each: each.at_s)
    return Schedule(
        seed=seed,
        engines=engines,
        steps_ahead=rng.choice((0, 1)),
        plan_interval_s=rng.choice((2.0, 3.0, 30.0)),
        happenings=tuple(happenings),
    )


def _time(rng: Random) -> float:
    return round(rng.uniform(START_S, END_S), 3)


def _draw_ask(rng: Random, prefix: tuple[int, ...]) -> Ask:
    own = tuple(rng.randrange(200) for _ in range(rng.randint(1, 12)))
    prompt = (*prefix, *own) if rng.random() < 0.4 else own
    ask = Ask(
        at_s=_time(rng),
        prompt=prompt,
        max_tokens=rng.choice((1, 3, 6, 12, 24)),
        adapter=rng.choice(("", *ADAPTERS)),
        seed=rng.choice((0, rng.randrange(1 << 30))),
        leaves_after_s=round(rng.uniform(0.0, 0.6), 3) if rng.random() < 0.12 else None,
    )
    assert len(prompt) + ask.max_tokens <= MAX_TOKENS
    if rng.random() < 0.4:
        tokens = true_answer(ask.adapter, prompt, ask.sampling).tokens
        at = rng.randrange(len(tokens))
        least = rng.choice((0, 0, at))
        ask = msgspec.structs.replace(ask, stop_token_ids=(tokens[at],), min_tokens=least)
    return ask


def _draw_fault(rng: Random, names: tuple[str, ...], engines: int) -> Fault:
    at_s = _time(rng)
    engine = rng.choice(ENGINES[:engines])
    process = engine if rng.random() < 0.5 else rng.choice(names)
    match rng.choice(("kill", "kill", "pause", "pause", "stop", "disturb", "disturb", "cut", "store", "clock")):
        case "kill":
            return Kill(at_s=at_s, process=process, down_s=_length(rng, 0.05, 4.0))
        case "pause":
            return Pause(at_s=at_s, process=process, for_s=_length(rng, 0.1, 6.0))
        case "stop":
            return Stop(at_s=at_s, process=process, down_s=_length(rng, 0.05, 1.0))
        case "disturb":
            return _draw_disturbance(rng, at_s, process, names)
        case "cut":
            others = tuple(name for name in names if name != process)
            some = tuple(rng.sample(others, rng.randint(1, len(others))))
            both_ways = rng.random() < 0.5
            return Cut(at_s=at_s, for_s=_length(rng, 0.2, 5.0), process=process, others=some, both_ways=both_ways)
        case "store":
            for_s = _length(rng, 0.2, 2.5)
            if rng.random() < 0.5:
                return BadStore(at_s=at_s, for_s=for_s, fails=True)
            return BadStore(at_s=at_s, for_s=for_s, delay_s=_length(rng, 0.05, 2.0))
        case _:
            return StepClock(at_s=at_s, process=process, step_s=rng.choice((-3600.0, -5.0, 5.0, 3600.0)))


def _draw_disturbance(rng: Random, at_s: float, process: str, names: Iterable[str]) -> Disturb:
    other = rng.choice([name for name in names if name != process])
    sender, receiver = rng.choice(((process, other), (other, process), (process, "gateway-0")))
    if sender == receiver:
        sender, receiver = process, other
    kind = rng.choice(("lose", "double", "delay"))
    return Disturb(
        at_s=at_s,
        for_s=_length(rng, 0.2, 3.0),
        sender=sender,
        receiver=receiver,
        kind=kind,
        share=rng.choice((0.05, 0.3, 1.0)),
        delay_s=_length(rng, 0.001, 1.5) if kind == "delay" else 0.0,
        seed=rng.randrange(1 << 30),
    )


def _length(rng: Random, least: float, most: float) -> float:
    """Draw a length, short ones as likely as long ones in a logarithmic sense."""
    return round(least * float((most / least) ** rng.random()), 3)
