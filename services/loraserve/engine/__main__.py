"""``python -m loraserve.engine --config FILE --name engine-0``."""

import sys

from loraserve.interrupts import interrupts_held_back

with interrupts_held_back():
    from loraserve.engine.service import EngineService
    from loraserve.process import main

if __name__ == "__main__":
    sys.exit(main(EngineService, "engine-0"))
