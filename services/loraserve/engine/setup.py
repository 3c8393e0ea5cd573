"""Builds an engine's runner and limits from the configuration, and connects the objects that load and lend adapters.

Runner modules are imported inside the functions that build runners, so that other processes need neither torch nor
compiled kernels.
"""

import os
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from loraserve.config import Config, engine_count
from loraserve.device import core_count, memory_limit_bytes, resolve_device
from loraserve.engine.adapters.residency import Residency
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.host_cache.cache import HostCache
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.lending.lender import Lender, MemoryOffers
from loraserve.engine.loading.arrival import ReadAnnouncer
from loraserve.engine.loading.loader import AdapterLoader
from loraserve.engine.loading.sources import PeerTransports, SourceFinder
from loraserve.engine.loading.speeds import LinkSpeeds
from loraserve.engine.schedule.events import AdapterArriving, SchedulerLimits, check_step_tokens
from loraserve.engine.schedule.report import SpeedMeter
from loraserve.errors import ConfigError
from loraserve.service import Service
from loraserve.transfer.shm import is_supported

if TYPE_CHECKING:
    from loraserve.engine.compute.runner import CpuRunner


HOST_CACHE_BYTES = 8 << 30
"""Maximum default host cache size of an engine with a GPU. It holds adapters evicted from a pool of 20 to 30 GB."""
HOST_CACHE_SHARE = 0.25
"""Maximum share of the machine's memory for the caches of all engines, which use page-locked memory."""
MAX_DIGEST_THREADS = 8
"""Maximum default of verifying threads. At 1 to 2 GB/s per thread, eight keep up with the link that delivers slabs."""


def engine_number(name: str) -> int:
    """Return the number at the end of an engine's name, such as 3 for ``engine-3``. Returns 0 if there is none."""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def threads_for(config: Config) -> int:
    """Return the number of compute threads of one engine. By default the engines share the cores equally."""
    return config.engine.threads or max(1, (os.cpu_count() or 1) // engine_count(config))


def digest_threads_for(config: Config, on_device: bool) -> int:
    """Return the number of threads that verify slabs in one engine. ``on_device``: the adapter pool is on a GPU.

    With a GPU, the default is half of the engine's cores. The other half launches steps, copies chunks and serves HTTP.
    On a CPU, the default is the engine's cores minus its compute threads. Defaults are at most MAX_DIGEST_THREADS.
    """
    of_engine = core_count() // engine_count(config)
    free = of_engine // 2 if on_device else of_engine - threads_for(config)
    return config.engine.digest_threads or max(1, min(MAX_DIGEST_THREADS, free))


def host_cache_bytes(config: Config, on_device: bool, memory: int | None = None) -> int:
    """Return one engine's host cache bytes. Raises ConfigError if all caches exceed ``memory``, or without memfd."""
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
    """Load the model and warm it up. ``index`` selects the GPU. Raises ConfigError if a setting or file is wrong."""
    if not config.model.path:
        raise ConfigError("model.path is empty; name a Hugging Face model directory (scripts/up --model DIR)")
    check_step_tokens(config.engine.max_step_tokens, config.engine.max_running)
    if resolve_device(config.engine.device) == "cuda":
        error = gpu_error()
        if not error:
            return _build_cuda_runner(config, progress, index)
        if config.engine.device == "cuda":
            raise ConfigError(f"engine.device=cuda: {error}, or set engine.device=cpu")
        progress(f"computing on the CPU: {error}")
    return build_cpu_runner(config, progress)


def build_cpu_runner(config: Config, progress: Callable[[str], None]) -> "CpuRunner":
    from loraserve.engine.compute.runner import CpuRunner

    progress("loading weights")
    runner = CpuRunner(Path(config.model.path), config.engine, threads_for(config), progress)
    progress("warming up")
    runner.warm_up()
    return runner


def _build_cuda_runner(config: Config, progress: Callable[[str], None], index: int) -> Runner:
    # Imported here because machines without a GPU may not have triton.
    import torch

    from loraserve.engine.cuda.runner import start_cuda_runner

    device = torch.device("cuda", index % torch.cuda.device_count())
    progress(f"loading weights onto {torch.cuda.get_device_name(device)}")
    engine = msgspec.structs.replace(config.engine, digest_threads=digest_threads_for(config, on_device=True))
    return start_cuda_runner(Path(config.model.path), engine, device, progress)


def gpu_error() -> str:
    """Return the reason why no GPU can be used, with a remedy. Returns "" if a GPU can be used."""
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
    """Return the scheduler's limits. Raises ConfigError if ``max_step_tokens`` is below ``max_running``."""
    engine = config.engine
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


class AdapterParts(NamedTuple):
    loader: AdapterLoader
    sources: SourceFinder
    cache: CacheTier
    offers: MemoryOffers
    lender: Lender


def wire_adapters(
    service: Service,
    runner: Runner,
    residency: Residency,
    speed: SpeedMeter,
    report: Callable[[AdapterArriving], None],
    stack: AsyncExitStack,
) -> AdapterParts:
    """Build and connect the objects that load and lend adapters. ``stack`` closes them.

    ``report`` passes an event to the scheduler. Call this in the event loop. It blocks while memory is registered with
    an RDMA device.
    """
    bus, config, clock = service.bus, service.config, service.clock
    memory, pool, story = runner.pool, residency.pool, residency.story
    speeds = LinkSpeeds()
    cache_bytes = host_cache_bytes(config, on_device=memory.on_device)
    cache = CacheTier(HostCache(cache_bytes, residency.is_ready, story), cache_bytes, memory, clock, speeds)
    stack.enter_context(closing(cache))
    offers = stack.enter_context(closing(MemoryOffers(bus, config, memory, cache.memory)))
    lender = Lender(bus, config, pool, cache, offers, story)
    transports = stack.enter_context(closing(PeerTransports(bus, memory, offers.device, offers.abilities)))
    sources = SourceFinder(bus, config, clock, speeds, transports, cache)
    announcer = ReadAnnouncer(runner, speed, speeds, report)
    threads = digest_threads_for(config, on_device=memory.on_device)
    engine = msgspec.structs.replace(config.engine, digest_threads=threads)
    loader = stack.enter_context(closing(AdapterLoader(runner, pool, cache, sources, announcer, engine)))
    bus.subscribe("monitor", "gone")
    return AdapterParts(loader, sources, cache, offers, lender)
