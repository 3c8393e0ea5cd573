"""From the configuration to a warm model runner and the scheduler's limits.

Runners are imported where they are built: a process that is given another needs neither torch nor compiled kernels.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loraserve.config import Config, EngineConfig, engine_count
from loraserve.device import core_count, memory_limit_bytes, resolve_device
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.schedule.events import SchedulerLimits
from loraserve.errors import ConfigError
from loraserve.transfer.shm import is_supported

if TYPE_CHECKING:
    from loraserve.engine.compute.runner import CpuRunner

HOST_CACHE_BYTES = 8 << 30
"""On a GPU, where nothing else is asked for: beside a pool of 20 to 30 GB what was there a while ago."""
HOST_CACHE_SHARE = 0.25
"""Of the machine's memory, for all engines: page-locked memory is lost to everything else."""
MOST_DIGEST_THREADS = 8
"""At 1 to 2 GB/s each they keep up with the link that slabs come over; more would wait for bytes."""


def number_of(name: str) -> int:
    """An engine's by its name: 0 of engine-0, and of a name that has none."""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def threads_for(config: Config) -> int:
    """Compute threads of one engine: engines of one machine split its cores."""
    return config.engine.threads or max(1, (os.cpu_count() or 1) // engine_count(config))


def digest_threads_for(config: Config, on_device: bool) -> int:
    """Threads that verify what one engine loads, into a pool on a device or in the machine's own memory.

    With a GPU they get half of the engine's cores: the others launch steps, move chunks and serve HTTP. On a CPU steps
    compute on the cores, where a thread more than they leave free would hold each of them up; but one there must be.
    """
    of_engine = core_count() // engine_count(config)
    free = of_engine // 2 if on_device else of_engine - threads_for(config)
    return config.engine.digest_threads or max(1, min(MOST_DIGEST_THREADS, free))


def host_cache_bytes(config: Config, on_device: bool, memory: int | None = None) -> int:
    """Of one engine, whose pool is on a device or not; ``memory`` bytes are the machine's.

    Raises ConfigError where they cannot be had.
    """
    wanted, engines = config.engine.host_cache_bytes, engine_count(config)
    memory = memory_limit_bytes() if memory is None else memory
    if wanted == "auto":
        share = int(memory * HOST_CACHE_SHARE) // engines
        return min(HOST_CACHE_BYTES, share) if on_device and is_supported() else 0
    if wanted * engines > memory:
        raise ConfigError(
            f"engine.host_cache_bytes is {wanted} for each of {engines} engines, there are {memory} bytes of memory; "
            "lower it"
        )
    if wanted and not is_supported():
        raise ConfigError("engine.host_cache_bytes needs Linux (memfd); set it to 0")
    return wanted


def build_runner(config: Config, progress: Callable[[str], None], index: int = 0) -> Runner:
    """Load the model and warm it up; ``index`` is the engine's number on its machine, and so of its GPU.

    Raises ConfigError naming the setting or the file at fault.
    """
    if not config.model.path:
        raise ConfigError("model.path is empty; name a Hugging Face model directory (scripts/up --model DIR)")
    _check_step(config.engine)
    reason = gpu_unusable() if resolve_device(config.engine.device) == "cuda" else ""
    if reason and config.engine.device == "cuda":
        raise ConfigError(f"engine.device=cuda: {reason}, or set engine.device=cpu")
    if reason:
        progress(f"computing on the CPU: {reason}")
    if resolve_device(config.engine.device) == "cuda" and not reason:
        return _cuda_runner(config, progress, index)
    return cpu_runner(config, progress)


def cpu_runner(config: Config, progress: Callable[[str], None]) -> "CpuRunner":
    """The model on this machine's CPU, warm."""
    from loraserve.engine.compute.runner import CpuRunner

    progress("loading weights")
    runner = CpuRunner(Path(config.model.path), config.engine, threads_for(config), progress)
    progress("warming up")
    runner.warm_up()
    return runner


def _cuda_runner(config: Config, progress: Callable[[str], None], index: int) -> Runner:
    # Imported here: machines without a GPU need not have triton.
    import torch

    from loraserve.engine.cuda.runner import start_cuda_runner

    device = torch.device("cuda", index % torch.cuda.device_count())
    progress(f"loading weights onto {torch.cuda.get_device_name(device)}")
    engine = msgspec.structs.replace(config.engine, digest_threads=digest_threads_for(config, on_device=True))
    return start_cuda_runner(Path(config.model.path), engine, device, progress)


def gpu_unusable() -> str:
    """What keeps the installed packages from using a GPU, with the remedy; empty where nothing does."""
    import importlib.util

    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install torch for CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    if importlib.util.find_spec("triton") is None:
        return "triton is missing; pip install 'loraserve[gpu]'"
    return ""


def scheduler_limits(config: Config, runner: Runner) -> SchedulerLimits:
    """What the scheduler may count on. Raises ConfigError where the settings contradict each other."""
    engine = config.engine
    _check_step(engine)
    longest = config.model.max_model_tokens or runner.max_positions
    return SchedulerLimits(
        kv_blocks=runner.kv_blocks,
        block_tokens=engine.block_tokens,
        pool_bytes=len(runner.pool),
        max_adapters=engine.max_adapters,
        max_rank=engine.max_rank,
        max_running=engine.max_running,
        max_waiting=engine.max_waiting,
        max_step_tokens=engine.max_step_tokens,
        max_model_tokens=min(longest, runner.max_positions),
        eos_token_ids=frozenset(runner.eos_token_ids),
        prefix_cache=engine.prefix_cache,
        steps_ahead=runner.steps_ahead,
    )


def _check_step(engine: EngineConfig) -> None:
    if engine.max_step_tokens < engine.max_running:
        raise ConfigError(
            f"engine.max_step_tokens is {engine.max_step_tokens}, it must be at least engine.max_running "
            f"({engine.max_running}), or some requests would never decode"
        )
