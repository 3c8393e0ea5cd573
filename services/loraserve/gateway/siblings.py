"""Questions of a gateway to the other processes, and answers that several gateways give together.

Clients and operators reach any gateway through the common port. Each gateway counts and remembers only its own
requests, so it asks the others before it answers about all of them.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from loraserve.config import gateway_names
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.context import Gateway
from loraserve.messages import MetricsTold, TellMetrics

T = TypeVar("T")

METRICS_TIMEOUT_S = 1.0


def sibling_names(gateway: Gateway) -> list[str]:
    """Return the names of the cluster's other gateways."""
    return [name for name in gateway_names(gateway.config) if name != gateway.bus.name]


async def ask_or_none(gateway: Gateway, name: str, message: Any, answer: type[T], timeout_s: float) -> T | None:
    """Return the answer of a process, or None if it refuses or does not answer in time."""
    try:
        return await gateway.bus.request(name, message, answer, timeout_s)
    except (RequestTimeoutError, PeerError):
        return None


async def ask_siblings(gateway: Gateway, message: Any, answer: type[T], timeout_s: float) -> dict[str, T | None]:
    """Return the answer of each other gateway by its name."""
    names = sibling_names(gateway)
    answers = await asyncio.gather(*(ask_or_none(gateway, name, message, answer, timeout_s) for name in names))
    return dict(zip(names, answers, strict=True))


async def render_metrics(gateway: Gateway) -> bytes:
    """Return the metrics of all gateways and of the engines. With several gateways, a label names the gateway."""
    answers = await ask_siblings(gateway, TellMetrics(), MetricsTold, METRICS_TIMEOUT_S)
    own = gateway.render_metrics()
    if answers:
        told = {name: answer.text for name, answer in answers.items() if answer is not None}
        own = merge_metrics({gateway.bus.name: own.decode(), **told})
    return own + gateway.render_cluster_metrics()


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """Merge the Prometheus texts of several gateways. Each sample gets the label ``gateway``."""
    families: dict[str, Metric] = {}
    for gateway, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={**sample.labels, "gateway": gateway}) for sample in family.samples
            ]
    return generate_latest(_Merged(families.values()))


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
