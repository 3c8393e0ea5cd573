"""Our side of the HTTP comparisons: a real cluster on a free port, in a data folder of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraserve.testing.local_cluster import LocalCluster


class OurCluster(LocalCluster):
    """A local cluster that serves ``model``. ``settings`` are section.key=value."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        adapters: Mapping[str, Path],
        engines: int,
        settings: Sequence[str] = (),
    ) -> None:
        flags = ["--model", str(model), "--name", model.name, "--engines", str(engines)]
        flags += [f"--set={setting}" for setting in settings]
        super().__init__(folder, *flags, adapters=adapters)
        self._model = model.name

    def __enter__(self) -> "OurCluster":
        self.up()
        return self

    def body(self, adapter: str) -> dict[str, Any]:
        return {"model": adapter or self._model}
