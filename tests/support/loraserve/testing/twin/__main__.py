"""Entry point of ``python -m loraserve.testing.twin``."""

from loraserve.testing.twin.command import main

if __name__ == "__main__":
    raise SystemExit(main())
