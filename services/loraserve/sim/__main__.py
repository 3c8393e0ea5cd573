"""``python -m loraserve.sim``: what scripts/simulate runs."""

import sys

from loraserve.sim.command import main

if __name__ == "__main__":
    sys.exit(main())
