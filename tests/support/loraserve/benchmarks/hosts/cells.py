"""The faults between virtual hosts, one cell each, and how a cell is run under steady streams of known text.

``run_cells`` yields a result for each cell. A cell disturbs the network or the processes of some hosts for a while,
then restores them. It holds if no text was wrong, no stream failed and none was refused while an engine was reachable.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import aiohttp
import msgspec

from loraserve.benchmarks.hosts.cluster import (
    CONTROL,
    ENGINE_HOSTS,
    FRONT,
    HOST_OF,
    LAYOUT,
    MODEL,
    STORE,
    HostCluster,
    host_cluster,
)
from loraserve.benchmarks.hosts.network import CUT
from loraserve.benchmarks.hosts.switch import Rule
from loraserve.benchmarks.hosts.traffic import (
    POLL_S,
    Counts,
    Question,
    Traffic,
    ask,
    cluster_state,
    count_migrations,
    is_usable,
    learn_answers,
    wait_ready,
)
from loraserve.errors import LoraServeError

STREAMS = 6
ENGINES = tuple(name for name in HOST_OF if name.startswith("engine-"))
WARM_S, AFTER_S = 1.5, 2.0
RECOVERY_TIMEOUT_S = 90.0
FRESH_S = 2.0
"""A view of the cluster that is older than this is the one from before the fault."""
SHORT_S, LONG_S, LOSSY_S = 3.0, 12.0, 10.0
PROMPTS = ("hello world", "and the thing", "the world and")
OUTPUT_TOKENS = (200, 600, 400)
CHANGED = Question("old", PROMPTS[0], 200)
AS_CHANGED = Question("new", PROMPTS[0], 200)
CHECKS = 8

VICTIM, OTHER = ENGINE_HOSTS[0], ENGINE_HOSTS[1]
SERVICES = (FRONT, CONTROL, STORE)
Known = Mapping[Question, str]


class Stage(msgspec.Struct, frozen=True):
    """What a cell acts on."""

    cluster: HostCluster
    http: aiohttp.ClientSession
    known: Known

    def cut(self, one: Sequence[str], other: Sequence[str]) -> None:
        self.cluster.network.set_rules_between(one, other, CUT)

    def spoil(self, host: str, rule: Rule) -> None:
        """Set the rule of everything that the host sends and receives."""
        self.cluster.network.set_rules_between([host], others(host), rule)


Action = Callable[[Stage], Awaitable[None]]


class Cell(msgspec.Struct, frozen=True):
    """A fault: ``begin`` disturbs the cluster, and ``end`` follows after ``hold_s``, before the network is healed.

    ``check`` runs after the recovery and returns descriptions of wrong texts. ``may_refuse``: no engine can be reached
    during the fault, so new requests may be refused with 503 and Retry-After.
    """

    name: str
    hold_s: float
    begin: Action
    end: Action | None = None
    check: Callable[[Stage], Awaitable[list[str]]] | None = None
    may_refuse: bool = False


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a cell.

    ``migrations`` is how often the gateway moved a stream to another engine. ``recovery_s`` is the time from the end of
    the fault until every process is usable again; None if that takes longer than RECOVERY_TIMEOUT_S.
    """

    cell: str
    counts: Counts
    migrations: int
    recovery_s: float | None
    packets_dropped: int
    may_refuse: bool
    ended: list[str]
    """Processes that ended by themselves."""

    def faults(self) -> list[str]:
        """Return descriptions of what must not happen; empty if the cell holds."""
        counts = self.counts
        found = [note for note in counts.notes if not (self.may_refuse and note.startswith("refused"))]
        found += self.ended
        if self.recovery_s is None:
            found.append(f"not all processes were usable {RECOVERY_TIMEOUT_S:.0f} s after the fault")
        if not counts.sent:
            found.append("no stream was sent")
        return found


def others(host: str) -> list[str]:
    return [name for name in LAYOUT if name != host]


