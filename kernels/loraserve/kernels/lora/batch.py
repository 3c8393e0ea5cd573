"""Groups a step's tokens by adapter. The result is computed once per step and used by every layer and module."""

from dataclasses import dataclass, field

import torch

from loraserve.kernels.lora.tables import AdapterTables

NO_ADAPTER = -1
WORK_TOKENS = 4
"""Reading a weight from memory takes about as long as multiplying it for this many tokens."""


@dataclass(frozen=True)
class LoraBatch:
    """The tokens of a step, grouped by adapter slot.

    ``perm`` int32 [tokens with an adapter] lists token indices, sorted by group. ``group_slot`` int32 [groups] is each
    group's slot. ``group_start`` int32 [groups + 1] is each group's start in ``perm``. ``tokens`` counts all tokens.
    """

    perm: torch.Tensor
    group_slot: torch.Tensor
    group_start: torch.Tensor
    tokens: int
    _work: list[int] = field(default_factory=list, compare=False, repr=False)

    @property
    def groups(self) -> int:
        """Number of distinct adapters in this step."""
        return self.group_slot.numel()

    @property
    def empty(self) -> bool:
        """Whether no token of this step uses an adapter."""
        return self.groups == 0

    def work(self, tables: AdapterTables) -> list[int]:
        """Return the estimated work of each (layer, module), at index layer * 4 + module.

        It sums weights * max(tokens, WORK_TOKENS) over the groups, where ``weights`` counts the adapter's elements in
        the module. The first call caches the result, so all calls must pass the same ``tables``.
        """
        if not self._work:
            tokens = self.group_start.diff().clamp(min=WORK_TOKENS).long()
            self._work.extend(torch.mv(tables.elements[self.group_slot.long()].flatten(1).T, tokens).tolist())
        return self._work


def plan_batch(slot_of_token: torch.Tensor) -> LoraBatch:
    """Group tokens by adapter. ``slot_of_token`` int32 [tokens] holds slots, and NO_ADAPTER for base model tokens."""
    order = torch.argsort(slot_of_token, stable=True).to(torch.int32)
    slots = slot_of_token[order.long()]
    without_adapter = int((slots == NO_ADAPTER).sum())
    group_slot, counts = torch.unique_consecutive(slots[without_adapter:], return_counts=True)
    group_start = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=group_start[1:])
    perm = order[without_adapter:].contiguous()
    return LoraBatch(perm, group_slot.to(torch.int32), group_start, slot_of_token.numel())
