"""SGLang's default back end ``csgmv``, which runs one program per chunk of an adapter's tokens and per block."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from loraserve.benchmarks.lora.cases import LoraCase
from loraserve.benchmarks.lora.peers import SGLANG, root_of, stand_ins
from loraserve.benchmarks.lora.peers.sglang import fill_pool, offsets
from loraserve.benchmarks.lora.sides import World
from loraserve.model_shape import MODULES

OPS = "sglang.kernels.ops.lora.dense"
CHUNKS = (16, 32, 128)
"""Tokens of a chunk: the default, and the choices for 64 and for 256 tokens if the server allows them."""
SHRINK: tuple[dict[str, Any], ...] = (
    {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
)
EXPAND: tuple[dict[str, Any], ...] = (
    {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
)
SPLITS = (8, 16)
LOOKED_UP = None
"""The choice of its tables, or its default."""


class Csgmv:
    """The kernels of ``ChunkedSgmvLoRABackend``."""

    name = "sglang csgmv"

    def __init__(self, folder: Path, world: World, case: LoraCase, max_rank: int) -> None:
        """Prepare the adapters and the batch. Raises FileNotFoundError if ``folder`` lacks the peer's files."""
        self._shrink, self._expand = load_csgmv(root_of(folder, SGLANG))
        self._pool = fill_pool(world, max_rank)
        self._world = world
        self._batches = {chunk: self._batch(case, chunk) for chunk in CHUNKS}
        self._offsets = [
            torch.tensor(offsets(world, m), dtype=torch.int32, device=world.device) for m in range(len(MODULES))
        ]
        self._offsets_cpu = [torch.tensor(offsets(world, module)) for module in range(len(MODULES))]
        chosen = {"chunk": CHUNKS[0], "shrink": LOOKED_UP, "split": LOOKED_UP, "expand": LOOKED_UP}
        self.setting: list[dict[str, Any]] = [dict(chosen) for _ in MODULES]
        self.knobs: dict[str, list[Any]] = {
            "chunk": list(CHUNKS),
            "shrink": [LOOKED_UP, *SHRINK],
            "split": [LOOKED_UP, *SPLITS],
            "expand": [LOOKED_UP, *EXPAND],
        }

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        """Run the calls of SGLang's linear layers. Each call allocates the rank-space intermediate."""
        chosen = self.setting[module]
        batch, widths = self._batches[chosen["chunk"]], self._world.tables.out_features[module]
        a, b = self._pool.a[layer][module], self._pool.b[layer][module]
        with stand_ins.answering(self._shrink, "get_lora_shrink_config", chosen["shrink"]):
            h = self._shrink.chunked_sgmv_lora_shrink_forward(x, a, batch, len(widths), chosen["split"])
        with stand_ins.answering(self._expand, "get_lora_expand_config", chosen["expand"]):
            self._expand.chunked_sgmv_lora_expand_forward(
                h, b, batch, self._offsets[module], max(widths), y, self._offsets_cpu[module]
            )

    def _batch(self, case: LoraCase, chunk: int) -> SimpleNamespace:
        """Return the batch: tokens adapter after adapter, cut into segments of at most ``chunk``."""
        order = sorted(range(case.tokens), key=lambda token: case.slots[token])
        slots: list[int] = []
        starts: list[int] = []
        for place, token in enumerate(order):
            if not slots or slots[-1] != case.slots[token] or place - starts[-1] == chunk:
                slots.append(case.slots[token])
                starts.append(place)

        def on_device(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self._world.device)

        return SimpleNamespace(
            max_len=chunk,
            num_segments=len(slots),
            use_cuda_graph=False,
            weight_indices=on_device(slots),
            seg_indptr=on_device([*starts, case.tokens]),
            permutation=on_device(order),
            lora_ranks=self._pool.ranks,
            scalings=self._pool.scales,
        )


def load_csgmv(root: Path) -> list[Any]:
    """Return SGLang's modules: shrink, expand."""
    names = [f"{OPS}.{name}" for name in ("chunked_sgmv_shrink", "chunked_sgmv_expand")]
    return list(stand_ins.import_modules(root, stand_ins.sglang(), names))