async def run_cells(folder: Path, names: Sequence[str] = (), seed: int = 0) -> AsyncIterator[CellResult]:
    """Start a cluster on virtual hosts, and yield the result of each cell, or only of those with the given names.

    Raises LoraServeError if the cluster does not start, OSError without the privileges (``network.unusable_reason``).
    """
    cells = [CELLS[name] for name in names] if names else list(CELLS.values())
    with host_cluster(folder, seed) as cluster:
        known = await prepare(cluster)
        for cell in cells:
            yield await run_cell(cluster, known, cell)


async def prepare(cluster: HostCluster) -> Known:
    """Wait until the cluster is ready, and return the known answers. Raises LoraServeError if it does not start."""
    async with cluster.session() as http:
        try:
            await wait_ready(http, ENGINES)
        except LoraServeError as error:
            raise LoraServeError(f"the cluster did not start: {error}\n{cluster.log_tails()}") from error
        return await learn_answers(http, questions())


def questions() -> list[Question]:
    """Return the questions of the steady streams, and those with which a cell checks a changed adapter."""
    steady = [
        Question(model, prompt, tokens)
        for model in (MODEL, "alpha", "beta")
        for prompt, tokens in zip(PROMPTS, OUTPUT_TOKENS, strict=True)
    ]
    return [*steady, CHANGED, AS_CHANGED]


async def run_cell(cluster: HostCluster, known: Known, cell: Cell) -> CellResult:
    """Run one cell, and leave the cluster as it was before."""
    async with cluster.session() as http:
        stage = Stage(cluster, http, known)
        before = cluster.network.heal()["dropped"], await count_migrations(http), len(cluster.ended)
        counts, over = Counts(), asyncio.Event()
        steady = {question: text for question, text in known.items() if question not in (CHANGED, AS_CHANGED)}
        traffic = asyncio.create_task(Traffic(http, steady, STREAMS, counts).run(over))
        await asyncio.sleep(WARM_S)
        await cell.begin(stage)
        await asyncio.sleep(cell.hold_s)
        if cell.end is not None:
            await cell.end(stage)
        dropped = cluster.network.heal()["dropped"] - before[0]
        recovery_s = await wait_recovered(stage)
        await asyncio.sleep(AFTER_S)
        over.set()
        await traffic
        if cell.check is not None:
            for fault in await cell.check(stage):
                counts.corrupted += 1
                counts.notes.append(fault)
        cluster.note_ended()
        migrations = await count_migrations(http) - before[1]
    return CellResult(
        cell=cell.name,
        counts=counts,
        migrations=migrations,
        recovery_s=recovery_s,
        packets_dropped=dropped,
        may_refuse=cell.may_refuse,
        ended=cluster.ended[before[2] :],
    )


async def wait_recovered(stage: Stage) -> float | None:
    """Return after how many seconds the gateway reached every process and saw every engine; None if it did not."""
    began_s = time.monotonic()
    while time.monotonic() < began_s + RECOVERY_TIMEOUT_S:
        state = await cluster_state(stage.http)
        if state is not None:
            engines = [engine["name"] for engine in state["engines"] if is_usable(engine)]
            reached = all(process["state"] == "READY" for process in state["processes"].values())
            fresh = state["load_age_s"] is not None and state["load_age_s"] < FRESH_S
            if reached and fresh and set(ENGINES) <= set(engines):
                return time.monotonic() - began_s
        await asyncio.sleep(POLL_S)
    return None


def cut_off(one: Sequence[str], other: Sequence[str]) -> Action:
    async def begin(stage: Stage) -> None:
        stage.cut(one, other)

    return begin


def lose_from(sources: Sequence[str], targets: Sequence[str]) -> Action:
    """Lose packets in one direction only."""

    async def begin(stage: Stage) -> None:
        stage.cluster.network.set_rule(sources, targets, CUT)

    return begin


def spoil(host: str, rule: Rule) -> Action:
    async def begin(stage: Stage) -> None:
        stage.spoil(host, rule)

    return begin


async def nothing(stage: Stage) -> None:
    """Disturb nothing: the figures to compare the others with."""


async def vanish(stage: Stage) -> None:
    """End a host as a power cut does: its peers receive no packet that says so."""
    stage.cut([VICTIM], others(VICTIM))
    for name in LAYOUT[VICTIM]:
        stage.cluster.kill(name)


