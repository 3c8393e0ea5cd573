"""What a simulated cluster is asked: adapters with their ranks, and requests in order of arrival. Plain data."""

from collections.abc import Sequence

import msgspec

from loraserve.messages import AdapterRef

RANKS = (8, 16, 32, 64, 128)
"""The paper's."""


class SimRequest(msgspec.Struct, frozen=True, gc=False):
    """``adapter`` is an index of the workload's adapters."""

    time_s: float
    adapter: int
    prompt_tokens: int
    output_tokens: int


class Workload(msgspec.Struct, frozen=True):
    """Requests in order of arrival. ``name`` says for people what it is."""

    name: str
    adapters: tuple[AdapterRef, ...]
    requests: tuple[SimRequest, ...]

    @property
    def duration_s(self) -> float:
        return self.requests[-1].time_s - self.requests[0].time_s if self.requests else 0.0

    @property
    def rps(self) -> float:
        return len(self.requests) / self.duration_s if self.duration_s else 0.0

    def at(self, rps: float) -> "Workload":
        """The same requests, sooner or later after each other, so that so many arrive a second."""
        factor = self.rps / rps
        start_s = self.requests[0].time_s if self.requests else 0.0
        moved = tuple(
            SimRequest((r.time_s - start_s) * factor, r.adapter, r.prompt_tokens, r.output_tokens)
            for r in self.requests
        )
        return Workload(self.name, self.adapters, moved)


def make_adapters(ranks: Sequence[int], slab_bytes_per_rank: int, names: Sequence[str] = ()) -> tuple[AdapterRef, ...]:
    """An adapter for each rank; ``names`` in the same order, else numbered."""
    return tuple(
        AdapterRef(
            name=names[i] if names else f"adapter-{i:05d}",
            version=f"{i:08x}",
            rank=rank,
            slab_bytes=rank * slab_bytes_per_rank,
        )
        for i, rank in enumerate(ranks)
    )
