"""Runs the profiler: ``python -m loraserve.engine.profile``, as called by scripts/profile."""

import sys

from loraserve.interrupts import hold_back_interrupts

with hold_back_interrupts():
    from loraserve.engine.profile.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
