"""Runs an engine: ``python -m loraserve.engine --config FILE --name engine-0``."""

import sys

from loraserve.interrupts import hold_back_interrupts

with hold_back_interrupts():
    # Imported here and not in the service's model thread, where a signal could not interrupt the import.
    import loraserve.engine.compute.runner  # noqa: F401
    from loraserve.engine.service import EngineService
    from loraserve.process import main

if __name__ == "__main__":
    sys.exit(main(EngineService, "engine-0"))
