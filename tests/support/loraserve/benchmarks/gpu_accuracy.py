"""Check the GPU kernels against float64 at full size: ``python -m loraserve.benchmarks.gpu_accuracy``.

One layer of Llama-3-8B's shape, mixed ranks, decode and ragged prefill, every module. Memory that no kernel may read is
NaN, and outputs that no kernel may write must keep their bits. ``--small`` is for compute-sanitizer, which is slow.
"""

import argparse
import random
from collections.abc import Sequence

import msgspec
import torch

from loraserve.adapter.format import SlabHeader, make_layout
from loraserve.kernels.lora.gpu import add_lora
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.kernels.lora.work import LoraWork, Workspace
from loraserve.model_shape import MODULES, SLICES, ModelShape

FULL = ModelShape(layers=1, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=8)
SMALL = ModelShape(layers=1, hidden=256, heads=4, kv_heads=2, head_dim=32, ffn=512, vocab=8)
RANKS = (8, 128, 16, 3, 64, 256, 33, 32)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LIMIT = 1e-2
GAP = 64


class AccuracyResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one call.

    ``error`` is the largest error, relative to the largest element that is added; ``untouched`` says whether all other
    elements kept their bits.
    """

    dtype: str
    module: str
    batch: str
    error: float
    untouched: bool

    @property
    def good(self) -> bool:
        return self.error < LIMIT and self.untouched


class AccuracySetup:
    """Adapters of RANKS in a pool on the device, some without some projections, with NaN between them."""

    def __init__(self, shape: ModelShape, dtype: str, device: torch.device) -> None:
        choose = random.Random(0)
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        self.headers = [self._header(shape, dtype, rank, choose) for rank in RANKS]
        size = sum(header.elements + GAP for header in self.headers) + GAP
        self.pool = torch.full((size,), float("nan"), dtype=DTYPES[dtype], device=device)
        self.tables = AdapterTables(shape, len(RANKS), str(device))
        self.bases = []
        start = GAP
        for slot, header in enumerate(self.headers):
            self.pool[start : start + header.elements].normal_(std=0.05)
            self.tables.install(slot, header, start)
            self.bases.append(start)
            start += header.elements + GAP

    def check(self, module: int, slots: Sequence[int], batch: str) -> AccuracyResult:
        """Check one call of ``add_lora``. ``slots`` has the slot of each token, -1 for the base model."""
        space = Workspace(self.tables, len(slots), max(RANKS), self.pool.dtype)
        space.planes.fill_(float("nan"))
        space.hidden.fill_(float("nan"))
        work = LoraWork(self.tables, space, len(slots))
        used = torch.tensor(slots, dtype=torch.int32, device=self.device)
        work.plan(used)
        x = torch.randn(len(slots), self.tables.in_features[module], dtype=self.pool.dtype, device=self.device)
        before = torch.zeros(len(slots), sum(self.tables.out_features[module]), dtype=x.dtype, device=self.device)
        before[used < 0] = float("nan")
        y = before.clone()
        add_lora(y, x, self.pool, self.tables, work, 0, module)
        exact = self._exact(module, x, used)
        adapted = used >= 0
        error = (y[adapted].double() - exact[adapted]).abs().max() / exact[adapted].abs().max()
        same = torch.equal(y[~adapted].view(torch.int16), before[~adapted].view(torch.int16))
        name = str(self.pool.dtype).removeprefix("torch.")
        found = float(error)
        # A NaN would compare as smaller than every limit.
        return AccuracyResult(
            dtype=name, module=MODULES[module], batch=batch, error=found if found == found else 1e9, untouched=same
        )

    def _exact(self, module: int, x: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Return what must be added, in float64, by the formula in adapter/format.py."""
        widths = self.tables.out_features[module]
        exact = torch.zeros(len(x), sum(widths), dtype=torch.float64, device=self.device)
        k = self.tables.in_features[module]
        for slot, header in enumerate(self.headers):
            row = header.row(0, module)
            tokens = (used == slot).nonzero().flatten()
            at = self.bases[slot] + row.offset
            a = self.pool[at : at + row.total_rank * k].view(row.total_rank, k).double()
            h = x[tokens].double() @ a.T
            at += row.total_rank * k
            column = first = 0
            for rank, scale, width in zip(row.ranks, row.scales, widths, strict=True):
                b = self.pool[at : at + rank * width].view(rank, width).double()
                exact[tokens, column : column + width] = scale * h[:, first : first + rank] @ b
                at, first, column = at + rank * width, first + rank, column + width
        return exact

    @staticmethod
    def _header(shape: ModelShape, dtype: str, rank: int, choose: random.Random) -> SlabHeader:
        rows = [tuple(rank if choose.random() > 0.1 else 0 for _ in SLICES[module]) for module in MODULES]
        scales = [tuple(choose.uniform(0.5, 2.0) for _ in row) for row in rows]
        return make_layout(shape, dtype, rows, scales)  # type: ignore[arg-type]


def batches(small: bool) -> dict[str, list[int]]:
    """Return the slots of the tokens of each batch, by name; -1 is the base model."""
    choose = random.Random(1)
    decode = [choose.randrange(-1, len(RANKS)) for _ in range(16 if small else 64)]
    lengths = (70, 1, 130, 64, 5) if small else (512, 1, 700, 64, 33, 257, 9, 128)
    prefill = [slot for slot, length in enumerate(lengths) for _ in range(length)] + [-1] * 7
    return {"decode": decode, "one token": [1], "prefill": prefill}


def check_all(shape: ModelShape, device: torch.device, small: bool, dtypes: Sequence[str]) -> list[AccuracyResult]:
    results = []
    for dtype in dtypes:
        setup = AccuracySetup(shape, dtype, device)
        for name, slots in batches(small).items():
            results += [setup.check(module, slots, name) for module in range(len(MODULES))]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small shapes, only bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: torch sees no CUDA GPU")
        return 1
    shape, dtypes = (SMALL, ["bfloat16"]) if arguments.small else (FULL, list(DTYPES))
    results = check_all(shape, torch.device("cuda", 0), arguments.small, dtypes)
    for r in results:
        print(f"{r.dtype:<10}{r.batch:<12}{r.module:<10}{r.error:.1e}  {'ok' if r.good else 'WRONG'}")
    worst = max(r.error for r in results)
    bad = sum(not r.good for r in results)
    print(msgspec.json.encode({"checks": len(results), "wrong": bad, "largest_error": worst}).decode())
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
