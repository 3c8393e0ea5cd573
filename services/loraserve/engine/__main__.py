"""``python -m loraserve.engine --config FILE --name engine-0``."""

import sys

from loraserve.interrupts import interrupts_held_back

with interrupts_held_back():
    # The service imports it in a thread, once it builds the model: too late for a signal to end an import at once.
    import loraserve.engine.compute.runner  # noqa: F401
    from loraserve.engine.service import EngineService
    from loraserve.process import main

if __name__ == "__main__":
    sys.exit(main(EngineService, "engine-0"))
