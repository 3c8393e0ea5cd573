"""``python -m loraserve.ping NAME --config FILE``: exit status 0 if a process is ready, 1 if not, 2 on ConfigError."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from loraserve.bus.zmq import open_bus
from loraserve.config import Config, load_config
from loraserve.errors import ConfigError, LoraServeError
from loraserve.messages import Ping, Pong

DEFAULT_TIMEOUT_S = 5.0


async def ping(config: Config, name: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> Pong:
    """Ask the process ``name`` for its state. Raises RequestTimeoutError, PeerError or ConfigError."""
    # A bus without an inbox binds no addresses, so it cannot conflict with another process.
    bus = open_bus(config, f"ping-{os.getpid()}", None)
    try:
        return await bus.request(name, Ping(), Pong, timeout_s)
    finally:
        await bus.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loraserve.ping", description=__doc__)
    parser.add_argument("name", help="the process to ask, such as router or engine-0")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the cluster's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--timeout-s", type=float, default=DEFAULT_TIMEOUT_S)
    arguments = parser.parse_args(argv)
    try:
        pong = asyncio.run(
            ping(load_config(arguments.config, overrides=arguments.set), arguments.name, arguments.timeout_s)
        )
    except ConfigError as error:
        print(f"ping: {error}", file=sys.stderr)
        return 2
    except LoraServeError as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        return 1
    print(f"{pong.name}: {pong.state}" + (f" ({pong.detail})" if pong.detail else ""))
    return 0 if pong.state == "READY" else 1


if __name__ == "__main__":
    raise SystemExit(main())
