"""Which engines there are to plan for, from the monitor's pictures. Pure."""

from loraserve.messages import ClusterLoad, EngineLoad

FORGET_MISSING_S = 5.0
"""A monitor that has just started has not heard of every engine yet: what it does not name is kept this long."""


class EngineBook:
    """Engines that are alive and READY, by their last reports."""

    def __init__(self) -> None:
        self._named_s: dict[str, float] = {}
        self._ready: dict[str, EngineLoad] = {}

    def update(self, picture: ClusterLoad, now: float) -> None:
        for seen in picture.engines:
            name = seen.load.engine
            self._named_s[name] = now
            if seen.alive and seen.load.state == "READY":
                self._ready[name] = seen.load
            else:
                self._ready.pop(name, None)
        for name in [name for name, named_s in self._named_s.items() if now - named_s > FORGET_MISSING_S]:
            del self._named_s[name]
            self._ready.pop(name, None)

    def ready(self) -> list[EngineLoad]:
        """In order of their names."""
        return [load for _, load in sorted(self._ready.items())]

    def names(self) -> set[str]:
        """All that were heard of lately, also those that are not ready."""
        return set(self._named_s)
