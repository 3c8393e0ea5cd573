"""The operators' commands, from arguments to output and exit status."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from loraserve.ops import adapters, rebalance, status
from loraserve.ops.arguments import parser
from loraserve.ops.drain import do_drain, do_undrain
from loraserve.ops.http import Ask, GatewayAddress, OpsError, exchange, patience
from loraserve.ops.text import one_line

WATCH_INTERVAL_S = 2.0
CLEAR_SCREEN = "\x1b[H\x1b[2J"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 could not be done, 2 wrong usage."""
    arguments = parser().parse_args(argv)
    ask = partial(exchange, GatewayAddress(arguments.url, arguments.api_key))
    run = COMMANDS[arguments.command]
    try:
        return run(arguments, ask)
    except OpsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough. What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def show_status(arguments: argparse.Namespace, ask: Ask) -> int:
    show_status_once(arguments, ask)
    while arguments.watch:
        time.sleep(WATCH_INTERVAL_S)
        try:
            show_status_once(arguments, ask)
        except OpsError as error:
            # Whoever watches a restart wants to see the cluster come back.
            print(f"error: {error}", file=sys.stderr)
    return 0


def show_status_once(arguments: argparse.Namespace, ask: Ask) -> None:
    with patience("asking the gateway"):
        content = ask("/admin/cluster", None)
    state = status.parse(content)
    if arguments.json:
        print(one_line(content), flush=True)
        return
    clear = CLEAR_SCREEN if arguments.watch and sys.stdout.isatty() else ""
    print(clear + status.render(state), end="\n\n" if arguments.watch else "\n", flush=True)


def do_rebalance(arguments: argparse.Namespace, ask: Ask) -> int:
    with patience("planning" if arguments.dry_run else "planning and loading adapters"):
        content = ask("/admin/rebalance", {"dry_run": arguments.dry_run})
    done = rebalance.parse(content)
    print(one_line(content) if arguments.json else rebalance.render(done, arguments.dry_run))
    return rebalance.exit_status(done)


def do_adapters(arguments: argparse.Namespace, ask: Ask) -> int:
    match arguments.action:
        case "load":
            said = load_adapter(arguments.name, arguments.dir, arguments.replace, ask)
        case "unload":
            with patience(f"unloading {arguments.name}"):
                said = ask("/v1/unload_lora_adapter", {"lora_name": arguments.name})
        case _:
            return list_adapters(arguments, ask)
    text = said.decode(errors="replace")
    print(msgspec.json.encode({"adapter": arguments.name, "message": text}).decode() if arguments.json else text)
    return 0


def load_adapter(name: str, folder: str, replace: bool, ask: Ask) -> bytes:
    body = {"lora_name": name, "lora_path": store_path(folder), "load_inplace": replace}
    try:
        with patience(f"checking and packing {name}"):
            return ask("/v1/load_lora_adapter", body)
    except OpsError as error:
        if error.code != "duplicate":
            raise
        raise OpsError(f"an adapter named {name} is loaded already; --replace puts this one in its place") from error


def list_adapters(arguments: argparse.Namespace, ask: Ask) -> int:
    found = adapters.parse(ask("/v1/models", None))
    print(msgspec.json.encode(found).decode() if arguments.json else adapters.render(found))
    return 0


def store_path(text: str) -> str:
    """A folder that is here is named in full, for the store was started elsewhere; any other is the store's to find."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.is_dir() else text


COMMANDS: dict[str, Callable[[argparse.Namespace, Ask], int]] = {
    "status": show_status,
    "rebalance": do_rebalance,
    "drain": do_drain,
    "undrain": do_undrain,
    "adapters": do_adapters,
}
