"""What /v1/models says of adapters, for people. Pure."""

import msgspec

from loraserve.ops.http import OpsError
from loraserve.ops.text import size, table

VERSION_CHARACTERS = 12


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of /v1/models; the base model has no ``parent``."""

    id: str
    parent: str | None = None
    version: str = ""
    rank: int = 0
    slab_bytes: int = 0


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    data: tuple[ModelCard, ...]


def parse(content: bytes) -> list[ModelCard]:
    """The adapters by name. Raises OpsError where that is not the answer of a gateway."""
    try:
        models = msgspec.json.decode(content, type=ModelList).data
    except msgspec.DecodeError as error:
        raise OpsError(f"the answer is not a LoRAServe gateway's ({error}); see --url") from error
    return sorted((model for model in models if model.parent), key=lambda model: model.id)


def render(adapters: list[ModelCard]) -> str:
    if not adapters:
        return "no adapter is loaded; scripts/adapters load NAME DIR loads one"
    rows = [[a.id, str(a.rank), size(a.slab_bytes), a.version[:VERSION_CHARACTERS]] for a in adapters]
    return table(["ADAPTER", "RANK", "SIZE", "VERSION"], rows)
