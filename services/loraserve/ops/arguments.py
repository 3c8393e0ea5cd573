"""Defines the flags and help texts of the operator commands."""

import argparse
import os

DEFAULT_URL = "http://127.0.0.1:8000"

STATUS = """\
examples:
  scripts/status                      processes, engines, adapters and demand
  scripts/status --watch              repeat every 2 s until Ctrl-C
  scripts/status --json | jq '.engines[].load.waiting'

what the columns mean:
  KV CACHE      blocks used by requests and by the prefix cache; requests that need blocks take those of the cache
  ADAPTER POOL  adapter memory in use; adapters without a pin are evicted first when another one needs room
  DECODE STEP   duration of the last decode steps; each gives every running request one token
  FORECAST      tokens per second that the planner expects for each adapter and places copies by
"""

REBALANCE = """\
examples:
  scripts/rebalance --dry-run         print what would move, and why; changes nothing
  scripts/rebalance                   plan from the demand seen so far and apply the plan now
  scripts/rebalance --json | jq .moves

GAIN is the predicted decrease of the P95 time to first token by the move. Moves that free memory or drain an engine
have no gain. No request fails: new copies are loaded before requests are sent to them, and old copies are released when
no request uses them. The planner also makes a plan by itself every planner.interval_s seconds.
The exit status is 1 if a part of the plan failed.
"""

DRAIN = """\
examples:
  scripts/drain engine-1              no new requests, copies move to other engines, running requests finish
  scripts/drain engine-1 --timeout 60 stop waiting after a minute; the engine continues to drain
  scripts/undrain engine-1            use it again

The command ends when the engine has no request and no planned copy. The engine can then be stopped. A drain survives
restarts of the engine and of the planner. The exit status is 1 if the engine is not empty at the end,
for example because no other engine can take its copies.
"""

UNDRAIN = """\
examples:
  scripts/undrain engine-1            use a drained engine again; it gets copies as demand requires
"""

STORY = """\
examples:
  scripts/story chatcmpl-81f3...      a request, by the "id" of its answer or its x-request-id header
  scripts/story support               an adapter, by its name or its version: loads, sources, evictions, copies
  scripts/story support --json | jq '.entries[].text'

Every process keeps the latest events of several thousand requests and adapters in memory, until it restarts. Times are
from the clock of the process that recorded the event. SUBJECT is the id of a request, or an adapter's name or version.
A request for several choices has one id for each choice: id-0, id-1 and so on.
"""

ADAPTERS = """\
examples:
  scripts/adapters                              list adapters with rank, size and version
  scripts/adapters load support ./support-r16   check, pack and serve a PEFT folder as "support"
  scripts/adapters load support ./support-r32 --replace
                                                a new version under this name; running requests keep the old one
  scripts/adapters unload support               stop serving it

The store reads DIR. If it runs in a container or on another machine, give the path that the folder has there.
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m loraserve.ops", description="Operate a running LoRAServe cluster.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = _command(
        commands, "status", "Show the processes, engines, adapters and demand of a running cluster.", STATUS
    )
    status.add_argument("--watch", action="store_true", help="repeat every 2 s until Ctrl-C")
    rebalance = _command(commands, "rebalance", "Plan and move adapters now, from the demand seen so far.", REBALANCE)
    rebalance.add_argument("--dry-run", action="store_true", help="print what would move; change nothing")
    drain = _command(commands, "drain", "Empty an engine and wait until it is empty.", DRAIN)
    drain.add_argument("engine", metavar="ENGINE", help="such as engine-1; scripts/status lists them")
    drain.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="stop waiting after this time (600)"
    )
    undrain = _command(commands, "undrain", "Let a drained engine receive copies and requests again.", UNDRAIN)
    undrain.add_argument("engine", metavar="ENGINE")
    story = _command(commands, "story", "Show what happened to a request or an adapter, in every process.", STORY)
    story.add_argument("id", metavar="ID", help="a request id, an adapter's name or a version (12 characters or more)")
    adapters = _command(commands, "adapters", "List, load and unload the adapters of a running cluster.", ADAPTERS)
    actions = adapters.add_subparsers(dest="action", metavar="list | load NAME DIR [--replace] | unload NAME")
    # The shared flags may also follow the action. A default there would override a flag before the action.
    shared = _shared(argparse.SUPPRESS)
    actions.add_parser("list", parents=[shared], help="list the adapters (the default)")
    load = actions.add_parser("load", parents=[shared], help="check a PEFT folder and serve it under a name")
    load.add_argument("name", metavar="NAME", help='the name that clients send as "model"')
    load.add_argument("dir", metavar="DIR", help="folder with adapter_config.json and adapter_model.safetensors")
    load.add_argument("--replace", action="store_true", help="replace an adapter of this name")
    unload = actions.add_parser("unload", parents=[shared], help="stop serving an adapter")
    unload.add_argument("name", metavar="NAME")
    return top


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        prog=f"scripts/{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_shared()],
        allow_abbrev=False,
    )


def _shared(default: str = "") -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    url = default or os.environ.get("LORASERVE_URL") or DEFAULT_URL
    key = default or os.environ.get("LORASERVE_API_KEY", "")
    flags.add_argument("--url", default=url, help=f"URL of the gateway (default: LORASERVE_URL, else {DEFAULT_URL})")
    flags.add_argument(
        "--api-key",
        default=key,
        metavar="KEY",
        help="API key, if the gateway requires one (default: LORASERVE_API_KEY)",
    )
    flags.add_argument("--json", action="store_true", default=default or False, help="print one line of JSON")
    return flags
