"""Runs an operator command: ``python -m loraserve.ops COMMAND``, as called by scripts/status and others."""

import sys

from loraserve.ops.commands import main

if __name__ == "__main__":
    sys.exit(main())
