"""Report the machine code of the GPU kernels; no GPU is needed: ``python -m loraserve.benchmarks.gpu_report``.

Compiles every kernel for the shapes of Llama-3-8B and reads registers, spills, shared memory and the width of the async
copies from the machine code. TRITON_INTERPRET must not be set.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from loraserve.benchmarks.lora.cases import LLAMA_3_8B
from loraserve.kernels.lora.tuning import Blocks, default_blocks
from loraserve.model_shape import MODULES, ModelShape

ARCHITECTURES = (90, 80)
SHARED_BYTES = {90: 232448, 80: 166912}
"""The shared memory that one program may use, by architecture."""
SLOTS, MAX_RANK = 128, 256


class CompileCase(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel with its constants. Loading its ``tiles`` takes ``copies`` async copies of 128 bits."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int = 4
    decode: bool = False
    copies: int = 0
    tiles: int = 0
    most_registers: int | None = None


class CompileReport(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one kernel's machine code."""

    name: str
    architecture: int
    decode: bool
    registers: int
    spilled_bytes: int
    shared_bytes: int
    async_128: int
    async_narrow: int
    wanted_async: int
    async_tiles: int
    wanted_tiles: int
    matrix: str

    @property
    def faults(self) -> list[str]:
        """Faults: spills in a decode kernel, tiles that are not copied 128 bits at a time, too much shared memory.

        Narrow copies would go through the core's own cache, which may be stale where other programs wrote.
        """
        found = []
        if self.decode and self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.async_narrow or self.async_128 < self.wanted_async:
            found.append(
                f"{self.async_128} of {self.wanted_async} async copies of 128 bits, {self.async_narrow} narrower"
            )
        # The compiler may emit the copies of one loop twice, which would hide missing copies of another.
        if self.async_tiles != self.wanted_tiles:
            found.append(f"{self.async_tiles} of {self.wanted_tiles} tiles are copied asynchronously")
        if self.shared_bytes > SHARED_BYTES[self.architecture]:
            found.append(f"needs {self.shared_bytes} bytes of shared memory")
        return found


POINTERS = {
    "x": "*bf16", "y": "*bf16", "pool": "*bf16", "hidden": "*bf16", "planes": "*fp32", "scales": "*fp32",
    "group_scale": "*fp32", "base": "*i64", "layout": "*i64", "tile_a": "*i64", "group_b": "*i64",
    "delta": "*bf16", "out": "*bf16", "qkv": "*bf16", "q": "*bf16", "keys": "*bf16", "values": "*bf16",
    "gate_up": "*bf16", "weight": "*fp32", "q_weight": "*fp32", "k_weight": "*fp32", "cos": "*fp32", "sin": "*fp32",
}  # fmt: skip
SCALARS = {"T": "i32", "eps": "fp32", "width": "i32"}


def compile_cases(shape: ModelShape = LLAMA_3_8B, modules: Sequence[str] = MODULES) -> Iterator[CompileCase]:
    """Yield every kernel with the default block sizes of decode and of prefill."""
    from loraserve.kernels.lora import decode, expand, shrink

    for module in modules:
        k, widths = shape.in_features(module), shape.out_features(module)
        sizes = {"K": k, "MAX_RANK": MAX_RANK, "LOW": True, **_widths(widths)}
        for tokens in (8, 64, 256):
            b = default_blocks(k, tokens)
            yield CompileCase(
                name=f"decode {module} T={tokens}",
                kernel=decode.decode,
                constants=_used(decode.decode, {**sizes, **_blocks(b), "A_ALIGN": 16, "B_ALIGN": 16, "GROUPS": 256}),
                warps=b.warps,
                decode=True,
                copies=_shrink_copies(b) + _expand_copies(b),
                tiles=5,
                most_registers=b.registers,
            )
        b = default_blocks(k, 2048)
        for kernel, copies, tiles in ((shrink.shrink, _shrink_copies(b), 2), (expand.expand, _expand_copies(b), 3)):
            yield CompileCase(
                name=f"{kernel.__name__} {module}",
                kernel=kernel,
                constants=_used(kernel, {**sizes, **_blocks(b), "ALIGN": 16}),
                warps=b.warps,
                copies=copies,
                tiles=tiles,
            )
    yield from _small_cases(shape)


