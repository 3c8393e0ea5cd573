"""The `loraserve up`, `down` and `restart` commands, which run a cluster on one machine."""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from loraserve.bus.addresses import NameClaim, make_private_dir
from loraserve.config import Config, check_pins, engine_count, load_config
from loraserve.cost.profile import find_profile
from loraserve.demo import demo_adapters
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.errors import ConfigError, LoraServeError
from loraserve.listener import bind
from loraserve.process import Parent
from loraserve.supervisor.preflight import check_disk, check_model, check_not_running
from loraserve.supervisor.rolling import RollingRestart, select_processes
from loraserve.supervisor.state import (
    CONFIG_NAME,
    RunState,
    clear_run_dir,
    is_ours,
    read_state,
    stop_cluster,
    write_state,
)
from loraserve.supervisor.up import Supervisor, base_url

STARTED_S = time.monotonic()
DETACH_POLL_S = 0.2
STOP_TIMEOUT_S = 20.0

SETTING_FLAGS = {
    "model": "model.path",
    "name": "model.name",
    "engines": "cluster.engines",
    "gateways": "cluster.gateways",
    "device": "engine.device",
    "host": "gateway.host",
    "port": "gateway.port",
    "data": "cluster.data_dir",
}
UP_EXAMPLES = """\
examples:
  scripts/up                                       demo model, four demo adapters, two engines
  scripts/up --detach                              return once the cluster serves; stop it with scripts/down
  scripts/up --model DIR --adapter support=DIR2    your own model and adapter
  scripts/up --engines 4 --gateways 2 --port 9000  four engines, two gateways, another port
  scripts/up --set engine.pool_bytes=2147483648    any setting of loraserve/config.py
"""
RESTART_EXAMPLES = """\
examples:
  scripts/restart                                  every process, one after the other
  scripts/restart gateway-0 engine-1               these two
  scripts/restart engine-0 --force                 the only engine; requests wait or get 503 meanwhile

Requests do not fail. A gateway finishes its streams within gateway.drain_timeout_s. New connections go to the other
gateways, or wait for the new process. An engine is stopped only while another one is ready, which continues its
requests. A process is stopped when the one before it is ready again. The exit status is 1 if a process did not come
back, or had to be killed. In containers, use docker compose restart SERVICE.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `loraserve` command. Returns the exit status."""
    raw = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(raw)
    arguments.raw = raw
    try:
        return int(arguments.run(arguments))
    except LoraServeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


def up(arguments: argparse.Namespace) -> int:
    """Start the cluster and supervise it until it is stopped. With --detach, return when it is ready."""
    config = _configuration(arguments)
    run_dir = Path(config.cluster.run_dir)
    check_pins(config)
    check_not_running(run_dir)
    listener = bind(config.gateway.host, config.gateway.port)
    # Port 0 is replaced by the port that the system has chosen.
    gateway = msgspec.structs.replace(config.gateway, port=listener.getsockname()[1])
    config = msgspec.structs.replace(config, gateway=gateway)
    for folder in (Path(config.cluster.log_dir), Path(config.cluster.data_dir)):
        _make_folder(folder)
    make_private_dir(run_dir)
    check_disk(Path(config.cluster.data_dir))
    if arguments.detach:
        listener.close()
        return _detach(arguments, config)
    with NameClaim(run_dir, "up"):
        try:
            _serve(config, arguments, listener)
        finally:
            listener.close()
            clear_run_dir(run_dir)
    return 0


def _serve(config: Config, arguments: argparse.Namespace, listener: socket.socket) -> None:
    cluster = config.cluster
    # `down` sends SIGTERM, possibly while the demo model is downloaded. Until the supervisor installs its own handlers,
    # SIGTERM must raise KeyboardInterrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parent = Parent(arguments.parent_pid) if arguments.parent_pid else None
    # Written before the model is prepared, so that `down` and a second `up` find this process.
    write_state(
        Path(cluster.run_dir), RunState(pid=os.getpid(), url=base_url(config), log_dir=cluster.log_dir, model="")
    )
    config, adapters = _with_model(config, arguments)
    find_profile(config)  # Reports an unusable profile here instead of in the log of each process.
    supervisor = Supervisor(config, adapters, _say, listener)
    asyncio.run(supervisor.run(lambda: _announce(config, adapters), parent))


