"""What the compiler makes of the GPU kernels, without a GPU: ``python -m loraserve.kernels.gpu_report``.

Compiles every kernel for the shapes of Llama-3-8B and reads registers, spills, shared memory and the width of the async
copies from the machine code. TRITON_INTERPRET must not be set.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from loraserve.kernels.bench.cases import LLAMA_3_8B
from loraserve.kernels.lora.tuning import Blocks, default_blocks
from loraserve.model_shape import MODULES, ModelShape

ARCHITECTURES = (90, 80)
SHARED_BYTES = {90: 232448, 80: 166912}
"""Most shared memory that one program may use."""
SLOTS, MAX_RANK = 128, 256


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel at one set of constants."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    decode: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was read from one kernel's machine code."""

    name: str
    architecture: int
    decode: bool
    registers: int
    spilled_bytes: int
    shared_bytes: int
    async_128: int
    async_narrow: int
    matrix: str

    @property
    def faults(self) -> list[str]:
        """What must not be: spills or narrow copies in a decode kernel, more shared memory than there is."""
        found = []
        if self.decode and self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.decode and (self.async_narrow or not self.async_128):
            found.append(f"{self.async_narrow} narrow async copies beside {self.async_128} of 128 bits")
        if self.shared_bytes > SHARED_BYTES[self.architecture]:
            found.append(f"needs {self.shared_bytes} bytes of shared memory")
        return found


POINTERS = {
    "x": "*bf16", "y": "*bf16", "pool": "*bf16", "hidden": "*bf16", "planes": "*fp32", "scales": "*fp32",
    "group_scale": "*fp32", "base": "*i64", "layout": "*i64", "tile_a": "*i64", "group_b": "*i64",
}  # fmt: skip


def cases(shape: ModelShape = LLAMA_3_8B) -> Iterator[Case]:
    """Every kernel, as the default block sizes launch it for decode and for prefill."""
    from loraserve.kernels.lora import decode, expand, shrink

    for module in MODULES:
        k, widths = shape.in_features(module), shape.out_features(module)
        sizes = {"K": k, "MAX_RANK": MAX_RANK, **_widths(widths)}
        for tokens in (8, 64, 256):
            b = default_blocks(k, tokens)
            constants = {**sizes, **_blocks(b), "A_ALIGN": 16, "B_ALIGN": 16, "GROUPS": 256, "LOW": True}
            yield _case(f"decode {module} T={tokens}", decode.decode, constants, b, decode=True)
        b = default_blocks(k, 2048)
        constants = {**sizes, **_blocks(b), "ALIGN": 16, "LOW": True}
        for function in (shrink.shrink, expand.expand):
            yield _case(f"{function.fn.__name__} {module}", function, constants, b, decode=False)


def compile_case(case: Case, architecture: int) -> Report:
    """Compile for one architecture and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else POINTERS.get(name, "*i32") for name in names}
    if "T" in signature:
        signature["T"] = "i32"
    # As the launcher finds them: torch's buffers begin at multiples of 16.
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), options={"num_warps": case.warps})
    usage, assembly = disassemble(compiled.asm["cubin"])
    copies = re.findall(r"\bLDGSTS\S*", assembly)
    wide = sum(".128" in copy for copy in copies)
    return Report(
        name=case.name,
        architecture=architecture,
        decode=case.decode,
        registers=_number(r"REG:(\d+)", usage),
        spilled_bytes=_number(r"LOCAL:(\d+)", usage) + 4 * len(re.findall(r"\bSTL\b", assembly)),
        shared_bytes=compiled.metadata.shared,
        async_128=wide,
        async_narrow=len(copies) - wide,
        matrix="wgmma" if "HGMMA" in assembly else "mma" if "HMMA" in assembly else "-",
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, assembly), by the tools that come with triton."""
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


def table(reports: Iterable[Report]) -> str:
    """For BENCHMARKS.md and for the terminal."""
    names = ("kernel", "sm", "registers", "spilled bytes", "shared KB", "async 128-bit", "narrower", "matrix")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [
        f"| {r.name} | {r.architecture} | {r.registers} | {r.spilled_bytes} | {r.shared_bytes / 1024:.0f} "
        f"| {r.async_128} | {r.async_narrow} | {r.matrix} |"
        for r in reports
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, action="append", choices=ARCHITECTURES, help="only this architecture")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    reports = [compile_case(case, sm) for sm in arguments.sm or ARCHITECTURES for case in cases()]
    print(msgspec.json.encode(reports).decode() if arguments.json else table(reports))
    faults = [f"{r.name} sm_{r.architecture}: {fault}" for r in reports for fault in r.faults]
    print("\n".join(faults) if faults else "no faults")
    return 1 if faults else 0


def _widths(widths: tuple[int, ...]) -> dict[str, int]:
    return {f"N{i}": width for i, width in enumerate((*widths, *[0] * (3 - len(widths))))}


def _blocks(b: Blocks) -> dict[str, int]:
    return {"SPLIT": b.split, "BM": b.bm, "BR": b.br, "BK": b.bk, "BN": b.bn, "BE": b.be, "STAGES": b.stages}


def _case(name: str, kernel: Any, constants: dict[str, Any], blocks: Blocks, decode: bool) -> Case:
    used = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return Case(name=name, kernel=kernel, constants=used, warps=blocks.warps, decode=decode)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in: {text[:500]}"
    return int(match[1])


if __name__ == "__main__":
    raise SystemExit(main())
