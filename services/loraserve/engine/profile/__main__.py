"""``python -m loraserve.engine.profile``: what scripts/profile runs."""

import sys

from loraserve.interrupts import interrupts_held_back

with interrupts_held_back():
    from loraserve.engine.profile.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
