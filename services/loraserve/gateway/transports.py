"""Over which transports engines read adapters from each other, for /admin/cluster. Pure."""

from collections.abc import Sequence

from loraserve.messages import EngineLoad
from loraserve.transfer.choice import choose
from loraserve.transfer.protocol import Transport

MOST_ENGINES = 64
"""A table of pairs is of no use to anybody beyond, and takes long to make."""


def reads_from(loads: Sequence[EngineLoad], preferred: Sequence[Transport]) -> dict[str, dict[str, list[str]]]:
    """By reader and owner, the transports that carry between the two, first choice first; the store does always."""
    able = {load.engine: load.abilities for load in loads if load.abilities is not None}
    if len(able) > MOST_ENGINES:
        return {}
    return {
        reader: {
            owner: list(choose(mine, theirs, preferred)) for owner, theirs in sorted(able.items()) if owner != reader
        }
        for reader, mine in able.items()
    }
