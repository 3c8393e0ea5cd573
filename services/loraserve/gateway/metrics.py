"""Prometheus metrics of the gateway's requests and of the engines, under vLLM's names where vLLM has the metric."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraserve.clock import Clock
from loraserve.gateway.registry import RegistryCopy
from loraserve.gateway.streams import EngineReport, EngineWatch, StreamTable
from loraserve.messages import EngineCounters, EngineLoad
from loraserve.metrics import Metrics

LATENCY_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
LENGTH_BUCKETS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class GatewayMetrics:
    """Counters and histograms of the requests that this gateway handled.

    The number of label values is bounded: model names come from the configuration and the registry, not from clients.
    """

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        registry = metrics.registry

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=registry, buckets=buckets).labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.model_name = model_name
        self.ttft_s = histogram(
            "vllm:time_to_first_token_seconds",
            "Time from the arrival of a request to its first token",
            LATENCY_BUCKETS_S,
        )
        self.inter_token_s = histogram(
            "vllm:inter_token_latency_seconds", "Time from one output token to the next", TOKEN_BUCKETS_S
        )
        self.per_token_s = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token after the first", TOKEN_BUCKETS_S
        )
        self.e2e_s = histogram(
            "vllm:e2e_request_latency_seconds",
            "Time from the arrival of a request to its last token",
            LATENCY_BUCKETS_S,
        )
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", LENGTH_BUCKETS)
        self.output_length = histogram("vllm:request_generation_tokens", "Output tokens of a request", LENGTH_BUCKETS)
        prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens sent to engines", "model_name")
        self.prompt_tokens = prompt_tokens.labels(model_name)
        generation_tokens = counter("vllm:generation_tokens", "Tokens received from engines", "model_name")
        self.generation_tokens = generation_tokens.labels(model_name)
        self.finished = counter("vllm:request_success", "Finished outputs", "model_name", "finished_reason")
        self.requests = metrics.counter("requests", "Generation requests", ("model", "outcome"))
        self.http = metrics.counter("http_responses", "HTTP answers", ("route", "status"))
        self.interruptions = metrics.counter(
            "gateway_interruptions", "Attempts that ended early, and what followed", ("cause", "verdict")
        )
        self.aborts = metrics.counter("gateway_aborts", "Requests that an engine was told to drop", ("reason",))
        self.route_s = metrics.histogram(
            "route_seconds", "Time from asking the router to the engine's acceptance", TOKEN_BUCKETS_S
        )


class StreamCollector(Collector):
    """Computes metrics of this gateway's streams at each scrape."""

    def __init__(self, streams: StreamTable) -> None:
        self._streams = streams

    def collect(self) -> Iterator[Metric]:
        streams = self._streams
        strays, duplicates = streams.stray_deltas, streams.duplicate_tokens
        yield GaugeMetricFamily("loraserve_gateway_streams", "Token streams in flight", value=len(streams))
        yield CounterMetricFamily("loraserve_gateway_stray_deltas", "Messages for unknown requests", value=strays)
        yield CounterMetricFamily("loraserve_gateway_duplicate_tokens", "Tokens received again", value=duplicates)


