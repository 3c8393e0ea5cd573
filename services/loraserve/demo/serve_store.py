"""Prepares the demo model and adapters in the data folder, then runs the store, which registers the adapters.

The store's container runs this module. All other containers wait until the store is healthy.
"""

import os
import sys
from typing import NoReturn

import msgspec

from loraserve.demo import demo_adapters
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.errors import ConfigError


def main() -> NoReturn:
    """Prepare the demo files and replace this process by the store. Exits with status 2 if the preparation fails."""
    data_dir = default_data_dir()
    try:
        prepare_model(data_dir, say)
        adapters = {adapter.name: str(adapter.path) for adapter in demo_adapters(data_dir, say)}
    except ConfigError as error:
        say(f"error: {error}")
        raise SystemExit(2) from error
    setting = f"store.adapters={msgspec.json.encode(adapters).decode()}"
    os.execv(sys.executable, [sys.executable, "-m", "loraserve.store", *sys.argv[1:], "--set", setting])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
