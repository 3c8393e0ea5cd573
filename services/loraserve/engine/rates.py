"""Rates measured on this engine, smoothed. Pure."""

SMOOTHING = 0.1
"""Weight of the newest observation: ten steps set the picture, one slow step does not."""


class Rates:
    """What EngineLoad reports as measured: seconds per decode step, prefill tokens/s, load bytes/s."""

    def __init__(self) -> None:
        self.decode_step_s = 0.0
        self.prefill_tokens_per_s = 0.0
        self.load_bytes_per_s = 0.0

    def step_done(self, prefill_tokens: int, duration_s: float, times: int = 1) -> None:
        """Count one step, or ``times`` alike. Those with prefill say nothing about decoding."""
        if duration_s <= 0:
            return
        if prefill_tokens:
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, prefill_tokens / duration_s)
        else:
            self.decode_step_s = _smooth(self.decode_step_s, duration_s, times)

    def load_done(self, bytes_per_s: float) -> None:
        """Count one finished load."""
        self.load_bytes_per_s = _smooth(self.load_bytes_per_s, bytes_per_s)


def _smooth(old: float, new: float, times: int = 1) -> float:
    return new if old == 0.0 else new + (1 - SMOOTHING) ** times * (old - new)
