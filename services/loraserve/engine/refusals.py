"""Which requests an engine cannot serve at all, in words. Pure."""

from loraserve.engine.limits import SchedulerLimits
from loraserve.engine.pool import AdapterPool
from loraserve.messages import Admit


def refusal_of(
    admit: Admit, limits: SchedulerLimits, max_model_tokens: int, waiting: int, pool: AdapterPool
) -> tuple[str, str] | None:
    """(code, message with the remedy) where this request cannot be served here; ``waiting`` do already."""
    length = len(admit.prompt_tokens)
    if length == 0:
        return "bad_request", "prompt_tokens is empty; send at least one token"
    if admit.sampling.max_tokens < 1:
        return "bad_request", f"max_tokens is {admit.sampling.max_tokens}; ask for at least 1"
    if length >= max_model_tokens:
        return "context_length", (
            f"This model's maximum context length is {max_model_tokens} tokens. However, your prompt has "
            f"{length} tokens; shorten it."
        )
    if waiting >= limits.max_waiting:
        return "overloaded", f"{waiting} requests wait already; try again later"
    unfit = pool.refusal(admit.adapter) if admit.adapter else None
    return ("adapter_unavailable", unfit) if unfit else None
