"""What the planner is told beside demand and load. Plain data."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import fsum

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Placement


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``pins``: adapter name to the engines its copies are on, whatever is asked for. ``drained``: engines that are to
    end empty. ``interval_s``: until the next plan, the time over which a move has to pay."""

    min_copies: int = 1
    slo_ttft_s: float = 10.0
    interval_s: float = 30.0
    pins: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    drained: frozenset[str] = frozenset()


Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Copies = list[tuple[int, ...]]
"""By adapter, the engines that hold it, in order."""

POOL_FRACTION = 0.9
"""Of a pool that the plan may pin; the rest is for adapters that come on demand, and for holes between pins."""
NEXT_TO_NOTHING = 1e-6
"""Requests a second."""
RATES = 1e-9, 1e9
"""A second. What is told beyond them, or is no number, counts as nothing: with it no sum or quotient would be one."""
USUAL_TOKENS = 500.0
"""Of a request, where nothing was seen of any: only what is forecast without having been seen needs it."""


class Pieces(msgspec.Struct, frozen=True, eq=False):
    """Copies with their shares of the adapter's traffic, one an entry."""

    adapters: Ints
    engines: Ints
    shares: Floats


class Work(msgspec.Struct, frozen=True, eq=False):
    """By adapter: ``base`` and, per unit of the engine's largest rank, ``slope``; of both, the part before the first
    token (``prefill_base``, ``prefill_slope``); its share that grows less than traffic does because a slab is read once
    a step (``slab_read``: of one read); ``decode_tokens_per_s``, ``requests_per_s`` and all ``tokens_per_s``."""

    base: Floats
    slope: Floats
    prefill_base: Floats
    prefill_slope: Floats
    slab_read: Floats
    decode_tokens_per_s: Floats
    requests_per_s: Floats
    tokens_per_s: Floats


class Problem(msgspec.Struct, frozen=True, eq=False):
    """``room_bytes``: of each engine, what the plan may use. ``alone``: by engine, the copies of an adapter that has
    one there: tuples that all such adapters share. ``pins``: adapter to the engines it is pinned to that are there.
    ``quiet``: nothing is asked for, and ``work`` is a guess. ``batch``: sequences that an engine can decode at once.
    ``steps_per_s``: of an engine at half of that."""

    versions: list[str]
    refs: list[AdapterRef]
    ranks: Ints
    slab_bytes: Floats
    extents: Ints
    engines: list[str]
    room_bytes: Ints
    alone: list[tuple[int, ...]]
    current: Copies
    pins: dict[int, tuple[int, ...]]
    work: Work
    quiet: bool
    batch: float
    steps_per_s: float
    cost: CostModel
    settings: PlanSettings

    @property
    def padded(self) -> bool:
        return self.cost.lora == "padded"

    def index(self) -> dict[str, int]:
        """Adapters by version."""
        return {version: i for i, version in enumerate(self.versions)}

    def engine_index(self) -> dict[str, int]:
        return {engine: i for i, engine in enumerate(self.engines)}

    def whole(self) -> Floats:
        """Work of each adapter on an engine where no rank is larger than its own."""
        return self.work.base + self.ranks * self.work.slope


def problem_of(
    demand: Sequence[AdapterDemand],
    adapters: Mapping[str, AdapterRef],
    engines: Sequence[EngineLoad],
    current: Sequence[Placement],
    cost: CostModel,
    settings: PlanSettings,
) -> Problem:
    """Engines that are drained are not there; what is planned on them now is not either."""
    loads = sorted((e for e in engines if e.engine not in settings.drained), key=lambda e: e.engine)
    engine_index = {load.engine: i for i, load in enumerate(loads)}
    refs = sorted(adapters.values(), key=lambda ref: (ref.name, ref.version))
    versions = [ref.version for ref in refs]
    index = {version: i for i, version in enumerate(versions)}
    rates = _rates(demand, index, len(loads))
    quiet = not rates.requests.any()
    if quiet:
        rates = _nothing_known(len(index))
    batch = _batch(loads, rates)
    alone: list[tuple[int, ...]] = [(e,) for e in range(len(loads))]
    step_s = max(1e-6, cost.step_base_s + batch / 2 * cost.sequence_s)
    return Problem(
        versions=versions,
        refs=refs,
        ranks=np.fromiter((ref.rank for ref in refs), np.int64, len(refs)),
        slab_bytes=np.fromiter((ref.slab_bytes for ref in refs), np.float64, len(refs)),
        extents=_extents(refs),
        engines=[load.engine for load in loads],
        room_bytes=np.array([int(load.pool_total_bytes * POOL_FRACTION) for load in loads], np.int64),
        alone=alone,
        current=_copies(current, index, engine_index, alone),
        pins=_pins(refs, engine_index, settings.pins),
        work=_work(rates, refs, cost, batch, 1 / step_s),
        quiet=quiet,
        batch=batch,
        steps_per_s=1 / step_s,
        cost=cost,
        settings=settings,
    )


