"""Stand-ins for the names that the kernels of vLLM and SGLang import from their packages, with default settings."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl


def capability() -> tuple[int, int]:
    """Return the compute capability of the GPU, (0, 0) if kernels are interpreted."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def import_modules(root: Path, stand_ins: Mapping[str, Mapping[str, Any]], wanted: Sequence[str]) -> list[ModuleType]:
    """Import modules under ``root``. Their further imports are stand-ins or also lie under ``root``.

    Packages get a path but no ``__init__``, because it would import the whole package.
    """
    for name in {parent for module in (*stand_ins, *wanted) for parent in _parents(module)}:
        package = sys.modules.setdefault(name, ModuleType(name))
        package.__path__ = [str(root.joinpath(*name.split(".")))]
    for name, content in stand_ins.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        vars(module).update(content)
        parent, _, last = name.rpartition(".")
        setattr(sys.modules[parent], last, module)
    return [importlib.import_module(name) for name in wanted]


@contextmanager
def answering(module: ModuleType, name: str, answer: Any) -> Iterator[None]:
    """Make ``module.name(...)`` return ``answer`` within the block, or leave it as it is for None."""
    own = getattr(module, name)
    try:
        if answer is not None:
            setattr(module, name, lambda *named, **sizes: answer)
        yield
    finally:
        setattr(module, name, own)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def vllm() -> dict[str, dict[str, Any]]:
    """Return the names that vLLM's LoRA kernels import from vLLM. Custom ops are replaced by direct calls."""
    quiet = logging.getLogger("vllm")
    log = SimpleNamespace(warning_once=quiet.debug, info_once=quiet.debug, warning=quiet.warning, info=quiet.debug)
    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        has_device_capability=lambda wanted: capability()[0] * 10 + capability()[1] >= wanted,
        is_device_capability=lambda wanted: capability()[0] * 10 + capability()[1] == wanted,
    )
    envs = {
        "VLLM_BATCH_INVARIANT": False,
        "VLLM_LORA_DISABLE_PDL": False,
        "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        "VLLM_TUNED_CONFIG_FOLDER": None,
    }
    return {
        "vllm.envs": envs,
        "vllm.logger": {"init_logger": lambda name: log},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {"async_tensor_h2d": torch.tensor, "direct_register_custom_op": _no_custom_ops},
    }


def _no_custom_ops(**operation: Any) -> None:
    raise AttributeError("no custom ops here")


def sglang() -> dict[str, dict[str, Any]]:
    """Return the names that SGLang's LoRA kernels import from SGLang."""
    off = SimpleNamespace(get=lambda: False)
    envs = SimpleNamespace(SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off)
    return {
        # Used only by the builders of routes, which are not timed.
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: False},
        "sglang.kernels.ops.lora.moe.virtual_experts": {"_align_block_size_jit": _not_compiled},
        "sglang.srt.environ": {"envs": envs},
        "sglang.srt.lora.utils": {"LoRABatchInfo": SimpleNamespace},
        "sglang.srt.utils": {"cached_triton_kernel": _uncached, "get_device_name": _device_name},
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def _not_compiled(*operands: Any, **options: Any) -> None:
    raise NotImplementedError("this way to build routes is CUDA code that nvcc compiles; pass a capacity")


def _uncached(key: Callable[..., Any]) -> Callable[[Any], Any]:
    """SGLang's cache saves CPU time of launches, which captured graphs do not need."""
    return lambda kernel: kernel
