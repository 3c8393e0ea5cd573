"""Formats a profile as text tables."""

from collections.abc import Sequence

import numpy as np

from loraserve.cost.fit import StepSample
from loraserve.cost.profile import Profile
from loraserve.engine.profile.design import KINDS
from loraserve.text import table

UNITS = {
    "step_base_s": ("ms a step", 1e3),
    "sequence_s": ("ms a decoding sequence", 1e3),
    "kv_token_s": ("us a token of its context", 1e6),
    "prefill_token_s": ("ms a prefill token", 1e3),
    "prefill_kv_token_s": ("us a prefill token and token of its context", 1e6),
    "slab_byte_s": ("ms a MB of the adapters in the step", 1e9),
    "rank_token_s": ("us a token and unit of its rank", 1e6),
    "padded_prefill_s": ("us a prefill token and unit of the largest rank", 1e6),
    "padded_decode_s": ("us a decoding sequence and unit of the largest rank", 1e6),
    "load_base_s": ("ms a load", 1e3),
    "load_byte_s": ("ms a MB of a load", 1e9),
}
HIDDEN = {"exact": ("padded_prefill_s", "padded_decode_s"), "padded": ("slab_byte_s", "rank_token_s")}


def format_coefficients(profile: Profile) -> str:
    cost = profile.cost
    shown = {name: unit for name, unit in UNITS.items() if name not in HIDDEN[cost.lora]}
    rows = [[f"{getattr(cost, name) * factor:.4g}", text, name] for name, (text, factor) in shown.items()]
    return table(["COST", "OF", "NAME"], rows)


def format_errors(profile: Profile, kinds: Sequence[str], samples: Sequence[StepSample]) -> str:
    """Return a table with one row per kind of batch: count, step times and the cost model's error in percent."""
    rows = []
    for kind in KINDS:
        of_kind = [sample for name, sample in zip(kinds, samples, strict=True) if name == kind]
        if not of_kind:
            continue
        percent_off = [abs(profile.cost.step_s(shape) / seconds - 1) * 100 for shape, seconds in of_kind]
        times_ms = [seconds * 1e3 for _, seconds in of_kind]
        spread = [f"{value:.1f}" for value in (min(times_ms), float(np.median(times_ms)), max(times_ms))]
        rows.append(
            [kind, str(len(of_kind)), *spread, f"{np.median(percent_off):.1f}", f"{np.quantile(percent_off, 0.9):.1f}"]
        )
    return table(["BATCHES", "COUNT", "MIN MS", "MEDIAN MS", "MAX MS", "ERROR % MEDIAN", "P90"], rows)


def format_verdict(profile: Profile) -> str:
    residuals = profile.residuals
    assert residuals is not None, "the profile was not measured"
    return (
        f"{profile.model} on {profile.hardware}: held-out error {residuals.median:.1%} median, {residuals.p90:.1%} P90 "
        f"({residuals.held_out} of {residuals.samples} batches were held out)"
    )
