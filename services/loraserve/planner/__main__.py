"""Run the planner process: ``python -m loraserve.planner --config FILE``."""

import sys

from loraserve.planner.service import PlannerService
from loraserve.process import main

if __name__ == "__main__":
    sys.exit(main(PlannerService, "planner"))
