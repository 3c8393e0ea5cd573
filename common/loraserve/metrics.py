"""A process's metrics: one registry, the bus counted in it, and the text that Prometheus scrapes."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from loraserve.bus.protocol import BusCounters

PREFIX = "loraserve_"


class Metrics:
    """Metrics of one process. Names are given without the ``loraserve_`` that they all get."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(PREFIX + name, text, labels, registry=self.registry, buckets=buckets)

    def watch_bus(self, counters: BusCounters) -> None:
        self.registry.register(_BusCollector(counters))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _BusCollector(Collector):
    """Reads the counters when scraped, so that counting costs the bus nothing."""

    def __init__(self, counters: BusCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        yield CounterMetricFamily(f"{PREFIX}bus_sent", "Messages handed to the bus", value=counters.sent)
        yield CounterMetricFamily(f"{PREFIX}bus_received", "Messages that arrived", value=counters.received)
        yield CounterMetricFamily(
            f"{PREFIX}bus_late_replies", "Answers to requests that had timed out", value=counters.late_replies
        )
        bad = CounterMetricFamily(f"{PREFIX}bus_bad_messages", "Messages refused", labels=["sender", "reason"])
        for (sender, reason), count in counters.bad.items():
            bad.add_metric([sender, reason], count)
        yield bad
        dropped = CounterMetricFamily(f"{PREFIX}bus_dropped_messages", "Messages that got no further", labels=["peer"])
        for peer, count in counters.dropped.items():
            dropped.add_metric([peer], count)
        yield dropped