def _small_cases(shape: ModelShape) -> Iterator[CompileCase]:
    """Yield the kernels that run once per step or process one row at a time."""
    from loraserve.kernels.fused import gpu as fused_gpu
    from loraserve.kernels.lora import work

    yield CompileCase(name="sort_tokens", kernel=work.sort_tokens, constants={"BLOCK": 256})
    b = [default_blocks(shape.in_features(module), 64) for module in MODULES]
    constants = {"SLOTS": SLOTS, "LANES": SLOTS, "ROWS": 4 * shape.layers, "TILES": 4096, "GROUPS": 256, "BLOCK": 16}
    for i, module in enumerate(MODULES):
        constants |= {f"K{i}": shape.in_features(module), f"BM{i}": b[i].bm, f"BR{i}": b[i].br}
    yield CompileCase(name="list_work", kernel=work.list_work, constants=constants)
    yield CompileCase(name="add_rms_norm", kernel=fused_gpu._norm, constants={"ADD": True, "BLOCK": 4096})
    head = {"HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "DIM": shape.head_dim, "BLOCK": shape.head_dim // 2}
    yield CompileCase(name="rotate_and_store", kernel=fused_gpu._rotate, constants={**head, "NORMED": True}, warps=1)
    yield CompileCase(name="silu_mul", kernel=fused_gpu._silu_mul, constants={"BLOCK": fused_gpu.SILU_BLOCK})


def compile_case(case: CompileCase, architecture: int) -> CompileReport:
    """Compile a kernel for one architecture and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource

    names = case.kernel.arg_names
    types = {**dict.fromkeys(names, "*i32"), **POINTERS, **SCALARS, **dict.fromkeys(case.constants, "constexpr")}
    signature = {name: types[name] for name in names}
    # As in a launch: torch's buffers begin at multiples of 16.
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": case.warps, "maxnreg": case.most_registers}
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), options=options)
    usage, assembly = disassemble(compiled.asm["cubin"])
    copies = re.findall(r"\bLDGSTS\S*", assembly)
    wide = sum(".128" in copy for copy in copies)
    return CompileReport(
        name=case.name,
        architecture=architecture,
        decode=case.decode,
        registers=_number(r"REG:(\d+)", usage),
        spilled_bytes=_number(r"LOCAL:(\d+)", usage) + 4 * len(re.findall(r"\bSTL\b", assembly)),
        shared_bytes=compiled.metadata.shared,
        async_128=wide,
        async_narrow=len(copies) - wide,
        wanted_async=case.copies,
        async_tiles=async_tiles(compiled.asm["ttgir"]),
        wanted_tiles=case.tiles,
        matrix="wgmma" if "HGMMA" in assembly else "mma" if "HMMA" in assembly else "-",
    )


def async_tiles(ttgir: str) -> int:
    """Return how many loads of the source become only async copies of eight elements per thread."""
    copies = [line for line in ttgir.splitlines() if "ttg.async_copy_global_to_local" in line]
    wide: set[str] = set()
    narrow: set[str] = set()
    for line in copies:
        (wide if "contiguity = 8 " in line else narrow).add(line.rpartition("loc(")[2])
    return len(wide - narrow)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return (resource usage, assembly), from the tools that come with triton."""
    import triton.backends.nvidia as nvidia

    tools = os.path.join(os.path.dirname(nvidia.__file__), "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        assembly = subprocess.run([f"{tools}/nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return usage.stdout + usage.stderr, assembly.stdout


def markdown_table(reports: Iterable[CompileReport]) -> str:
    """Return the reports as a table for BENCHMARKS.md and the terminal."""
    names = ("kernel", "sm", "registers", "spilled bytes", "shared KB", "async 128-bit", "wanted", "narrower", "matrix")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [
        f"| {r.name} | {r.architecture} | {r.registers} | {r.spilled_bytes} | {r.shared_bytes / 1024:.0f} "
        f"| {r.async_128} | {r.wanted_async} | {r.async_narrow} | {r.matrix} |"
        for r in reports
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, action="append", choices=ARCHITECTURES, help="only this architecture")
    parser.add_argument("--module", action="append", choices=MODULES, help="only the kernels of this module")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted; unset it")
    found = list(compile_cases(modules=arguments.module or MODULES))
    reports = [compile_case(case, sm) for sm in arguments.sm or ARCHITECTURES for case in found]
    print(msgspec.json.encode(reports).decode() if arguments.json else markdown_table(reports))
    faults = [f"{r.name} sm_{r.architecture}: {fault}" for r in reports for fault in r.faults]
    print("\n".join(faults) if faults else "no faults")
    return 1 if faults else 0


def _widths(widths: tuple[int, ...]) -> dict[str, int]:
    return {f"N{i}": width for i, width in enumerate((*widths, *[0] * (3 - len(widths))))}


def _blocks(b: Blocks) -> dict[str, int]:
    return {"SPLIT": b.split, "BM": b.bm, "BR": b.br, "BK": b.bk, "BN": b.bn, "BE": b.be, "STAGES": b.stages}


def _shrink_copies(b: Blocks) -> int:
    """Return the copies of a tile of A and of x, over all stages: bfloat16, 16 bytes per thread."""
    return b.stages * (b.br * b.bk + b.bm * b.bk) * 2 // (b.warps * 32 * 16)


def _expand_copies(b: Blocks) -> int:
    """Return the copies of a tile of B and of both parts of h, over all stages."""
    return b.stages * (b.be * b.bn + 2 * b.bm * b.be) * 2 // (b.warps * 32 * 16)


def _used(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Return the constants that the kernel takes."""
    return {key: value for key, value in constants.items() if key in kernel.arg_names}


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in: {text[:500]}"
    return int(match[1])


if __name__ == "__main__":
    raise SystemExit(main())
