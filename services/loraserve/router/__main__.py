"""Run the router: ``python -m loraserve.router --config FILE``."""

import sys

from loraserve.process import main
from loraserve.router.service import RouterService

if __name__ == "__main__":
    sys.exit(main(RouterService, "router"))
