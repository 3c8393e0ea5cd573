"""Which engines could serve a request at all, and in which words it is refused where none can. Pure."""

import numpy as np
import numpy.typing as npt

from loraserve.cost import extent_bytes
from loraserve.messages import Rejected, Route
from loraserve.router.choice import rejected
from loraserve.router.table import PriceTable

Mask = npt.NDArray[np.bool_]


def able_columns(request: Route, table: PriceTable) -> Mask | None:
    """Where the context and, by size, the adapter fit; None where that is everywhere."""
    tokens = len(request.prompt_tokens)
    # Extents are of whole granules, so that a slab that is no larger than one fits into it.
    slab_bytes = request.adapter.slab_bytes if request.adapter is not None else 0
    if tokens < table.least_longest_tokens and slab_bytes <= table.least_extent_bytes:
        return None
    columns = table.columns
    return (columns.longest_tokens > tokens) & (columns.largest_extent_bytes >= slab_bytes)


def no_engine(request: Route) -> Rejected:
    return rejected(request, "no_engine", "no engine is ready; try again in a moment")


def unfit(request: Route, table: PriceTable) -> Rejected:
    """No ready engine is able."""
    length = len(request.prompt_tokens)
    longest = float(table.columns.longest_tokens.max())
    if longest <= length:
        text = (
            f"This model's maximum context length is {longest:.0f} tokens. However, your prompt has {length}; "
            "shorten it."
        )
        return rejected(request, "context_length", text)
    assert request.adapter is not None
    text = (
        f"adapter {request.adapter.name} needs an extent of {extent_bytes(request.adapter.slab_bytes)} bytes, more "
        "than the pool of any engine that is ready can give; raise engine.pool_bytes"
    )
    return rejected(request, "adapter_unavailable", text)
