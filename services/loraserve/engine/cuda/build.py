"""From a model directory to a CUDA runner; what this machine lacks is said with what to do about it."""

from collections.abc import Callable
from pathlib import Path

import torch

from loraserve.config import EngineConfig
from loraserve.engine.cuda.runner import CudaRunner
from loraserve.engine.cuda.state import allocate
from loraserve.engine.cuda.weights import DTYPES, DeviceForm, compute_dtype
from loraserve.engine.model.config import context_limit, read_decoder_config
from loraserve.engine.model.weights import load_weights
from loraserve.errors import ConfigError


def start_cuda_runner(
    model_dir: Path, engine: EngineConfig, device: torch.device, progress: Callable[[str], None]
) -> CudaRunner:
    """The model on ``device``, warm. Raises ConfigError naming the setting, field or tensor at fault."""
    runner = load_cuda_runner(model_dir, engine, device, progress)
    try:
        runner.warm_up(progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"GPU memory: not enough is left to compute beside what is set aside ({str(error).splitlines()[0]}); lower "
            f"engine.memory_fraction (it is {engine.memory_fraction:g}) or engine.max_running"
        ) from error
    return runner


def load_cuda_runner(
    model_dir: Path, engine: EngineConfig, device: torch.device, progress: Callable[[str], None]
) -> CudaRunner:
    """The model on ``device``, not warm yet. Raises ConfigError naming the setting, field or tensor at fault."""
    config = read_decoder_config(model_dir)
    form = DeviceForm(DTYPES[compute_dtype(engine)], device)
    try:
        weights = load_weights(model_dir, config, form, progress)
        state = allocate(config, weights, engine, context_limit(config, progress), progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"GPU memory: the model does not fit ({str(error).splitlines()[0]}); give each engine a GPU of its own "
            "(cluster.engines), stop what else runs there, or use a smaller model"
        ) from error
    return CudaRunner(state, engine)
