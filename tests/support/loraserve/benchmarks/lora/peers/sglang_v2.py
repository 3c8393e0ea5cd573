"""SGLang's ``triton_v2`` back end: routes built on the device, deterministic split-K, SGLang's tables of plans."""

import json
from pathlib import Path
from typing import Any

import torch
import triton

from loraserve.benchmarks.lora.cases import LoraCase
from loraserve.benchmarks.lora.peers import SGLANG, root_of, stand_ins
from loraserve.benchmarks.lora.peers.sglang import fill_pool, offsets
from loraserve.benchmarks.lora.sides import World
from loraserve.model_shape import MODULES

OPS = "sglang.kernels.ops.lora.common"
PLANS = "sglang/srt/lora/dense/configs/{}.plans.json"
DECODE_TOKENS = 256
"""A step with more tokens counts as a prefill, which has plans of its own."""
SMALL_ROUTE_PAIRS = 512
"""Up to this size one program builds the route; beyond it kernels that take a capacity do."""
A_TILES: tuple[dict[str, Any], ...] = (
    {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "SPLIT_K": 8},
    {"BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 256, "SPLIT_K": 4},
    {"BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 256, "SPLIT_K": 8},
    {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "SPLIT_K": 16, "num_stages": 4},
    {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "SPLIT_K": 1},
)
B_TILES: tuple[dict[str, Any], ...] = (
    {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32},
    {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "num_stages": 2},
    {"BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 64},
    {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64},
)
BLOCK_SIZES = (16, 32, 64)
PLANNED = None
"""The choice of the plan."""


class SglangV2:
    """The kernels and plans of ``DenseLoraRunner``, without the overlap with the base model's GEMM."""

    name = "sglang triton_v2"

    def __init__(self, folder: Path, world: World, case: LoraCase, max_rank: int) -> None:
        """Prepare the adapters and the plans. Raises FileNotFoundError if ``folder`` lacks the peer's files."""
        root = root_of(folder, SGLANG)
        self._lora_a, self._lora_b, self._routing, self._view = load_triton_v2(root)
        self._pool = fill_pool(world, max_rank)
        self._world = world
        self._case = case
        self._slots = torch.tensor(case.slots, dtype=torch.int32, device=world.device)
        self._plans = [self._plan(read_plans(root), module, max_rank) for module in range(len(MODULES))]
        self._routes: dict[int, Any] = {}
        self._buffers: dict[Any, torch.Tensor] = {}
        self._geometries: dict[Any, Any] = {}
        self.setting: list[dict[str, Any]] = [{"a": PLANNED, "b": PLANNED, "block": PLANNED} for _ in MODULES]
        self.knobs: dict[str, list[Any]] = {
            "a": [PLANNED, *A_TILES],
            "b": [PLANNED, *B_TILES],
            "block": [PLANNED, *BLOCK_SIZES],
        }

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        """Shrink into the bridge, expand it into ``y``."""
        spec = self._chosen(module)
        bridge, planes, slot_planes = self._shrink(x, self._pool.a[layer][module], module, spec)
        common: dict[str, Any] = {
            "geometry": self._geometry(module, spec["b_tiles"]["BLOCK_SIZE_N"]),
            "config": spec["b_tiles"],
            "add_inplace": True,
            "zero_sentinel": False,
            "lora_ranks": self._pool.ranks,
            "scalings": self._pool.scales,
            "planes": planes,
        }
        b = self._pool.b[layer][module]
        if spec["b_family"] == "grouped":
            self._lora_b.grouped_lora_b(bridge, b, y, self._route(spec["block_size"]), **common)
        else:
            self._lora_b.per_row_lora_b(bridge, b, y, self._raw_route(), **common, slot_planes=slot_planes)

    def _shrink(
        self, x: torch.Tensor, a: torch.Tensor, module: int, spec: dict[str, Any]
    ) -> tuple[torch.Tensor, int, bool]:
        """Return the bridge, the number of its split-K planes, and whether it has a plane for each slot."""
        slots, width, k = a.shape
        stack, tiles = len(self._world.tables.out_features[module]), spec["a_tiles"]
        if spec["a_family"] == "all_slots":
            flat = self._buffer("all", (len(x), slots * width), x.dtype)
            torch.matmul(x, a.reshape(slots * width, k).t(), out=flat)
            return flat.view(len(x), slots, width).transpose(0, 1), 1, True
        bridge = self._buffer("bridge", (len(x), width), x.dtype)
        if spec["a_family"] == "per_row":
            self._lora_a.per_row_lora_a(x, a, bridge, self._raw_route(), config=tiles, stack=stack)
            return bridge, 1, False
        route = self._route(spec["block_size"])
        split = int(tiles.get("SPLIT_K", 1))
        blocks = triton.cdiv(route.sorted_pair_ids.numel(), route.block_size)
        scratch: dict[str, Any] = {}
        if split > 1:
            columns = triton.cdiv(width, tiles["BLOCK_SIZE_N"])
            scratch["partial"] = self._buffer("partial", (split, len(x), width), torch.float32)
            scratch["counters"] = self._buffer("counters", (blocks * columns,), torch.int32)
        self._lora_a.grouped_lora_a(
            x, a, bridge, route, config=tiles, pair_input=True, lora_ranks=self._pool.ranks, stack=stack, **scratch
        )
        in_planes = split > 1 and tiles.get("SPLIT_MODE", "serial") == "planes"
        return (scratch["partial"], split, False) if in_planes else (bridge, 1, False)

    def _chosen(self, module: int) -> dict[str, Any]:
        """Return the module's plan, with the settings that replace parts of it."""
        plan, tried = self._plans[module], self.setting[module]
        return {
            **plan,
            "a_tiles": {**plan["a_tiles"], **(tried["a"] or {})},
            "b_tiles": {**plan["b_tiles"], **(tried["b"] or {})},
            "block_size": tried["block"] or plan["block_size"],
        }

    def _plan(self, rows: list[dict[str, Any]], module: int, max_rank: int) -> dict[str, Any]:
        sizes = {
            "tokens": self._case.tokens,
            "rank": max_rank,
            "in_features": self._world.tables.in_features[module],
            "out_features": sum(self._world.tables.out_features[module]),
        }
        return first_match(rows, "decode" if self._case.tokens <= DECODE_TOKENS else "prefill", sizes)

    def _route(self, block_size: int) -> Any:
        if block_size not in self._routes:
            rows = self._case.tokens
            most = rows + min(rows, len(self._world.ranks) + 1) * (block_size - 1)
            self._routes[block_size] = self._routing.build_route(
                self._slots,
                max_loras=len(self._world.ranks),
                block_size=block_size,
                capacity=most if rows > SMALL_ROUTE_PAIRS else None,
            )
        return self._routes[block_size]

    def _raw_route(self) -> Any:
        return self._routing.build_route(
            self._slots, max_loras=len(self._world.ranks), block_size=1, view=self._view.RouteViewKind.RAW
        )

    def _buffer(self, name: str, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return scratch memory that calls share, zero when it is allocated."""
        key = (name, size)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(size, dtype=dtype, device=self._world.device)
        return self._buffers[key]

    def _geometry(self, module: int, block_n: int) -> Any:
        """Return the result of SGLang's ``slice_geometry``, which does not accept the interpreter's device."""
        key = (module, block_n)
        if key not in self._geometries:
            rows = offsets(self._world, module)
            widths = self._world.tables.out_features[module]
            uniform = widths[0] if len(set(widths)) == 1 else 0
            table = torch.tensor(rows, dtype=torch.int32, device=self._world.device)
            self._geometries[key] = self._lora_b.SliceGeometry(
                slice_offsets=table,
                out_offsets=table[:-1].clone(),
                num_slices=len(widths),
                num_column_tiles=sum(triton.cdiv(width, block_n) for width in widths),
                uniform_width=uniform,
                out_stride=uniform,
                full_tiles=all(width % block_n == 0 for width in widths),
                block_size_n=block_n,
            )
        return self._geometries[key]


def load_triton_v2(root: Path) -> list[Any]:
    """Return SGLang's modules: shrink, expand, routing, and the type of a route."""
    names = [f"{OPS}.{name}" for name in ("lora_a", "lora_b", "routing", "route_view")]
    return list(stand_ins.import_modules(root, stand_ins.sglang(), names))


def read_plans(root: Path) -> list[dict[str, Any]]:
    """Return the rows of the table for this GPU's architecture. Raises OSError if the file is missing."""
    major = stand_ins.capability()[0]
    name = "sm90" if major == 9 else "sm100" if major >= 10 else "default"
    rows: list[dict[str, Any]] = json.loads((root / PLANS.format(name)).read_text())["rows"]
    return rows


def first_match(rows: list[dict[str, Any]], phase: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the plan of the first row that allows a linear layer of these sizes. SGLang's tables always have one."""
    for row in rows:
        if row.get("phase") not in (None, phase) or "linear" not in (row.get("kinds") or ["linear"]):
            continue
        too_large = any(size > (row.get(f"max_{name}") or size) for name, size in sizes.items())
        too_small = any(size < (row.get(f"min_{name}") or size) for name, size in sizes.items())
        if not too_large and not too_small:
            spec: dict[str, Any] = row["spec"]
            return spec
    raise ValueError(f"no plan for {phase} {sizes}")