class ClusterCollector(Collector):
    """Computes metrics of the cluster at each scrape. Engine data is from the monitor's last publications."""

    def __init__(
        self, watch: EngineWatch, adapters: RegistryCopy, clock: Clock, model_name: str, max_lora: int
    ) -> None:
        self._watch = watch
        self._adapters = adapters
        self._clock = clock
        self._model_name = model_name
        self._max_lora = max_lora

    def collect(self) -> Iterator[Metric]:
        adapters, watch = len(self._adapters.adapters), self._watch
        yield GaugeMetricFamily("loraserve_adapters_registered", "Registered adapters", value=adapters)
        reports = {name: report for name, report in watch.reports.items() if report.alive}
        for name, text, gauge in ENGINE_GAUGES:
            family = GaugeMetricFamily(name, text, labels=("model_name", "engine"))
            for engine, report in reports.items():
                family.add_metric((self._model_name, engine), gauge(report))
            yield family
        yield from self._engine_counters({name: c for name, c in watch.counters.items() if name in reports})
        yield self._lora_info([report.load for report in reports.values()])

    def _engine_counters(self, counters: dict[str, EngineCounters]) -> Iterator[Metric]:
        engines = [((self._model_name, engine), counted) for engine, counted in counters.items()]
        reads = [((name, read.source, read.transport), read) for name, c in counters.items() for read in c.reads]
        prefetched = [((name, counts.kind), counts) for name, c in counters.items() for counts in c.prefetched]
        yield from _counter_families(ENGINE_COUNTERS, ("model_name", "engine"), engines)
        yield from _counter_families(READ_COUNTERS, ("engine", "source", "transport"), reads)
        yield from _counter_families(PREFETCH_COUNTERS, ("engine", "kind"), prefetched)

    def _lora_info(self, loads: list[EngineLoad]) -> Metric:
        # As in vLLM, the labels contain the adapters and the value is the current time.
        running = sorted({adapter.name for load in loads for adapter in load.adapters.resident if adapter.running})
        waiting = sorted({self._adapters.name_of(version) for load in loads for version in load.adapters.loading})
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        metric = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use", labels=labels)
        metric.add_metric((str(self._max_lora), ",".join(running), ",".join(waiting)), self._clock.unix_s())
        return metric


def _counter_families(
    metrics: Sequence[tuple[str, str, str]], labels: Sequence[str], rows: Sequence[tuple[Sequence[str], object]]
) -> Iterator[Metric]:
    """Yield a family for each (name, help text, field). A row is (label values, object that has the fields)."""
    for name, text, field in metrics:
        family = CounterMetricFamily(name, text, labels=labels)
        for values, counts in rows:
            family.add_metric(values, getattr(counts, field))
        yield family


def _kv_share(report: EngineReport) -> float:
    blocks = report.capabilities.kv_blocks
    return 1 - report.load.memory.kv_blocks_free / blocks if blocks else 0.0


Value = Callable[[EngineReport], float]

ENGINE_GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("vllm:num_requests_running", "Requests in the batch", lambda r: r.load.queue.running),
    ("vllm:num_requests_waiting", "Requests waiting for a place in the batch", lambda r: r.load.queue.waiting),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use", _kv_share),
    ("loraserve_pool_total_bytes", "Size of the adapter pool", lambda r: r.capabilities.pool_bytes),
    ("loraserve_pool_free_bytes", "Unused part of the adapter pool", lambda r: r.load.memory.pool_free_bytes),
    ("loraserve_adapters_resident", "Adapters in the pool", lambda r: len(r.load.adapters.resident)),
    ("loraserve_decode_step_seconds", "Mean time of recent decode steps", lambda r: r.load.speed.decode_step_s),
)
ENGINE_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "prefix_queries_tokens"),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", "prefix_hits_tokens"),
    ("vllm:num_preemptions", "Requests preempted and put back into the queue", "preemptions"),
    ("loraserve_early_starts", "Requests that started while their adapter was being read", "early_starts"),
    ("loraserve_early_starts_in_vain", "Early starts undone because the load took too long", "early_starts_in_vain"),
    ("loraserve_engine_steps", "Steps since the engine started", "steps"),
)
READ_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("loraserve_adapter_reads", "Adapters read, by source", "reads"),
    ("loraserve_adapter_read_bytes", "Bytes of adapters read, by source", "read_bytes"),
    ("loraserve_adapter_reads_failed", "Reads that failed, after which another source was tried", "failed"),
    ("loraserve_adapter_reads_mismatched", "Failed reads whose data did not match the digest", "mismatched"),
)
PREFETCH_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("loraserve_adapter_prefetched_bytes", "Bytes of adapters loaded before a request waited for them", "loaded_bytes"),
    ("loraserve_adapter_prefetched_useful_bytes", "Bytes of those that a request then used", "useful_bytes"),
    ("loraserve_adapter_prefetched_wasted_bytes", "Bytes of those evicted unused", "wasted_bytes"),
)
