"""Entry point of the monitor process: ``python -m loraserve.monitor --config FILE``."""

import sys

from loraserve.monitor.service import MonitorService
from loraserve.process import main

if __name__ == "__main__":
    sys.exit(main(MonitorService, "monitor"))