def placements(problem: Problem, pieces: Pieces) -> tuple[Placement, ...]:
    """In order of names, versions, engines."""
    refs, names = problem.refs, problem.engines
    return tuple(
        Placement(version=refs[a].version, name=refs[a].name, engine=names[e], share=share)
        for a, e, share in zip(pieces.adapters.tolist(), pieces.engines.tolist(), pieces.shares.tolist(), strict=True)
    )


def flat(copies: Copies) -> tuple[Ints, Ints, Ints]:
    """One entry a copy: its adapter and its engine; and by adapter the number of copies."""
    counts = np.fromiter(map(len, copies), np.int64, len(copies))
    engines = np.fromiter(chain.from_iterable(copies), np.int64, int(counts.sum()))
    return np.repeat(np.arange(len(copies)), counts), engines, counts


def _extents(refs: Sequence[AdapterRef]) -> Ints:
    sizes = {ref.slab_bytes for ref in refs}
    extents = {size: extent_bytes(size) for size in sizes}
    return np.fromiter((extents[ref.slab_bytes] for ref in refs), np.int64, len(refs))


class _Rates(msgspec.Struct, eq=False):
    """What is expected of each adapter, a second."""

    prefill: Floats
    decode: Floats
    requests: Floats


def _rates(demand: Sequence[AdapterDemand], index: Mapping[str, int], engines: int) -> _Rates:
    """The forecast and a margin for how wrong it has been, split into prefill, decode and requests as was seen."""
    told = {index[d.version]: d for d in demand if d.version in index}
    count = len(told)
    at, asked = np.fromiter(told, np.int64, count), told.values()
    prefill = _told(d.prefill_tokens_per_s for d in asked)
    decode = _told(d.decode_tokens_per_s for d in asked)
    requests = _told(d.requests_per_s for d in asked)
    forecast = _told(d.forecast_tokens_per_s for d in asked)
    std = _told(d.forecast_std_tokens_per_s for d in asked)
    measured = prefill + decode
    decode = _asked_for(decode, requests)
    seen = prefill + decode
    # What is forecast is tokens that engines will compute: it says how that changes, from what is asked for now.
    change = np.divide(forecast, measured, out=np.ones(count), where=(measured > 0) & (forecast > 0))
    expected = np.where(measured > 0, seen * change, forecast) + _margin(std, engines)
    new = (seen <= 0) & (expected > 0)
    # What was never seen is taken to be like all the others together; without any, to be decoding.
    share = prefill.sum() / seen.sum() if seen.sum() > 0 else 0.0
    tokens = seen.sum() / requests.sum() if requests.sum() > 0 and seen.sum() > 0 else USUAL_TOKENS
    growth = np.divide(expected, seen, out=np.zeros(count), where=seen > 0)
    result = _Rates(*(np.zeros(len(index)) for _ in range(3)))
    result.prefill[at] = np.where(new, expected * share, prefill * growth)
    result.decode[at] = np.where(new, expected * (1 - share), decode * growth)
    known = ~new & (requests > 0)
    result.requests[at] = np.where(known, requests * growth, expected / tokens)
    return result


def _told(rates: Iterable[float]) -> Floats:
    told = np.fromiter(rates, np.float64)
    return np.where((told >= RATES[0]) & (told <= RATES[1]), told, 0.0)


def _asked_for(decode: Floats, requests: Floats) -> Floats:
    """Decode tokens/s as they are asked for, which in all are those that were computed.

    Who waits has not decoded yet, and an engine that is behind decodes less than it is asked for: planned by what it
    did it would be given more. Each adapter is taken to ask at least for its requests with the mean output.
    """
    total = fsum(decode)
    if total <= 0 or not requests.any():
        return decode
    asked = np.maximum(decode, requests * (total / fsum(requests)))
    result: Floats = asked * (total / fsum(asked))
    return result


