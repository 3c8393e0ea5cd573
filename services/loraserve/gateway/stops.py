"""Stop strings: found across token boundaries, with nothing sent that might turn out to belong to one. Pure."""

from collections.abc import Sequence


class StopMatcher:
    """Watches one output for the first stop string to complete; of several that do at once, the longest.

    Looks at each character once per stop string, however the text is cut into tokens.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.matched: str | None = None
        self._include = include
        # Longest first, so that the first to match at a character is the longest.
        self._stops = sorted((stop for stop in stops if stop), key=len, reverse=True)
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._progress = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is safe to send. Once ``matched`` is set the output is over and nothing more comes."""
        if self.matched is not None or not self._stops:
            return "" if self._stops else text
        held = self._held + text
        end = len(self._held)
        for character in text:
            end += 1
            stop = self._advance(character)
            if stop is not None:
                self.matched, self._held = stop, ""
                return held[:end] if self._include else held[: end - len(stop)]
        keep = max(self._progress)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when the output ends without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        for index, stop in enumerate(self._stops):
            table, matched = self._tables[index], self._progress[index]
            while matched and stop[matched] != character:
                matched = table[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                return stop
            self._progress[index] = matched
        return None


def _failure_table(stop: str) -> list[int]:
    """Knuth-Morris-Pratt: per position, the length of the longest proper prefix that is also a suffix there."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
