"""Fits a cost model to measurements with non-negative least squares of relative errors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from loraserve.cost.model import CostModel, StepShape
from loraserve.cost.profile import Residuals

Lora = Literal["exact", "padded"]
Sample = TypeVar("Sample")
StepSample = tuple[StepShape, float]
"""A step and its duration in seconds."""
LoadSample = tuple[int, float]
"""The bytes of a slab and the duration of its load in seconds."""

HELD_OUT_EVERY = 5
STEP_TERMS: dict[str, Callable[[StepShape], float]] = {
    "step_base_s": lambda shape: 1.0,
    "sequence_s": lambda shape: shape.decode_sequences,
    "kv_token_s": lambda shape: shape.kv_tokens,
    "prefill_token_s": lambda shape: shape.prefill_tokens,
    "prefill_kv_token_s": lambda shape: shape.prefill_kv_tokens,
}
LORA_TERMS: dict[Lora, dict[str, Callable[[StepShape], float]]] = {
    "exact": {
        "slab_byte_s": lambda shape: shape.slab_bytes,
        "rank_token_s": lambda shape: shape.rank_tokens,
    },
    "padded": {
        "padded_prefill_s": lambda shape: shape.prefill_tokens * shape.max_rank,
        "padded_decode_s": lambda shape: shape.decode_sequences * shape.max_rank,
    },
}
LOAD_TERMS: dict[str, Callable[[int], float]] = {
    "load_base_s": lambda slab_bytes: 1.0,
    "load_byte_s": float,
}
UNSEEN = CostModel(
    **dict.fromkeys([*STEP_TERMS, *LORA_TERMS["exact"], *LORA_TERMS["padded"], *LOAD_TERMS], 0.0)  # type: ignore[arg-type]
)
"""A model with all terms 0, the default for terms that no sample contains."""


def fit_cost_model(
    steps: Sequence[StepSample],
    loads: Sequence[LoadSample],
    lora: Lora,
    unseen: CostModel = UNSEEN,
    held_out_every: int = HELD_OUT_EVERY,
) -> tuple[CostModel, Residuals]:
    """Return the fitted model and its errors on held-out steps. Every ``held_out_every``-th step is held out.

    ``unseen`` provides the coefficients of terms that no sample contains, such as the terms of the other LoRA kernels.
    Raises ValueError if there are too few samples or a duration used in the fit is not positive and finite.
    """
    seen = [sample for index, sample in enumerate(steps) if not _held_out(index, held_out_every)]
    rest = [sample for index, sample in enumerate(steps) if _held_out(index, held_out_every)]
    found = _coefficients("steps", seen, {**STEP_TERMS, **LORA_TERMS[lora]})
    found |= _coefficients("loads", loads, LOAD_TERMS)
    cost = msgspec.structs.replace(unseen, lora=lora, **found)
    return cost, measure_residuals(cost, rest, len(steps))


def measure_residuals(cost: CostModel, held_out: Sequence[StepSample], samples: int) -> Residuals:
    """Return the errors of ``cost`` on ``held_out``. Raises ValueError if it is empty. ``samples`` counts all steps."""
    if not held_out:
        raise ValueError(f"of {samples} steps none is left to test the fit with; measure more")
    errors = [abs(cost.step_s(shape) - seconds) / seconds for shape, seconds in held_out]
    median, p90 = np.quantile(errors, (0.5, 0.9))
    return Residuals(samples=samples, held_out=len(held_out), median=float(median), p90=float(p90))


def _held_out(index: int, every: int) -> bool:
    return index % every == every - 1


def _coefficients(
    what: str, samples: Sequence[tuple[Sample, float]], terms: Mapping[str, Callable[[Sample], float]]
) -> dict[str, float]:
    """Return the coefficients with the least relative errors, for all terms that at least one sample contains."""
    seconds = np.array([taken for _, taken in samples])
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError(f"{what}: each sample must take a positive, finite number of seconds")
    amounts = {name: np.array([amount(sample) for sample, _ in samples]) for name, amount in terms.items()}
    present = {name: column for name, column in amounts.items() if column.any()}
    if len(samples) <= len(present):
        raise ValueError(
            f"{what}: {len(samples)} samples are too few to fit {max(len(present), 1)} terms with; "
            f"measure at least {max(len(present), 1) + 1}"
        )
    return dict(zip(present, _solve(np.stack(list(present.values()), axis=1), seconds), strict=True))


def _solve(amounts: NDArray[np.float64], seconds: NDArray[np.float64]) -> list[float]:
    """Return the coefficient of each column of ``amounts``. Scales the columns, whose magnitudes differ widely."""
    relative = amounts / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    solution, _ = nnls(relative / scale, np.ones(len(seconds)))
    return [float(value) for value in solution / scale]