async def reappear(stage: Stage) -> None:
    stage.cluster.network.heal()
    stage.cluster.start(*LAYOUT[VICTIM])


async def stop_while_cut(stage: Stage) -> None:
    """Stop an engine on a host that is cut off, and replace an adapter that it holds meanwhile."""
    for _ in range(CHECKS):
        await ask(stage.http, CHANGED)
    stage.cut([VICTIM], others(VICTIM))
    for name in LAYOUT[VICTIM]:
        stage.cluster.send(name, signal.SIGSTOP)
    await register(stage, "old", "new")


async def resume(stage: Stage) -> None:
    stage.cluster.network.heal()
    for name in LAYOUT[VICTIM]:
        stage.cluster.send(name, signal.SIGCONT)


async def replace_while_apart(stage: Stage) -> None:
    """Cut the engine hosts from each other, and make both load an adapter that one would read from the other."""
    stage.cut([VICTIM], [OTHER])
    await register(stage, "old", "new")


async def check_replaced(stage: Stage) -> list[str]:
    """Check that no engine computes with the old version of the adapter, then restore it."""
    answers = await asyncio.gather(*(ask(stage.http, CHANGED) for _ in range(CHECKS)))
    await register(stage, "old", "old")
    expected = stage.known[AS_CHANGED]
    return [f"after the replacement of old: {a.text!r} {a.error}" for a in answers if a.text != expected]


async def register(stage: Stage, name: str, weights: str) -> None:
    """Register the adapter directory ``weights`` as ``name``. Raises LoraServeError if the gateway refuses it."""
    body = {"lora_name": name, "lora_path": str(stage.cluster.adapters[weights]), "load_inplace": True}
    async with stage.http.post("/v1/load_lora_adapter", json=body) as response:
        if response.status != 200:
            raise LoraServeError(f"adapter {name} was not registered: {await response.text()}")


CELLS: Mapping[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("undisturbed", SHORT_S, nothing),
        Cell("engine host cut off, 3 s", SHORT_S, cut_off([VICTIM], others(VICTIM))),
        Cell("engine host cut off, 12 s", LONG_S, cut_off([VICTIM], others(VICTIM))),
        Cell("packets from engine host lost, 3 s", SHORT_S, lose_from([VICTIM], others(VICTIM))),
        Cell("packets from engine host lost, 12 s", LONG_S, lose_from([VICTIM], others(VICTIM))),
        Cell("packets to engine host lost, 3 s", SHORT_S, lose_from(others(VICTIM), [VICTIM])),
        Cell("packets to engine host lost, 12 s", LONG_S, lose_from(others(VICTIM), [VICTIM])),
        Cell("engine hosts cut from each other, 12 s", LONG_S, replace_while_apart, check=check_replaced),
        Cell("engine host with 5% loss", LOSSY_S, spoil(VICTIM, Rule(loss=0.05))),
        Cell("engine host with 200 ms delay", LOSSY_S, spoil(VICTIM, Rule(delay_s=0.2))),
        Cell("engine host with 5% loss, 200 ms delay", LOSSY_S, spoil(VICTIM, Rule(loss=0.05, delay_s=0.2))),
        Cell("engine host vanishes, returns after 12 s", LONG_S, vanish, reappear),
        Cell("engine stopped while cut off, adapter replaced", LONG_S, stop_while_cut, resume, check_replaced),
        Cell("store host cut off, 12 s", LONG_S, cut_off([STORE], others(STORE))),
        Cell("gateway host cut from monitor, 12 s", LONG_S, cut_off([FRONT], [CONTROL])),
        Cell("gateway host cut from one engine host, 12 s", LONG_S, cut_off([FRONT], [VICTIM])),
        Cell("monitor host cut from engine hosts, 12 s", LONG_S, cut_off([CONTROL], ENGINE_HOSTS)),
        Cell("both engine hosts cut off, 5 s", 5.0, cut_off(ENGINE_HOSTS, SERVICES), may_refuse=True),
    )
}