def down(arguments: argparse.Namespace) -> int:
    """Stop the cluster in the configured run folder, if one runs."""
    run_dir = Path(_configuration(arguments).cluster.run_dir)
    state = read_state(run_dir)
    if state is None:
        _say(f"no cluster runs in {run_dir}")
        return 0
    _say(f"stopping {len(state.processes)} processes")
    stop_cluster(run_dir, state, STOP_TIMEOUT_S)
    _say("stopped")
    return 0


def restart(arguments: argparse.Namespace) -> int:
    """Restart processes of the running cluster, one after the other."""
    run_dir = Path(_configuration(arguments).cluster.run_dir)
    state = read_state(run_dir)
    if state is None or not is_ours(state.pid):
        raise ConfigError(
            f"no cluster runs in {run_dir}; start one with scripts/up, or name its folder with --data DIR"
        )
    if not state.ready:
        raise ConfigError(
            f"the cluster in {run_dir} is still starting; try again when scripts/up reports that it is ready"
        )
    config = load_config(run_dir / CONFIG_NAME, environ={})
    names = select_processes(config, arguments.process, arguments.force)
    with NameClaim(run_dir, "restart"):
        killed = asyncio.run(RollingRestart(config, arguments.timeout, arguments.force, _say).run(names))
    if killed:
        raise LoraServeError(f"restarted, but {', '.join(killed)} had to be killed; requests may have failed")
    _say(f"restarted {', '.join(names)}")
    return 0


def _with_model(config: Config, arguments: argparse.Namespace) -> tuple[Config, dict[str, Path]]:
    data_dir = Path(config.cluster.data_dir)
    adapters = {}
    if config.model.path:
        check_model(Path(config.model.path))
        path = Path(config.model.path).resolve()
    else:
        _say("preparing the demo model (first start only)")
        path = prepare_model(data_dir, _say)
        adapters = {adapter.name: adapter.path for adapter in demo_adapters(data_dir, _say)}
    adapters.update(_named_folder(text) for text in arguments.adapter)
    model = msgspec.structs.replace(config.model, path=str(path), name=config.model.name or path.name)
    return msgspec.structs.replace(config, model=model), adapters


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise ConfigError(f"--adapter {text}: write NAME=DIR")
    return name, Path(folder).resolve()


def _configuration(arguments: argparse.Namespace) -> Config:
    """Return the configuration. Flags override all other settings. Unset folders are under the data folder."""
    flags = {key: getattr(arguments, flag, None) for flag, key in SETTING_FLAGS.items()}
    overrides = [f"{key}={value}" for key, value in flags.items() if value is not None]
    config = load_config(arguments.config, overrides=[*arguments.set, *overrides])
    cluster = config.cluster
    data_dir = Path(cluster.data_dir).absolute() if cluster.data_dir else default_data_dir()
    cluster = msgspec.structs.replace(
        cluster,
        data_dir=str(data_dir),
        run_dir=cluster.run_dir or str(data_dir / "run"),
        log_dir=cluster.log_dir or str(data_dir / "logs"),
    )
    # The number of engines is stored, so that all processes use the same number.
    cluster = msgspec.structs.replace(cluster, engines=engine_count(config))
    return msgspec.structs.replace(config, cluster=cluster)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create {folder}: {error.strerror}; choose another with --data DIR") from error


def _detach(arguments: argparse.Namespace, config: Config) -> int:
    """Run the same command in a new session. Show its output until the cluster is ready or has failed."""
    log_file = Path(config.cluster.log_dir) / "up.log"
    command = [sys.executable, "-m", "loraserve.cluster", *[a for a in arguments.raw if a != "--detach"]]
    log_file.write_bytes(b"")
    with log_file.open("ab") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        return _show_output(child, log_file, Path(config.cluster.run_dir))
    except KeyboardInterrupt:
        _say("stopping")
        stop_cluster(Path(config.cluster.run_dir), _state_of(child, config), STOP_TIMEOUT_S)
        raise


