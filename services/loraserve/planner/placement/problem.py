"""The input of a placement policy, and its conversion to arrays.

Utilisation in this package is a fraction of one engine's time. Adapters are numbered in order of (name, version), and
engines in order of name, so that a plan does not depend on the order of the input. Variables ``a`` are numbers of
adapters, and variables ``e`` are numbers of engines.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from math import fsum

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterDemand, AdapterRef, EngineCapabilities, Placement

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
CopyMap = list[tuple[int, ...]]
"""By adapter, the sorted numbers of the engines that hold a copy."""

POOL_FRACTION = 0.9
"""Fraction of a pool that a plan may pin. The rest serves adapters loaded on demand and fragmentation."""
IDLE_RPS = 1e-6
"""Assumed requests/s of every adapter as long as there is no demand at all."""
VALID_RATES = 1e-9, 1e9
"""Range of valid rates. Other reported rates and NaN count as 0, so that sums and quotients stay finite."""
DEFAULT_REQUEST_TOKENS = 500.0
"""Assumed tokens per request before any request was measured."""


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Constraints on a plan from the configuration and the operator.

    ``pins``: by adapter name, the engines that hold its copies regardless of demand. ``drained``: engines that get no
    copies. ``interval_s``: time until the next plan, in which the gain of a move must exceed its cost.
    """

    min_copies: int = 1
    slo_ttft_s: float = 10.0
    interval_s: float = 30.0
    pins: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    drained: frozenset[str] = frozenset()


class PlanInput(msgspec.Struct, frozen=True, kw_only=True):
    """The input of a placement policy.

    ``adapters``: the registered adapters, by version. ``engines``: all ready engines, including drained engines.
    ``current``: the placement in force.
    """

    demand: Sequence[AdapterDemand]
    adapters: Mapping[str, AdapterRef]
    engines: Sequence[EngineCapabilities]
    current: Sequence[Placement] = ()
    cost: CostModel
    settings: PlanSettings


PlacementPolicy = Callable[[PlanInput], tuple[Placement, ...]]
"""Returns the copies that should exist, in order of (name, version, engine). Deterministic, no I/O."""


class CopyShares(msgspec.Struct, frozen=True, eq=False):
    """Copies as parallel arrays. Entry i is one copy: adapter, engine and share of the adapter's traffic."""

    adapters: Ints
    engines: Ints
    shares: Floats


class AdapterWork(msgspec.Struct, frozen=True, eq=False):
    """The utilisation that each adapter's traffic causes, by adapter.

    The utilisation is ``base`` + r * ``slope``, where r is the largest rank on the engine. ``prefill_base`` and
    ``prefill_slope`` are the parts of ``base`` and ``slope`` that prefill causes. ``slab_read`` is the time in seconds
    to read the slab once (0 with padded cost). A step reads a slab once for all sequences that use it.
    """

    base: Floats
    slope: Floats
    prefill_base: Floats
    prefill_slope: Floats
    slab_read: Floats
    decode_tokens_per_s: Floats
    requests_per_s: Floats
    tokens_per_s: Floats


class Problem(msgspec.Struct, frozen=True, eq=False):
    """A PlanInput as arrays. ``refs``: the adapters in the order of their numbers.

    ``room_bytes``: by engine, the pool bytes that the plan may pin. ``single``: by engine, the tuple ``(engine,)``,
    shared by all adapters whose only copy is there. ``pins``: by adapter, the available engines that it is pinned to.
    ``no_demand``: no request was measured or forecast, so ``work`` assumes ``IDLE_RPS``. ``batch``: sequences that an
    engine can decode at once. ``steps_per_s``: decode steps/s of an engine at half of that batch.
    """

    refs: list[AdapterRef]
    ranks: Ints
    slab_bytes: Floats
    extents: Ints
    engines: list[str]
    room_bytes: Ints
    single: list[tuple[int, ...]]
    current: CopyMap
    pins: dict[int, tuple[int, ...]]
    work: AdapterWork
    no_demand: bool
    batch: float
    steps_per_s: float
    cost: CostModel
    settings: PlanSettings

    @property
    def padded(self) -> bool:
        """Return whether every token of a batch costs as much as a token of the largest rank in the batch."""
        return self.cost.lora == "padded"

    def adapter_index(self) -> dict[str, int]:
        return {ref.version: i for i, ref in enumerate(self.refs)}

    def engine_index(self) -> dict[str, int]:
        return {engine: i for i, engine in enumerate(self.engines)}

    def own_utilisation(self) -> Floats:
        """Return the utilisation that each adapter causes on an engine with no higher rank."""
        return self.work.base + self.ranks * self.work.slope


