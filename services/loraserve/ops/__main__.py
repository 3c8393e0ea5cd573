"""``python -m loraserve.ops COMMAND``: what scripts/status, scripts/rebalance and scripts/adapters run."""

import sys

from loraserve.ops.commands import main

if __name__ == "__main__":
    sys.exit(main())
