"""Measures HTTP workloads on one server after the other: start, warm up, measure, stop."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from harness.http_load import DECODE_TOKENS, MAX_TOKENS, LoadResult, load
from harness.report import Number, ratio, say, table

PROMPTS_PER_LOAD = 16


class Server(Protocol):
    """A running server. ``body`` returns the request fields that select an adapter, "" for the base model."""

    url: str

    def body(self, adapter: str) -> dict[str, Any]: ...


class Workload(NamedTuple):
    """A workload; ``adapters`` has one entry for each concurrent stream."""

    name: str
    adapters: tuple[str, ...]
    tokens: int = MAX_TOKENS


def workloads(first: str, second: str) -> list[Workload]:
    """Return all workloads; ``first`` and ``second`` are adapter names."""
    three = ("", first, second)
    return [
        Workload("base_x1", ("",)),
        Workload("decode_x1", ("",), DECODE_TOKENS),
        Workload("adapter_x1", (first,)),
        Workload("adapter_x4", (first,) * 4),
        Workload("two_adapters_x4", (first, second) * 2),
        Workload("3way_x4", tuple(three[i % 3] for i in range(4))),
        Workload("3way_x12", three * 4),
    ]


class HttpComparison:
    """``results[server][workload]`` is the best of the repeats: highest tokens/s, lowest TTFT."""

    def __init__(self, loads: Sequence[Workload], repeats: int) -> None:
        self.loads = list(loads)
        self.repeats = repeats
        self.results: dict[str, dict[str, LoadResult]] = {}

    def measure(self, name: str, starting: AbstractContextManager[Server]) -> None:
        """Measure every workload on one server. Raises BenchError."""
        say(f"{name}: starting")
        with starting as server:
            for adapter in dict.fromkeys(name for work in self.loads for name in work.adapters):
                # Twice: the first request may compile or load, the second may still fill caches.
                for number in (1, 2):
                    asyncio.run(load(server.url, [server.body(adapter)], number, 8))
            self.results[name] = {work.name: self._best(name, server, work) for work in self.loads}

    def _best(self, name: str, server: Server, work: Workload) -> LoadResult:
        bodies = [server.body(adapter) for adapter in work.adapters]
        runs = []
        for repeat in range(self.repeats):
            number = 1000 * (1 + self.loads.index(work)) + PROMPTS_PER_LOAD * repeat
            runs.append(asyncio.run(load(server.url, bodies, number, work.tokens)))
        best = LoadResult(
            max(run.tok_s for run in runs), min(run.ttft_s for run in runs), max(run.decode_tok_s for run in runs)
        )
        say(f"{name}: {work.name} {best.tok_s:.1f} tok/s, TTFT {best.ttft_s * 1e3:.0f} ms")
        return best

    def value(self, server: str, workload: str, field: str = "tok_s") -> Number:
        found = self.results.get(server, {}).get(workload)
        return None if found is None else getattr(found, field)

    def ratio(self, ours: str, theirs: str, workload: str, field: str = "tok_s") -> float | None:
        return ratio(self.value(ours, workload, field), self.value(theirs, workload, field))

    def figures(self, servers: Sequence[str]) -> dict[str, Number]:
        """Return the figures of all ``servers``, None for those that were not measured."""
        found: dict[str, Number] = {}
        for server in servers:
            for work in self.loads:
                field = "decode_tok_s" if work.tokens == DECODE_TOKENS else "tok_s"
                found[f"{server}_{work.name}_tok_s"] = self.value(server, work.name, field)
                ttft_s = self.value(server, work.name, "ttft_s")
                found[f"{server}_{work.name}_ttft_ms"] = ttft_s and ttft_s * 1e3
        return found

    def tables(self) -> str:
        if not self.results:
            return ""
        header = ["over HTTP: tok/s, mean TTFT in ms", *self.results]
        rows = []
        for work in self.loads:
            row = [f"{work.name}" + (" (after the first token)" if work.tokens == DECODE_TOKENS else "")]
            for results in self.results.values():
                result = results[work.name]
                speed = result.decode_tok_s if work.tokens == DECODE_TOKENS else result.tok_s
                row.append(f"{speed:.1f}, {result.ttft_s * 1e3:.0f}")
            rows.append(row)
        return table(f"Servers ({MAX_TOKENS} tokens a request, best of {self.repeats})", header, rows)
