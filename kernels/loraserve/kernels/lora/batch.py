"""Which tokens of a step use which adapter: planned once, reused by every layer and module."""

from dataclasses import dataclass

import torch

NO_ADAPTER = -1


@dataclass(frozen=True)
class LoraBatch:
    """Tokens grouped by slot.

    ``perm`` int32 [tokens with an adapter], token indices group after group; ``group_slot`` int32 [groups];
    ``group_start`` int32 [groups + 1], where each group begins in ``perm``.
    """

    perm: torch.Tensor
    group_slot: torch.Tensor
    group_start: torch.Tensor
    tokens: int

    @property
    def empty(self) -> bool:
        """Nobody in this step uses an adapter."""
        return self.group_slot.numel() == 0


def plan_batch(slot_of_token: torch.Tensor) -> LoraBatch:
    """Group the tokens of a step. ``slot_of_token`` int32 [tokens], NO_ADAPTER for none."""
    order = torch.argsort(slot_of_token, stable=True).to(torch.int32)
    slots = slot_of_token[order.long()]
    used = int((slots == NO_ADAPTER).sum())
    group_slot, counts = torch.unique_consecutive(slots[used:], return_counts=True)
    group_start = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=group_start[1:])
    return LoraBatch(order[used:].contiguous(), group_slot.to(torch.int32), group_start, slot_of_token.numel())
