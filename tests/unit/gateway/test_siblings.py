"""The common metrics of several gateways."""

from prometheus_client.parser import text_string_to_metric_families

from loraserve.gateway.siblings import merge_metrics
from loraserve.metrics import Metrics


def rendered(requests: int, seconds: float) -> str:
    metrics = Metrics()
    metrics.counter("requests", "Generation requests", ("model",)).labels("tiny").inc(requests)
    metrics.histogram("route_seconds", "Time to route", (0.1, 1.0)).observe(seconds)
    return metrics.render().decode()


def test_the_metrics_of_all_gateways_are_kept_apart_by_a_label() -> None:
    text = merge_metrics({"gateway-1": rendered(5, 0.5), "gateway-0": rendered(2, 0.05)}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["loraserve_requests"].samples
    totals = {sample.labels["gateway"]: sample.value for sample in samples if sample.name.endswith("_total")}
    assert totals == {"gateway-0": 2.0, "gateway-1": 5.0}
    assert {sample.labels["model"] for sample in samples} == {"tiny"}
    assert families["loraserve_route_seconds"].type == "histogram"
    buckets = [s for s in families["loraserve_route_seconds"].samples if s.labels.get("le") == "0.1"]
    assert {(s.labels["gateway"], s.value) for s in buckets} == {("gateway-0", 1.0), ("gateway-1", 0.0)}
    assert text.count("# TYPE loraserve_requests_total counter") == 1
