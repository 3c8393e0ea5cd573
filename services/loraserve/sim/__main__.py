"""Run the simulator: ``python -m loraserve.sim``, which scripts/simulate calls."""

import sys

from loraserve.sim.command import main

if __name__ == "__main__":
    sys.exit(main())
