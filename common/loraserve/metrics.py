"""The Prometheus metrics of a process, including its bus counters."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from loraserve.bus.protocol import BusCounters

PREFIX = "loraserve_"


class Metrics:
    """The metrics of one process. All names get the prefix ``loraserve_``."""

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
        return generate_latest(self.registry)


class _BusCollector(Collector):
    """Reads the bus counters when Prometheus scrapes, so that the bus itself only increments integers."""

    def __init__(self, counters: BusCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        yield CounterMetricFamily(f"{PREFIX}bus_sent", "Messages sent", value=counters.sent)
        yield CounterMetricFamily(f"{PREFIX}bus_received", "Messages received", value=counters.received)
        late = "Answers that arrived after their request had timed out"
        yield CounterMetricFamily(f"{PREFIX}bus_late_replies", late, value=counters.late_replies)
        bad = CounterMetricFamily(f"{PREFIX}bus_bad_messages", "Refused messages", labels=["sender", "reason"])
        for (sender, reason), count in counters.bad.items():
            bad.add_metric([sender, reason], count)
        yield bad
        dropped = CounterMetricFamily(f"{PREFIX}bus_dropped_messages", "Messages not sent", labels=["peer"])
        for peer, count in counters.dropped.items():
            dropped.add_metric([peer], count)
        yield dropped