def _show_output(child: "subprocess.Popen[bytes]", log_file: Path, run_dir: Path) -> int:
    """Copy the child's output to stderr. Returns 0 when the cluster is ready, nonzero if the child ends."""
    with log_file.open() as output:
        while True:
            ended = child.poll() is not None
            state = read_state(run_dir)
            ready = state is not None and state.ready and state.pid == child.pid
            sys.stderr.write(output.read())
            sys.stderr.flush()
            if ended:
                return child.returncode or 1
            if ready:
                return 0
            time.sleep(DETACH_POLL_S)


def _state_of(child: "subprocess.Popen[bytes]", config: Config) -> RunState:
    state = read_state(Path(config.cluster.run_dir))
    if state is not None and state.pid == child.pid:
        return state
    return RunState(pid=child.pid, url=base_url(config), log_dir=config.cluster.log_dir, model="")


def _announce(config: Config, adapters: Mapping[str, Path]) -> None:
    _say(f"ready. Logs: {config.cluster.log_dir}. Stop: Ctrl-C or scripts/down. Try:")
    for line in example_requests(config, adapters):
        print(f"\n{line}", file=sys.stderr, flush=True)


def example_requests(config: Config, adapters: Mapping[str, Path]) -> list[str]:
    """Return three curl commands: for the base model, for an adapter and for a stream."""
    names = [config.model.name, *adapters]
    key = ' -H "Authorization: Bearer $API_KEY"' if config.gateway.api_keys else ""
    headers = f"{base_url(config)}/v1/chat/completions{key} -H 'Content-Type: application/json'"
    chat = '[{"role": "user", "content": "What is the moon?"}]'
    return [
        f'# {title}\ncurl {flag} {headers} -d \'{{"model": "{model}", "max_tokens": 40{extra}, "messages": {chat}}}\''
        for title, model, flag, extra in (
            ("the base model", names[0], "-s", ""),
            ("an adapter", names[min(1, len(names) - 1)], "-s", ""),
            ("a stream", names[-1], "-sN", ', "stream": true'),
        )
    ]


def _say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraserve",
        description="Start, restart or stop a multi-LoRA serving cluster on this machine.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="up|down|restart")
    start = commands.add_parser(
        "up",
        help="start a cluster and serve until stopped",
        description="Start a cluster on this machine and serve until stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=UP_EXAMPLES,
    )
    start.add_argument(
        "--model", metavar="DIR", help="Hugging Face directory (Llama, Mistral, Qwen2, Qwen3); default: the demo model"
    )
    start.add_argument("--name", help="the model's name in requests (\"model\"); default: the folder's name")
    start.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="PEFT directory to serve; may be repeated"
    )
    start.add_argument("--engines", metavar="N", help="engine processes; default: one per GPU, 2 on a CPU")
    start.add_argument("--gateways", metavar="N", help="gateway processes that share the port; default: 1")
    start.add_argument("--device", help="auto, cpu or cuda; default: auto, which uses a GPU if there is one")
    start.add_argument("--host", help="address to listen on; default: 127.0.0.1")
    start.add_argument("--port", help="port to listen on; default: 8000; 0 chooses a free one")
    start.add_argument("--detach", action="store_true", help="return once the cluster is ready; it keeps serving")
    start.add_argument(
        "--parent-pid", type=int, default=0, metavar="PID", help="stop the cluster when this process ends (for tests)"
    )
    start.set_defaults(run=up)
    stop = commands.add_parser("down", help="stop the cluster", description="Stop the cluster of a data folder.")
    stop.set_defaults(run=down)
    for command in (start, stop, _add_restart(commands)):
        command.add_argument(
            "--data", metavar="DIR", help=f"model, adapters and logs; default: {_home_relative(default_data_dir())}"
        )
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
        command.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting; may be repeated"
        )
    return parser


def _add_restart(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "restart",
        help="restart processes without interrupting requests",
        description="Restart processes of a running cluster, one after the other, without interrupting requests.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=RESTART_EXAMPLES,
    )
    command.add_argument("process", nargs="*", metavar="PROCESS", help="such as gateway-0; default: every process")
    command.add_argument("--force", action="store_true", help="restart an engine even if no other one is ready")
    command.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="longest time for each process (300)"
    )
    command.set_defaults(run=restart)
    return command


def _home_relative(path: Path) -> str:
    return str(path).replace(str(Path.home()), "~")


if __name__ == "__main__":
    raise SystemExit(main())
