"""Runs the store: ``python -m loraserve.store --config FILE``."""

import sys

from loraserve.process import main
from loraserve.store.service import StoreService

if __name__ == "__main__":
    sys.exit(main(StoreService, "store"))
