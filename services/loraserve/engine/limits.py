"""What the scheduler has to work with: facts of the model and choices of the configuration."""

import msgspec


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """``max_step_tokens`` bounds one step's prefill and decode tokens together.

    ``steps_ahead`` more steps than one may be outstanding: as many as the runner takes before it has ended the first.
    """

    kv_blocks: int
    block_tokens: int
    pool_bytes: int
    max_adapters: int
    max_rank: int = 256
    max_running: int
    max_waiting: int
    max_step_tokens: int
    max_model_tokens: int
    eos_token_ids: frozenset[int]
    prefix_cache: bool = True
    max_loads: int = 2
    steps_ahead: int = 0

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"engine.max_step_tokens is {self.max_step_tokens}, it must be at least engine.max_running "
                f"({self.max_running}), or some requests would never decode"
            )
