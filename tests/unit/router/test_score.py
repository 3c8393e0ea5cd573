"""Predictions and scores, against a plain computation engine by engine."""

from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple

from loraserve.cost import LARGEST_SURPRISE, CostModel, StepShape, extent_bytes
from loraserve.messages import AdapterRef, EngineSeen, Rejected, Route
from loraserve.router.context import Candidates, RoutingContext, Slo
from loraserve.router.policy import TIE_SHARE, route_by_prediction
from loraserve.router.prices import ENGINE_TIME_WEIGHT, FOLLOWER_WEIGHT, FULLNESS_WEIGHT, MAX_FULLNESS
from loraserve.router.score import LOAD_WEIGHT, PRIOR_STEPS, score
from loraserve.router.view import ClusterView
from loraserve.testing.reports import MIB, adapter_ref, engine_seen, picture, resident, route_request

PATIENT = Slo(ttft_s=1e6, reject_factor=1.0)
ADAPTERS = [adapter_ref(n, rank=rank, slab_bytes=rank * MIB // 4) for n, rank in enumerate((8, 8, 32, 128))]
COSTS = {"exact": CostModel(prefill_kv_token_s=1e-7), "padded": CostModel(lora="padded", prefill_kv_token_s=1e-7)}


def flat(seen: EngineSeen) -> SimpleNamespace:
    """Return all fields of the engine's load and capabilities side by side."""
    load, speed = seen.load, seen.load.speed
    parts = (load.queue, load.memory, load.adapters, seen.capabilities)
    fields = {name: value for part in parts for name, value in msgspec.structs.asdict(part).items()}
    return SimpleNamespace(
        **fields,
        decode_step_s=speed.decode_step_s,
        prefill_tokens_per_s=speed.prefill_tokens_per_s,
        load_bytes=speed.load.slab_bytes if speed.load else 0.0,
        load_bytes_per_s=speed.load.bytes_per_s if speed.load else 0.0,
    )


class PlainEngine:
    """The prices of one engine, computed from its report and its pending requests without a table."""

    def __init__(self, seen: EngineSeen, sent: list[Route], cost: CostModel, output_tokens: float, mean: float) -> None:
        self.sent, self.cost, self.output_tokens = sent, cost, output_tokens
        load = self.load = flat(seen)
        running = [a for a in load.resident if a.running]
        self.here = {a.version: a.slab_bytes for a in running} | {
            r.adapter.version: r.adapter.slab_bytes for r in sent if r.adapter
        }
        self.ranks = [a.rank for a in running for _ in range(a.running)] + [r.adapter.rank for r in sent if r.adapter]
        self.rank = max(self.ranks, default=0)
        self.requests = load.running + load.waiting + len(sent)
        self.sequences = min(self.requests, load.max_running or self.requests)
        self.sequences_later = max(mean, self.sequences)
        self.kv_tokens = (load.kv_blocks - load.kv_blocks_free) * load.block_tokens
        self.queue_tokens = load.waiting_prefill_tokens + sum(len(r.prompt_tokens) for r in sent)
        self.slowness = 1.0
        if load.running and load.decode_step_s > 0:
            ranks = [a.rank for a in running for _ in range(a.running)]
            modelled_s = cost.step_s(
                StepShape(
                    decode_sequences=load.running,
                    kv_tokens=self.kv_tokens,
                    slab_bytes=sum(a.slab_bytes for a in running),
                    rank_tokens=sum(ranks),
                    max_rank=max(ranks, default=0),
                )
            )
            self.slowness = min(max(load.decode_step_s / modelled_s, 1.0), LARGEST_SURPRISE)

    def step_s(self, adapter: AdapterRef | None = None, prefill: float = 0) -> float:
        """Return the time of a step of all requests there, with ``prefill`` tokens of ``adapter`` in it."""
        slabs = self.here | ({adapter.version: adapter.slab_bytes} if adapter else {})
        rank = adapter.rank if adapter else 0
        return self.cost.step_s(
            StepShape(
                decode_sequences=self.sequences,
                kv_tokens=self.kv_tokens + self.queue_tokens,
                prefill_tokens=prefill,
                slab_bytes=sum(slabs.values()),
                rank_tokens=sum(self.ranks) + rank * prefill,
                max_rank=max(self.rank, rank),
            )
        )

    @property
    def step_tokens(self) -> int:
        return max(1, self.load.max_step_tokens - self.sequences)

    def token_s(self) -> float:
        """Return the time of a queued token, with its share of the steps that carry the queue."""
        ranks = self.rank if self.cost.lora == "padded" else sum(self.ranks) / max(1, self.requests)
        per_rank_s = self.cost.padded_prefill_s if self.cost.lora == "padded" else self.cost.rank_token_s
        context = self.queue_tokens / max(1, self.requests) / 2
        return (
            self.cost.prefill_token_s
            + ranks * per_rank_s
            + context * self.cost.prefill_kv_token_s
            + self.step_s() / self.step_tokens
        )

    def pace(self) -> float:
        rate = self.load.prefill_tokens_per_s
        return min(max(1 / rate / self.token_s(), 1 / LARGEST_SURPRISE), self.slowness) if rate else self.slowness

    def queue_s(self, tokens: int) -> float:
        load, life_s = self.load, self.output_tokens * self.step_s() * self.slowness
        rest_s = self.step_s() / 2 if load.running else 0.0
        waits = [0.0]
        if load.max_running:
            waits.append((self.requests + 1 - load.max_running) / load.max_running * life_s)
        used = load.kv_blocks - load.kv_blocks_free
        if used:
            wanted = (tokens + 1 + self.queue_tokens) / load.block_tokens
            waits.append((wanted - load.kv_blocks_free) / used * life_s)
        return self.pace() * (rest_s + self.queue_tokens * self.token_s()) + max(waits)

    def own_s(self, request: Route) -> float:
        tokens, adapter = len(request.prompt_tokens), request.adapter
        steps = max(1.0, tokens / self.step_tokens)
        with_slab_s = self.step_s(adapter)
        kv_s = tokens * tokens / 2 * self.cost.prefill_kv_token_s
        prefill_s = self.step_s(adapter, tokens) - with_slab_s
        return self.pace() * (steps * with_slab_s + prefill_s + kv_s)

    def load_s(self, adapter: AdapterRef | None) -> float:
        load = self.load
        if adapter is None or any(a.version == adapter.version for a in load.resident):
            return 0.0
        byte_s = self.cost.load_byte_s
        if load.load_bytes_per_s and load.load_bytes:
            byte_s = max(0.0, 1 / load.load_bytes_per_s - self.cost.load_base_s / load.load_bytes)
        alone_s = (self.cost.load_base_s + adapter.slab_bytes * byte_s) * (1 + len(load.loading) / 2)
        if adapter.version in load.loading or any(r.adapter == adapter for r in self.sent):
            return alone_s / 2
        full = extent_bytes(adapter.slab_bytes) > load.pool_room_bytes
        return alone_s + (self.output_tokens * self.step_s() * self.slowness if full else 0.0)

    def engine_s(self, request: Route) -> float:
        """Return how much longer all steps take with this request than without, over its life."""
        cost, adapter, tokens = self.cost, request.adapter, len(request.prompt_tokens)
        life = min(self.output_tokens, request.sampling.max_tokens)
        own = StepShape(
            prefill_tokens=tokens,
            prefill_kv_tokens=tokens * tokens / 2,
            decode_sequences=life,
            kv_tokens=life * (tokens + life / 2),
        )
        own_s, rank = cost.step_s(own) - cost.step_base_s, adapter.rank if adapter else 0
        if cost.lora == "exact":
            read = life if adapter and adapter.version not in self.here else 0
            slab_bytes = adapter.slab_bytes if adapter else 0
            return own_s + (tokens + life) * rank * cost.rank_token_s + read * slab_bytes * cost.slab_byte_s
        planned = max((a.rank for a in self.load.resident if a.pinned), default=0)
        before, n = planned or self.rank, self.sequences_later
        widest = max(before, rank)
        decode_s = cost.padded_decode_s * life * (widest * (n + 1) - before * n)
        queue_s = (widest - before) * self.queue_tokens * cost.padded_prefill_s * life / self.output_tokens
        return own_s + decode_s + queue_s + widest * tokens * cost.padded_prefill_s

    def weight(self) -> float:
        load = self.load
        places = load.running / load.max_running if load.max_running else 0.0
        blocks = (load.kv_blocks - load.kv_blocks_free) / load.kv_blocks if load.kv_blocks else 0.0
        full = min(MAX_FULLNESS, max(places, blocks))
        return ENGINE_TIME_WEIGHT + FULLNESS_WEIGHT * full**2 / (1 - full)

    def ttft_s(self, request: Route) -> float:
        waits_s = max(self.queue_s(len(request.prompt_tokens)), self.load_s(request.adapter))
        return waits_s + self.own_s(request)

    def score(self, request: Route, planned: bool) -> float:
        adapter = request.adapter
        held = adapter is not None and any(a.version == adapter.version for a in self.load.resident)
        prior_s = (planned + held) * PRIOR_STEPS * self.step_s() * self.slowness
        others_s = self.weight() * self.engine_s(request) + LOAD_WEIGHT * self.load_s(adapter)
        return self.ttft_s(request) + others_s - prior_s


@st.composite
def reports(draw: st.DrawFn, name: str) -> EngineSeen:
    held = draw(st.lists(st.sampled_from(ADAPTERS), unique=True))
    counts = [draw(st.integers(0, 3)) for _ in held]
    return engine_seen(
        name,
        running=sum(counts) + draw(st.integers(0, 10)),
        waiting=draw(st.integers(0, 5)),
        waiting_prefill_tokens=draw(st.sampled_from([0, 100, 5000])),
        kv_blocks_free=draw(st.sampled_from([0, 5, 500, 1000])),
        pool_room_bytes=draw(st.sampled_from([0, 64 * MIB])),
        decode_step_s=draw(st.sampled_from([0.0, 0.01, 0.05, 3.0])),
        prefill_tokens_per_s=draw(st.sampled_from([0.0, 10.0, 500.0, 1e5])),
        load_bytes_per_s=draw(st.sampled_from([0.0, 1e7])),
        load_bytes=draw(st.sampled_from([0.0, 4e6])),
        max_running=draw(st.sampled_from([0, 4, 64])),
        max_step_tokens=draw(st.sampled_from([0, 64, 2048])),
        resident=tuple(resident(a, draw(st.booleans()), count) for a, count in zip(held, counts, strict=True)),
        loading=tuple(a.version for a in ADAPTERS if a not in held and draw(st.booleans())),
    )


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[EngineSeen], dict[str, list[Route]]]:
    loads = [draw(reports(f"e{n}")) for n in range(draw(st.integers(1, 4)))]
    sent: dict[str, list[Route]] = {load.engine: [] for load in loads}
    for number in range(draw(st.integers(0, 4))):
        adapter, tokens = draw(st.sampled_from([None, *ADAPTERS])), draw(st.integers(1, 90))
        sent[draw(st.sampled_from(list(sent)))].append(route_request(f"s{number}", tokens, adapter))
    return loads, sent


def view_of(loads: list[EngineSeen], sent: dict[str, list[Route]], cost: CostModel) -> ClusterView:
    """Return a view that is priced after each sent request, so that its prices must be renewed."""
    view = ClusterView()
    view.update(picture(*loads), now=100.0)
    for engine, requests in sent.items():
        for request in requests:
            view.prices(cost)
            view.record_sent(engine, request, now=100.0)
    return view


@settings(max_examples=200, deadline=None)
@given(
    cluster=clusters(),
    adapter=st.sampled_from([None, *ADAPTERS]),
    tokens=st.sampled_from([1, 60, 3000]),
    lora=st.sampled_from(["exact", "padded"]),
    planned=st.sets(st.integers(0, 3)),
)
def test_scores_equal_those_of_a_plain_computation(cluster, adapter, tokens, lora, planned) -> None:
    (loads, sent), cost = cluster, COSTS[lora]
    view, request = view_of(loads, sent, cost), route_request("r", tokens, adapter)
    shares = dict.fromkeys(planned & set(range(len(loads))), 0.5) if adapter else {}
    scores = score(RoutingContext(request, view, None, cost, PATIENT, Random(0)), view.prices(cost), shares)
    # The mean number of sequences is that of the last reports.
    counts = [min(x.running + x.waiting, x.max_running or 10**9) for x in map(flat, loads)]
    mean = sum(counts) / len(loads)
    for column, load in enumerate(loads):
        plain = PlainEngine(load, sent[load.engine], cost, view.mean_output_tokens, mean)
        assert scores.queue_s[column] == pytest.approx(plain.queue_s(tokens))
        assert scores.own_s[column] == pytest.approx(plain.own_s(request))
        assert scores.load_s[column] == pytest.approx(plain.load_s(adapter))
        assert scores.ttft_s[column] == pytest.approx(plain.ttft_s(request))
        assert scores.engine_s[column] == pytest.approx(plain.engine_s(request), abs=1e-12)
        assert scores.score[column] == pytest.approx(plain.score(request, column in shares), abs=1e-9)
    view.validate()


@settings(max_examples=150, deadline=None)
@given(
    cluster=clusters(),
    adapter=st.sampled_from([None, *ADAPTERS]),
    lora=st.sampled_from(["exact", "padded"]),
    silent=st.sets(st.integers(0, 3)),
    seed=st.integers(0, 9),
)
def test_the_first_candidate_has_the_best_score_of_non_fallback_engines_up_to_a_tie(
    cluster, adapter, lora, silent, seed
) -> None:
    (loads, sent), cost = cluster, COSTS[lora]
    view, request = view_of(loads, sent, cost), route_request("r", 60, adapter)
    for number in silent & set(range(len(loads))):
        for _ in range(2):
            view.record_timeout(f"e{number}", "lost", now=100.0)
    answer = route_by_prediction(RoutingContext(request, view, None, cost, PATIENT, Random(seed)))
    assert isinstance(answer, Candidates)
    table = view.prices(cost)
    scores = score(RoutingContext(request, view, None, cost, PATIENT, Random(0)), table, {})
    trusted = [c for c, e in enumerate(table.engines) if e.avoided_since_s is None] or list(range(len(loads)))
    best = min(trusted, key=lambda column: scores.score[column])
    tie_s = TIE_SHARE * max(scores.ttft_s[best], table.columns.decode_step_s[best]) + 1e-4
    chosen = next(c for c, e in enumerate(table.engines) if e.name == answer.first.engine)
    assert chosen in trusted
    assert scores.score[chosen] <= scores.score[best] + tie_s


@settings(max_examples=100, deadline=None)
@given(
    queues=st.lists(st.integers(0, 100_000), min_size=1, max_size=5),
    tokens=st.sampled_from([10, 3000]),
    adapter=st.sampled_from([None, ADAPTERS[3]]),
    factor=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_a_request_is_rejected_only_if_all_engines_break_the_slo_with_a_sufficient_retry_after(
    queues, tokens, adapter, factor
) -> None:
    loads = [engine_seen(f"e{n}", waiting_prefill_tokens=queue) for n, queue in enumerate(queues)]
    view, request, cost = view_of(loads, {}, CostModel()), route_request("r", tokens, adapter), CostModel()
    answer = route_by_prediction(
        RoutingContext(request, view, None, cost, Slo(ttft_s=5.0, reject_factor=factor), Random(0))
    )
    scores = score(RoutingContext(request, view, None, cost, PATIENT, Random(0)), view.prices(cost), {})
    soonest_s = float(scores.ttft_s.min())
    if isinstance(answer, Rejected):
        assert soonest_s > 5.0 * factor
        assert 1.0 <= answer.retry_after_s <= max(1.0, soonest_s - 5.0)
    else:
        alone_s = float(scores.own_s.max()) + (cost.load_s(adapter.slab_bytes) if adapter else 0.0)
        assert soonest_s <= max(5.0, alone_s) * factor


def test_an_idle_engine_serves_a_prompt_whose_prefill_exceeds_the_slo() -> None:
    view, request = view_of([engine_seen("e0")], {}, CostModel()), route_request("r", 4000)
    answer = route_by_prediction(
        RoutingContext(request, view, None, CostModel(), Slo(ttft_s=0.5, reject_factor=2.0), Random(0))
    )
    assert isinstance(answer, Candidates)
    assert answer.first.predicted_s > 1.0


BAD: dict[str, list[Any]] = {
    "decode_step_s": [0.0, float("nan"), float("inf"), -1.0],
    "prefill_tokens_per_s": [0.0, float("nan"), float("inf"), -1.0, 1e-300],
    "load_bytes_per_s": [0.0, float("nan"), float("inf"), -1.0],
    **{name: [0, 1] for name in ("max_running", "max_step_tokens", "kv_blocks", "block_tokens")},
    "max_model_tokens": [0],
    "pool_bytes": [0, 64 * MIB],
    "running": [0, 5000],
}


@settings(max_examples=150, deadline=None)
@given(
    bad=st.fixed_dictionaries({}, optional={field: st.sampled_from(values) for field, values in BAD.items()}),
    adapter=st.sampled_from([None, ADAPTERS[3]]),
    lora=st.sampled_from(["exact", "padded"]),
)
def test_reports_with_zeros_or_invalid_values_give_finite_predictions(bad, adapter, lora) -> None:
    view = view_of([engine_seen("e0", **bad), engine_seen("e1")], {}, COSTS[lora])
    scores = score(
        RoutingContext(route_request("r", 50, adapter), view, None, COSTS[lora], PATIENT, Random(0)),
        view.prices(COSTS[lora]),
        {},
    )
    for values in astuple(scores)[:7]:
        assert np.isfinite(values).all()
    assert (scores.ttft_s > 0).all()


def test_engine_time_is_weighted_by_the_requests_that_arrive_while_the_queue_lasts() -> None:
    cost = COSTS["padded"]
    loads = [engine_seen("e0"), engine_seen("e1", running=4, waiting=20, waiting_prefill_tokens=4000)]
    view = view_of(loads, {"e0": [], "e1": []}, cost)
    table = view.prices(cost)
    alone = table.columns.engine_time_weight
    no_queue = view_of([engine_seen("e0"), engine_seen("e1", running=4)], {}, cost).prices(cost)
    assert no_queue.columns.engine_time_weight.tolist() == alone.tolist(), "no request is known to arrive"
    view.requests_per_s = 10.0
    idle, busy = view.prices(cost).columns.engine_time_weight.tolist()
    assert idle == pytest.approx(ENGINE_TIME_WEIGHT)
    assert busy == pytest.approx(alone[1] + FOLLOWER_WEIGHT * 5.0 * table.columns.queue_s[1])
    assert busy > alone[1] + 0.75


@pytest.mark.parametrize(
    ("report", "weight"),
    [
        ({}, ENGINE_TIME_WEIGHT),
        ({"running": 4, "max_running": 8}, ENGINE_TIME_WEIGHT + 0.5 * FULLNESS_WEIGHT),
        ({"running": 6, "max_running": 8}, ENGINE_TIME_WEIGHT + 2.25 * FULLNESS_WEIGHT),
        (
            {"running": 4, "max_running": 8, "kv_blocks_free": 250, "kv_blocks": 1000},
            ENGINE_TIME_WEIGHT + 2.25 * FULLNESS_WEIGHT,
        ),
        ({"running": 8, "max_running": 8}, ENGINE_TIME_WEIGHT + 48.02 * FULLNESS_WEIGHT),
        ({"running": 8, "max_running": 0}, ENGINE_TIME_WEIGHT),
    ],
)
def test_engine_time_weighs_more_on_a_fuller_engine(report, weight) -> None:
    cost = COSTS["padded"]
    view = view_of([engine_seen("e0", **report)], {"e0": []}, cost)
    assert view.prices(cost).columns.engine_time_weight.tolist() == pytest.approx([weight])
