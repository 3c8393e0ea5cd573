"""vLLM's Triton kernels: adapters zero-padded to ``max_lora_rank`` and stacked, one tensor for each slice."""

from pathlib import Path
from typing import Any

import torch

from loraserve.benchmarks.lora.cases import LoraCase
from loraserve.benchmarks.lora.peers import VLLM, root_of, stand_ins
from loraserve.benchmarks.lora.sides import World
from loraserve.model_shape import MODULES

OPS = "vllm.lora.ops.triton_ops"
CONFIGS = "get_lora_op_configs"
COMMON = {"num_ctas": 1, "group_size_m": 8, "max_nreg": None}
SHRINK: tuple[dict[str, Any], ...] = (
    {"block_m": 16, "block_n": 16, "block_k": 256, "split_k": 16, "num_warps": 4, "num_stages": 2},
    {"block_m": 16, "block_n": 32, "block_k": 256, "split_k": 16, "num_warps": 4, "num_stages": 3},
    {"block_m": 16, "block_n": 64, "block_k": 128, "split_k": 8, "num_warps": 4, "num_stages": 4},
    {"block_m": 16, "block_n": 128, "block_k": 64, "split_k": 16, "num_warps": 4, "num_stages": 4},
    {"block_m": 32, "block_n": 32, "block_k": 256, "split_k": 8, "num_warps": 4, "num_stages": 3},
    {"block_m": 64, "block_n": 64, "block_k": 64, "split_k": 4, "num_warps": 4, "num_stages": 3},
    {"block_m": 128, "block_n": 128, "block_k": 64, "split_k": 4, "num_warps": 8, "num_stages": 3},
)
EXPAND: tuple[dict[str, Any], ...] = (
    {"block_m": 16, "block_n": 128, "block_k": 32, "num_warps": 4, "num_stages": 2},
    {"block_m": 16, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 2},
    {"block_m": 16, "block_n": 256, "block_k": 64, "num_warps": 4, "num_stages": 3},
    {"block_m": 64, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 2},
    {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 2},
)
DEFAULT = None
"""vLLM's own choice; its package has no table for any GPU."""


class Vllm:
    """The kernels of one server, whose ``max_lora_rank`` holds for all of its adapters."""

    def __init__(self, folder: Path, world: World, case: LoraCase, max_rank: int) -> None:
        """Prepare the adapters and the batch. Raises FileNotFoundError if ``folder`` lacks the peer's files."""
        self.name = f"vllm max_lora_rank {max_rank}"
        root = root_of(folder, VLLM)
        self._shrink, self._expand, meta, tensors = load_vllm(root)
        # vLLM caches weights by address and assumes that other weights never get the same address.
        tensors._LORA_A_PTR_DICT.clear()
        tensors._LORA_B_PTR_DICT.clear()
        self.knobs: dict[str, list[Any]] = {
            "shrink": [DEFAULT, *({**COMMON, **sizes} for sizes in SHRINK)],
            "expand": [DEFAULT, *({**COMMON, **sizes} for sizes in EXPAND)],
        }
        self.setting: list[dict[str, Any]] = [{"shrink": DEFAULT, "expand": DEFAULT} for _ in MODULES]
        self._a, self._b = stack(world, max_rank)
        self._max_rank = max_rank
        made = meta.LoRAKernelMeta.make(len(world.ranks), case.tokens, device=world.device)
        made.prepare_tensors(torch.tensor(case.slots, dtype=torch.int32, device=world.device))
        # The grid covers the adapters in use; one for all slots would only be larger.
        self._meta = made.meta_args(case.tokens, specialize_active_lora=True)

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        """Run the calls of vLLM's linear layers. Each call allocates the rank-space buffer, in float32."""
        a, b, chosen = self._a[layer][module], self._b[layer][module], self.setting[module]
        buffer = torch.empty((len(a), x.shape[0], self._max_rank), dtype=torch.float32, device=x.device)
        with stand_ins.answering(self._shrink, CONFIGS, chosen["shrink"]):
            self._shrink.lora_shrink(x, a, buffer, *self._meta, 1.0)
        with stand_ins.answering(self._expand, CONFIGS, chosen["expand"]):
            self._expand.lora_expand(buffer, b, y, *self._meta, offset_start=0, add_inputs=True)


def load_vllm(root: Path) -> list[Any]:
    """Return vLLM's modules: shrink, expand, metadata, and the module that caches tensors of weights."""
    names = [f"{OPS}.{name}" for name in ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils")]
    return list(stand_ins.import_modules(root, stand_ins.vllm(), names))


def stack(world: World, max_rank: int) -> tuple[list[list[list[torch.Tensor]]], list[list[list[torch.Tensor]]]]:
    """Return A [slots, 1, max_rank, in] and B [slots, 1, out, max_rank], by layer, module and slice; B is scaled."""
    a: list[list[list[torch.Tensor]]] = []
    b: list[list[list[torch.Tensor]]] = []
    for layer in range(world.shape.layers):
        a.append([])
        b.append([])
        for module in range(len(MODULES)):
            pairs = [_padded(world, layer, module, i, max_rank) for i in range(len(world.tables.out_features[module]))]
            a[layer].append([pair[0] for pair in pairs])
            b[layer].append([pair[1] for pair in pairs])
    return a, b


def _padded(world: World, layer: int, module: int, index: int, max_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots, k, n = len(world.ranks), world.tables.in_features[module], world.tables.out_features[module][index]
    a = torch.zeros(slots, 1, max_rank, k, dtype=world.dtype, device=world.device)
    b = torch.zeros(slots, 1, n, max_rank, dtype=world.dtype, device=world.device)
    for slot, rank in enumerate(world.ranks):
        a[slot, 0, :rank] = world.a(slot, layer, module, index)
        b[slot, 0, :, :rank] = world.b(slot, layer, module, index).T * world.scales[slot]
    return a, b
