"""What the gateway counts, and the cluster's load under the names that vLLM's dashboards and routers know."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraserve.gateway.registry import Registry
from loraserve.gateway.streams import StreamTable
from loraserve.messages import EngineLoad

LATENCY_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0
)  # fmt: skip
TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
LENGTH_BUCKETS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class GatewayMetrics:
    """Counters and histograms of the requests that passed here. Label values are bounded: names come from the registry."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=registry, buckets=buckets).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=registry).labels(model_name)

        self.ttft_s = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", LATENCY_BUCKETS_S)
        self.inter_token_s = histogram("vllm:inter_token_latency_seconds", "Token to next token", TOKEN_BUCKETS_S)
        self.per_token_s = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first", TOKEN_BUCKETS_S
        )
        self.e2e_s = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", LATENCY_BUCKETS_S)
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens a request", LENGTH_BUCKETS)
        self.output_length = histogram("vllm:request_generation_tokens", "Output tokens a request", LENGTH_BUCKETS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that were routed")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens received from engines")
        self.finished = Counter(
            "vllm:request_success", "Outputs that ended", ["model_name", "finished_reason"], registry=registry
        )
        self.model_name = model_name
        self.requests = Counter(
            "loraserve_requests",
            "Generation requests by served model and outcome",
            ["model", "outcome"],
            registry=registry,
        )
        self.http = Counter(
            "loraserve_http_responses", "HTTP answers by route and status", ["route", "status"], registry=registry
        )
        self.aborts = Counter("loraserve_gateway_aborts", "Requests given up here", ["reason"], registry=registry)
        self.route_s = Histogram(
            "loraserve_route_seconds", "Asking the router until an engine has the request", registry=registry,
            buckets=TOKEN_BUCKETS_S,
        )  # fmt: skip
        self.ready = Gauge("loraserve_gateway_ready", "1 while requests are accepted", registry=registry)


class ClusterCollector(Collector):
    """Engine gauges, made from the monitor's last publication when somebody looks."""

    def __init__(self, streams: StreamTable, registry: Registry, model_name: str) -> None:
        self._streams = streams
        self._registry = registry
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        yield self._value("loraserve_gateway_streams", "Requests in flight at this gateway", len(self._streams))
        yield self._value("loraserve_adapters_registered", "Names in the registry", len(self._registry.adapters))
        yield self._count("loraserve_gateway_stray_deltas", "Tokens of unknown requests", self._streams.stray_deltas)
        yield self._count(
            "loraserve_gateway_duplicate_tokens", "Tokens that came twice", self._streams.duplicate_tokens
        )
        loads = [report.load for report in self._streams.watch.reports.values() if report.alive]
        yield from self._engines(loads)
        yield self._lora_info(loads)

    def _engines(self, loads: list[EngineLoad]) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_running": ("Requests in the batch", lambda e: e.running),
            "vllm:num_requests_waiting": ("Requests waiting for a place", lambda e: e.waiting),
            "vllm:kv_cache_usage_perc": ("Share of KV blocks in use", _kv_share),
            "loraserve_pool_used_bytes": ("Adapter pool in use", lambda e: e.pool_total_bytes - e.pool_free_bytes),
            "loraserve_pool_total_bytes": ("Adapter pool", lambda e: e.pool_total_bytes),
            "loraserve_adapters_resident": ("Adapters in the pool", lambda e: len(e.resident)),
            "loraserve_decode_step_seconds": ("Time of a decode step now", lambda e: e.decode_step_s),
        }
        counters = {
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the cache", lambda e: e.prefix_queries_tokens),
            "vllm:prefix_cache_hits": ("Prompt tokens found in the cache", lambda e: e.prefix_hits_tokens),
            "vllm:num_preemptions": ("Requests put back to waiting", lambda e: e.preemptions),
            "loraserve_engine_steps": ("Steps since the engine started", lambda e: e.steps),
        }
        kinds = ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters))
        for family, metrics in kinds:
            for name, (text, value) in metrics.items():
                metric = family(name, text, labels=["model_name", "engine"])
                for load in loads:
                    metric.add_metric([self._model, load.engine], value(load))
                yield metric

    def _lora_info(self, loads: list[EngineLoad]) -> Metric:
        """vLLM's odd gauge: the labels are the news, the value says when."""
        running = sorted({adapter.name for load in loads for adapter in load.resident if adapter.running})
        waiting = sorted({self._registry.name_of(version) for load in loads for version in load.loading})
        most = max((len(load.resident) for load in loads), default=0)
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        metric = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use", labels=labels)
        metric.add_metric([str(most), ",".join(running), ",".join(waiting)], self._streams.watch.cluster_s)
        return metric

    def _value(self, name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(name, text, value=value)

    def _count(self, name: str, text: str, value: float) -> Metric:
        return CounterMetricFamily(name, text, value=value)


def _kv_share(load: EngineLoad) -> float:
    return 1 - load.kv_blocks_free / load.kv_blocks_total if load.kv_blocks_total else 0.0
