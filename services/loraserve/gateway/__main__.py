"""Entry point of the gateway process: ``python -m loraserve.gateway --config FILE``."""

import os
import sys

# Keep transformers from importing torch: the import takes seconds and 250 MB, and the tokenizer does not need it.
sys.modules["torch"] = None  # type: ignore[assignment]
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from loraserve.gateway.service import GatewayService  # noqa: E402
from loraserve.process import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(GatewayService, "gateway-0"))
