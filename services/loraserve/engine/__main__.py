"""``python -m loraserve.engine --config FILE --name engine-0``."""

import sys

from loraserve.interrupts import hold_back_interrupts

with hold_back_interrupts():
    # The service imports it in a thread, once it builds the model: too late for a signal to end an import at once.
    import loraserve.engine.compute.runner  # noqa: F401
    from loraserve.engine.service import EngineService
    from loraserve.process import main

if __name__ == "__main__":
    sys.exit(main(EngineService, "engine-0"))
