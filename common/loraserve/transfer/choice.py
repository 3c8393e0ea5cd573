"""Which transports can carry bytes between two processes, best first: decided on what both announce."""

from collections.abc import Sequence

import msgspec

from loraserve.transfer.protocol import PROTOCOL, Transport


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a process announces of itself.

    ``host`` is the machine's boot, ``neighbourhood`` within it those processes that can open each other's memory: of
    one user and in the same namespaces. "" is unknown and never the same as another's.
    """

    protocol: int
    host: str
    neighbourhood: str
    transports: tuple[str, ...]
    device: str
    """Where its pool lies: ``cpu`` or ``cuda``."""


def choose(mine: Abilities, theirs: Abilities, preferred: Sequence[Transport]) -> tuple[Transport, ...]:
    """The transports of ``preferred``, in its order, that both offer and that reach from one to the other."""
    if not mine.protocol == theirs.protocol == PROTOCOL:
        return ()
    offered = [each for each in preferred if each in mine.transports and each in theirs.transports]
    return tuple(each for each in offered if _reaches(each, mine, theirs))


def _reaches(transport: Transport, mine: Abilities, theirs: Abilities) -> bool:
    match transport:
        case "shm":
            return _neighbours(mine, theirs)
        case "cuda_ipc":
            return _neighbours(mine, theirs) and mine.device == theirs.device == "cuda"
        case "verbs" | "tcp":
            return True


def _neighbours(mine: Abilities, theirs: Abilities) -> bool:
    where = (mine.host, mine.neighbourhood)
    return all(where) and where == (theirs.host, theirs.neighbourhood)
