"""From the configuration to a warm model runner and the scheduler's limits."""

import os
from collections.abc import Callable
from pathlib import Path

from loraserve.config import Config
from loraserve.engine.limits import SchedulerLimits
from loraserve.engine.runner import ModelRunner
from loraserve.engine.runner_protocol import Runner
from loraserve.errors import ConfigError


def threads_for(config: Config) -> int:
    """Compute threads of one engine: engines of one machine split its cores."""
    return config.engine.threads or max(1, (os.cpu_count() or 1) // max(1, config.cluster.engines))


def build_runner(config: Config, progress: Callable[[str], None]) -> ModelRunner:
    """Load the model and warm it up. Raises ConfigError naming the setting or the file at fault."""
    if not config.model.path:
        raise ConfigError("model.path is empty; name a Hugging Face model directory (scripts/up --model DIR)")
    progress("loading weights")
    runner = ModelRunner(Path(config.model.path), config.engine, threads_for(config), progress)
    progress("warming up")
    runner.warm_up()
    return runner


def scheduler_limits(config: Config, runner: Runner) -> SchedulerLimits:
    """What the scheduler may count on. Raises ConfigError where the settings contradict each other."""
    engine = config.engine
    if engine.max_step_tokens < engine.max_running:
        raise ConfigError(
            f"engine.max_step_tokens is {engine.max_step_tokens}, it must be at least engine.max_running "
            f"({engine.max_running}), or some requests would never decode"
        )
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