def _nothing_known(adapters: int) -> _Rates:
    """Before anything was asked for all adapters are taken to be asked for alike, and for next to nothing: ranks are
    apart then from the beginning."""
    tokens = np.full(adapters, NEXT_TO_NOTHING * USUAL_TOKENS / 2)
    return _Rates(tokens, tokens, np.full(adapters, NEXT_TO_NOTHING))


def _margin(std: Floats, engines: int) -> Floats:
    """Tokens/s that an engine must have to spare for each adapter: one standard deviation of what the engine gets.

    Errors of many adapters even out on an engine; those of one that brings more than an engine's part do not.
    """
    variance = std * std
    pooled = np.sqrt(variance.sum() / max(1, engines))
    return np.minimum(std, variance / pooled) if pooled > 0 else std


def _batch(loads: Sequence[EngineLoad], rates: _Rates) -> float:
    """Sequences that an engine can decode at once, as its KV memory holds them."""
    if not loads:
        return 1.0
    requests = rates.requests.sum()
    context = (rates.prefill.sum() + rates.decode.sum() / 2) / requests if requests > 0 else USUAL_TOKENS
    fits = [min(e.max_running, e.kv_blocks_total * e.block_tokens / max(1.0, context)) for e in loads]
    return max(1.0, float(np.median(fits)))


def _work(rates: _Rates, refs: Sequence[AdapterRef], cost: CostModel, batch: float, steps_per_s: float) -> Work:
    """Linear in traffic. The steps' base is divided among a full batch: it is what is paid where time gets short."""
    requests = np.maximum(rates.requests, 1e-12)
    prompt, output = rates.prefill / requests, rates.decode / requests
    prefill = rates.prefill * (cost.prefill_token_s + prompt / 2 * cost.prefill_kv_token_s)
    token_s = cost.sequence_s + cost.step_base_s / batch + (prompt + output / 2) * cost.kv_token_s
    decode = rates.decode * token_s
    slope = prefill_slope = slab_read = np.zeros(len(refs))
    if cost.lora == "padded":
        prefill_slope = rates.prefill * cost.padded_prefill_s
        slope = prefill_slope + rates.decode * cost.padded_decode_s
    else:
        ranks = np.fromiter((ref.rank for ref in refs), np.float64, len(refs))
        slab_read = np.fromiter((ref.slab_bytes for ref in refs), np.float64, len(refs)) * cost.slab_byte_s
        prefill = prefill + rates.prefill * ranks * cost.rank_token_s + rates.requests * slab_read
        decode = decode + rates.decode * ranks * cost.rank_token_s
        decode = decode + slab_read * reads_per_s(rates.decode, steps_per_s)
    return Work(
        base=prefill + decode,
        slope=slope,
        prefill_base=prefill,
        prefill_slope=prefill_slope,
        slab_read=slab_read,
        decode_tokens_per_s=rates.decode,
        requests_per_s=rates.requests,
        tokens_per_s=rates.prefill + rates.decode,
    )


def reads_per_s(decode_tokens_per_s: Floats, steps_per_s: float) -> Floats:
    """Steps a second that hold at least one of an adapter's sequences, where these come independently (Poisson)."""
    return steps_per_s * -np.expm1(-decode_tokens_per_s / steps_per_s)


def _copies(
    current: Sequence[Placement],
    index: Mapping[str, int],
    engines: Mapping[str, int],
    alone: list[tuple[int, ...]],
) -> Copies:
    copies: Copies = [()] * len(index)
    for placement in current:
        adapter, engine = index.get(placement.version), engines.get(placement.engine)
        if adapter is not None and engine is not None and engine not in copies[adapter]:
            held = copies[adapter]
            copies[adapter] = tuple(sorted((*held, engine))) if held else alone[engine]
    return copies


def _pins(
    refs: Sequence[AdapterRef], engines: Mapping[str, int], pins: Mapping[str, tuple[str, ...]]
) -> dict[int, tuple[int, ...]]:
    """A pin to engines none of which is there is no pin: an adapter is never lost for it."""
    if not pins:
        return {}
    found = {
        a: tuple(sorted({engines[e] for e in pins.get(ref.name, ()) if e in engines})) for a, ref in enumerate(refs)
    }
    return {a: held for a, held in found.items() if held}
