"""The flags and the help of the operators' commands."""

import argparse
import os

DEFAULT_URL = "http://127.0.0.1:8000"

STATUS = """\
examples:
  scripts/status                      who is up, what each engine holds and does, what is asked for
  scripts/status --watch              the same every 2 s, until Ctrl-C
  scripts/status --json | jq '.engines[].load.queue.waiting'

what the columns mean:
  KV CACHE      blocks of the KV cache in use by requests and by the prefix cache, which gives them back when wanted
  ADAPTER POOL  memory for adapters in use; what is not pinned goes first when another adapter needs room
  DECODE STEP   time of the engine's last decode steps: one token for each running request
  FORECAST      tokens per second that the planner expects of each adapter and places copies by
"""

REBALANCE = """\
examples:
  scripts/rebalance --dry-run         what would move, and why; changes nothing
  scripts/rebalance                   plan from the demand seen so far and make it so, now
  scripts/rebalance --json | jq .moves

GAIN is how much sooner 95 of 100 requests are predicted to start after the move; one for memory or a drain has none.
New copies are loaded before requests are sent to them, and old ones go once nobody runs them: no request fails.
The planner does the same by itself every planner.interval_s. The exit status is 1 when something could not be done.
"""

DRAIN = """\
examples:
  scripts/drain engine-1              empty it: no new requests, its copies move elsewhere, what runs there finishes
  scripts/drain engine-1 --timeout 60 give up waiting after a minute; it goes on draining all the same
  scripts/undrain engine-1            use it again

Ends once the engine has no request and no planned copy, so that it can be stopped or worked on. A drain outlives
restarts of the engine and of the planner. The exit status is 1 when the engine is not empty in the end, as where no
other engine is there to take over.
"""

UNDRAIN = """\
examples:
  scripts/undrain engine-1            use a drained engine again; copies come back as demand asks for them
"""

STORY = """\
examples:
  scripts/story chatcmpl-81f3...      a request, by the "id" of its answer or its x-request-id header
  scripts/story support               an adapter, by its name or its version: loads, sources, evictions, copies
  scripts/story support --json | jq '.entries[].text'

Every process keeps the latest events of some thousand requests and adapters in memory; a restarted process has none
from before. Times are of each process's own clock. SUBJECT is a choice of an answer (id-0, id-1), a name or a version.
"""

ADAPTERS = """\
examples:
  scripts/adapters                              what is loaded: rank, size, version
  scripts/adapters load support ./support-r16   check, pack and serve a PEFT folder under the name "support"
  scripts/adapters load support ./support-r32 --replace
                                                a new version under the same name; running requests finish on the old
  scripts/adapters unload support               stop serving it

DIR is read by the store: where that runs elsewhere (in a container, on another machine), give the path it has there.
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m loraserve.ops", description="Look after a running LoRAServe cluster.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = _command(commands, "status", "Shows how a running cluster is: processes, engines, adapters.", STATUS)
    status.add_argument("--watch", action="store_true", help="again every 2 s, until Ctrl-C")
    rebalance = _command(commands, "rebalance", "Places adapters anew from the demand seen so far.", REBALANCE)
    rebalance.add_argument("--dry-run", action="store_true", help="say what would move, change nothing")
    drain = _command(commands, "drain", "Empties an engine, and waits until it is empty.", DRAIN)
    drain.add_argument("engine", metavar="ENGINE", help="such as engine-1; scripts/status lists them")
    drain.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="wait no longer (600)")
    undrain = _command(commands, "undrain", "Uses a drained engine again.", UNDRAIN)
    undrain.add_argument("engine", metavar="ENGINE")
    story = _command(commands, "story", "Show what happened to a request or an adapter, in every process.", STORY)
    story.add_argument("id", metavar="ID", help="a request id, an adapter's name or a version (12 characters or more)")
    adapters = _command(commands, "adapters", "Lists, loads and unloads the adapters of a running cluster.", ADAPTERS)
    actions = adapters.add_subparsers(dest="action", metavar="list | load NAME DIR [--replace] | unload NAME")
    # The flags may also stand behind the action; there they have no default, which would undo those before it.
    shared = _shared(argparse.SUPPRESS)
    actions.add_parser("list", parents=[shared], help="what is loaded (what is done when nothing is named)")
    load = actions.add_parser("load", parents=[shared], help="check a PEFT folder and serve it under a name")
    load.add_argument("name", metavar="NAME", help='what clients put into "model"')
    load.add_argument("dir", metavar="DIR", help="folder with adapter_config.json and adapter_model.safetensors")
    load.add_argument("--replace", action="store_true", help="also where the name is taken")
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
    flags.add_argument("--url", default=url, help=f"the gateway (LORASERVE_URL, else {DEFAULT_URL})")
    flags.add_argument("--api-key", default=key, metavar="KEY", help="where the gateway wants one (LORASERVE_API_KEY)")
    flags.add_argument("--json", action="store_true", default=default or False, help="for programs: JSON, one line")
    return flags