def build_problem(inputs: PlanInput) -> Problem:
    """Convert the input to arrays. Drained engines and their copies are left out."""
    settings, cost = inputs.settings, inputs.cost
    engines = sorted((e for e in inputs.engines if e.engine not in settings.drained), key=lambda e: e.engine)
    engine_index = {e.engine: i for i, e in enumerate(engines)}
    refs = sorted(inputs.adapters.values(), key=lambda ref: (ref.name, ref.version))
    index = {ref.version: i for i, ref in enumerate(refs)}
    rates = _expect_rates(inputs.demand, index, len(engines))
    no_demand = not rates.requests.any()
    if no_demand:
        rates = _idle_rates(len(index))
    batch = _decode_batch(engines, rates)
    single: list[tuple[int, ...]] = [(e,) for e in range(len(engines))]
    step_s = max(1e-6, cost.step_base_s + batch / 2 * cost.sequence_s)
    return Problem(
        refs=refs,
        ranks=np.fromiter((ref.rank for ref in refs), np.int64, len(refs)),
        slab_bytes=np.fromiter((ref.slab_bytes for ref in refs), np.float64, len(refs)),
        extents=_extents(refs),
        engines=[e.engine for e in engines],
        room_bytes=np.array([int(e.pool_bytes * POOL_FRACTION) for e in engines], np.int64),
        single=single,
        current=_current_copies(inputs.current, index, engine_index, single),
        pins=_live_pins(refs, engine_index, settings.pins),
        work=_adapter_work(rates, refs, cost, batch, 1 / step_s),
        no_demand=no_demand,
        batch=batch,
        steps_per_s=1 / step_s,
        cost=cost,
        settings=settings,
    )


def to_placements(problem: Problem, copies: CopyShares) -> tuple[Placement, ...]:
    """Convert the copies to messages, without changing their order."""
    refs, names = problem.refs, problem.engines
    return tuple(
        Placement(version=refs[a].version, name=refs[a].name, engine=names[e], share=share)
        for a, e, share in zip(copies.adapters.tolist(), copies.engines.tolist(), copies.shares.tolist(), strict=True)
    )


def flatten(copies: CopyMap) -> tuple[Ints, Ints, Ints]:
    """Return the adapter of each copy, the engine of each copy, and the number of copies of each adapter."""
    counts = np.fromiter(map(len, copies), np.int64, len(copies))
    engines = np.fromiter(chain.from_iterable(copies), np.int64, int(counts.sum()))
    return np.repeat(np.arange(len(copies)), counts), engines, counts


def reads_per_s(decode_tokens_per_s: Floats, steps_per_s: float) -> Floats:
    """Return by adapter the decode steps/s that include a sequence of the adapter, for Poisson arrivals."""
    return steps_per_s * -np.expm1(-decode_tokens_per_s / steps_per_s)


def _extents(refs: Sequence[AdapterRef]) -> Ints:
    sizes = {ref.slab_bytes for ref in refs}
    extents = {size: extent_bytes(size) for size in sizes}
    return np.fromiter((extents[ref.slab_bytes] for ref in refs), np.int64, len(refs))


class _ExpectedRates(msgspec.Struct, eq=False):
    """Expected prefill tokens/s, decode tokens/s and requests/s, by adapter."""

    prefill: Floats
    decode: Floats
    requests: Floats


def _expect_rates(demand: Sequence[AdapterDemand], index: Mapping[str, int], engines: int) -> _ExpectedRates:
    """Return the forecast rates plus a margin for errors, split into prefill, decode and requests as measured."""
    known = {index[d.version]: d for d in demand if d.version in index}
    count = len(known)
    adapters, entries = np.fromiter(known, np.int64, count), known.values()
    prefill = _valid_rates(d.prefill_tokens_per_s for d in entries)
    decode = _valid_rates(d.decode_tokens_per_s for d in entries)
    requests = _valid_rates(d.requests_per_s for d in entries)
    forecast = _valid_rates(d.forecast_tokens_per_s for d in entries)
    std = _valid_rates(d.forecast_std_tokens_per_s for d in entries)
    measured = prefill + decode
    decode = _requested_decode(decode, requests)
    seen = prefill + decode
    # The forecast predicts computed tokens. Only its ratio to the measured rate applies to requested tokens.
    change = np.divide(forecast, measured, out=np.ones(count), where=(measured > 0) & (forecast > 0))
    expected = np.where(measured > 0, seen * change, forecast) + _margin(std, engines)
    unseen = (seen <= 0) & (expected > 0)
    # An adapter without measured traffic gets the mean mix of the others. If there is none, all its tokens are decode.
    prefill_part = prefill.sum() / seen.sum() if seen.sum() > 0 else 0.0
    request_tokens = seen.sum() / requests.sum() if requests.sum() > 0 and seen.sum() > 0 else DEFAULT_REQUEST_TOKENS
    growth = np.divide(expected, seen, out=np.zeros(count), where=seen > 0)
    result = _ExpectedRates(*(np.zeros(len(index)) for _ in range(3)))
    result.prefill[adapters] = np.where(unseen, expected * prefill_part, prefill * growth)
    result.decode[adapters] = np.where(unseen, expected * (1 - prefill_part), decode * growth)
    result.requests[adapters] = np.where(~unseen & (requests > 0), requests * growth, expected / request_tokens)
    return result


