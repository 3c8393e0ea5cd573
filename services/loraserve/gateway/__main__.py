"""``python -m loraserve.gateway --config FILE``."""

import sys

from loraserve.gateway.service import GatewayService
from loraserve.process import main

if __name__ == "__main__":
    sys.exit(main(GatewayService, "gateway-0"))