def _valid_rates(rates: Iterable[float]) -> Floats:
    values = np.fromiter(rates, np.float64)
    return np.where((values >= VALID_RATES[0]) & (values <= VALID_RATES[1]), values, 0.0)


def _requested_decode(decode: Floats, requests: Floats) -> Floats:
    """Return the estimated decode tokens/s that requests need, scaled to the sum of the measured ``decode``.

    An overloaded engine decodes fewer tokens than its requests need. A plan based on measured tokens would give it even
    more traffic. Before scaling, an estimate is therefore at least the adapter's requests/s * mean output length.
    """
    total = fsum(decode)
    if total <= 0 or not requests.any():
        return decode
    requested = np.maximum(decode, requests * (total / fsum(requests)))
    result: Floats = requested * (total / fsum(requested))
    return result


def _idle_rates(adapters: int) -> _ExpectedRates:
    """Return equal and negligible rates for all adapters, so that even a plan without demand separates ranks."""
    tokens = np.full(adapters, IDLE_RPS * DEFAULT_REQUEST_TOKENS / 2)
    return _ExpectedRates(tokens, tokens, np.full(adapters, IDLE_RPS))


def _margin(std: Floats, engines: int) -> Floats:
    """Return by adapter the tokens/s to reserve for forecast errors, at most ``std``.

    Margins on an engine add up to about one standard deviation of its traffic. Errors of many small adapters cancel
    out, while the error of an adapter that fills an engine does not.
    """
    variance = std * std
    pooled = np.sqrt(variance.sum() / max(1, engines))
    return np.minimum(std, variance / pooled) if pooled > 0 else std


def _decode_batch(engines: Sequence[EngineCapabilities], rates: _ExpectedRates) -> float:
    """Return how many sequences of mean context length the median engine can run (``max_running``, KV memory)."""
    if not engines:
        return 1.0
    requests = rates.requests.sum()
    context = (rates.prefill.sum() + rates.decode.sum() / 2) / requests if requests > 0 else DEFAULT_REQUEST_TOKENS
    fits = [min(e.max_running, e.kv_blocks * e.block_tokens / max(1.0, context)) for e in engines]
    return max(1.0, float(np.median(fits)))


def _adapter_work(
    rates: _ExpectedRates, refs: Sequence[AdapterRef], cost: CostModel, batch: float, steps_per_s: float
) -> AdapterWork:
    """Return the utilisation that the expected traffic causes.

    The fixed cost of a step is divided by the size of a full batch, because batches are full when engines are busy.
    """
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
    return AdapterWork(
        base=prefill + decode,
        slope=slope,
        prefill_base=prefill,
        prefill_slope=prefill_slope,
        slab_read=slab_read,
        decode_tokens_per_s=rates.decode,
        requests_per_s=rates.requests,
        tokens_per_s=rates.prefill + rates.decode,
    )


def _current_copies(
    current: Sequence[Placement], index: Mapping[str, int], engines: Mapping[str, int], single: list[tuple[int, ...]]
) -> CopyMap:
    copies: CopyMap = [()] * len(index)
    for placement in current:
        adapter, engine = index.get(placement.version), engines.get(placement.engine)
        if adapter is not None and engine is not None and engine not in copies[adapter]:
            held = copies[adapter]
            copies[adapter] = tuple(sorted((*held, engine))) if held else single[engine]
    return copies


def _live_pins(
    refs: Sequence[AdapterRef], engines: Mapping[str, int], pins: Mapping[str, tuple[str, ...]]
) -> dict[int, tuple[int, ...]]:
    """Return the pins to available engines. An adapter whose pinned engines are all unavailable counts as unpinned."""
    if not pins:
        return {}
    live = {
        a: tuple(sorted({engines[e] for e in pins.get(ref.name, ()) if e in engines})) for a, ref in enumerate(refs)
    }
    return {a: held for a, held in live.items() if held}
