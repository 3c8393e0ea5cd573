"""`loraserve up` and `loraserve down`: a whole cluster on one machine."""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loraserve.bus.addresses import NameClaim, private_dir
from loraserve.config import Config, engine_count, load_config
from loraserve.cost.profile import profile_for
from loraserve.demo import demo_adapters
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.errors import ConfigError, LoraServeError
from loraserve.supervisor.preflight import check_configuration, check_disk, check_model, check_not_running, check_port
from loraserve.supervisor.processes import ProcessFailed
from loraserve.supervisor.state import RunState, clear_run_dir, read_state, stop_cluster, write_state
from loraserve.supervisor.up import Supervisor, base_url, try_lines

STARTED_S = time.monotonic()
DETACH_POLL_S = 0.2
STOP_TIMEOUT_S = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `loraserve` command. Returns the exit status."""
    raw = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(raw)
    arguments.raw = raw
    try:
        return int(arguments.run(arguments))
    except (LoraServeError, ProcessFailed) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


def up(arguments: argparse.Namespace) -> int:
    """Start everything and stay with it until stopped; with --detach, until it is ready."""
    config = _configuration(arguments)
    run_dir = Path(config.cluster.run_dir)
    check_configuration(config)
    check_not_running(run_dir)
    # Chosen once: a gateway that is started again has to be where the announced address says.
    port = check_port(config.gateway.host, config.gateway.port)
    config = msgspec.structs.replace(config, gateway=msgspec.structs.replace(config.gateway, port=port))
    for folder in (Path(config.cluster.log_dir), Path(config.cluster.data_dir)):
        _make_folder(folder)
    private_dir(run_dir)
    check_disk(Path(config.cluster.data_dir))
    if arguments.detach:
        return _detach(arguments, config)
    with NameClaim(run_dir, "up"):
        try:
            _serve(config, arguments)
        finally:
            clear_run_dir(run_dir)
    return 0


def _serve(config: Config, arguments: argparse.Namespace) -> None:
    cluster = config.cluster
    # Until the cluster takes over: `down` ends this and what it runs, such as a download, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # From now on, while the model is still being made, others see that somebody starts here and can stop it.
    write_state(
        Path(cluster.run_dir), RunState(pid=os.getpid(), url=base_url(config), log_dir=cluster.log_dir, model="")
    )
    config, adapters = _with_model(config, arguments)
    profile_for(config)  # one that cannot be used is told here, not in the logs of whoever prices with it
    asyncio.run(Supervisor(config, adapters, _say).run(lambda: _announce(config, adapters)))


def down(arguments: argparse.Namespace) -> int:
    """Stop the cluster of this data folder. Nothing running is no error."""
    run_dir = Path(_configuration(arguments).cluster.run_dir)
    state = read_state(run_dir)
    if state is None:
        _say(f"nothing runs here ({run_dir})")
        return 0
    _say(f"stopping {len(state.processes)} processes")
    stop_cluster(run_dir, state, STOP_TIMEOUT_S)
    _say("stopped")
    return 0


def _with_model(config: Config, arguments: argparse.Namespace) -> tuple[Config, dict[str, Path]]:
    data_dir = Path(config.cluster.data_dir)
    adapters = {}
    if config.model.path:
        check_model(Path(config.model.path))
        path = Path(config.model.path).resolve()
    else:
        _say("preparing the demo model (once)")
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
    """Flags win over everything else; folders that nobody chose lie under the data folder."""
    overrides = [f"{key}={value}" for key, value in _flag_values(arguments) if value is not None]
    config = load_config(arguments.config, overrides=[*arguments.set, *overrides])
    cluster = config.cluster
    data_dir = Path(cluster.data_dir).absolute() if cluster.data_dir else default_data_dir()
    cluster = msgspec.structs.replace(
        cluster,
        data_dir=str(data_dir),
        run_dir=cluster.run_dir or str(data_dir / "run"),
        log_dir=cluster.log_dir or str(data_dir / "logs"),
    )
    # Written down, so that every process counts the same.
    cluster = msgspec.structs.replace(cluster, engines=engine_count(config))
    return msgspec.structs.replace(config, cluster=cluster)


def _flag_values(arguments: argparse.Namespace) -> list[tuple[str, str | None]]:
    keys = {
        "model": "model.path",
        "name": "model.name",
        "engines": "cluster.engines",
        "device": "engine.device",
        "host": "gateway.host",
        "port": "gateway.port",
        "data": "cluster.data_dir",
    }
    return [(key, getattr(arguments, flag, None)) for flag, key in keys.items()]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}; choose another place with --data DIR") from error


def _detach(arguments: argparse.Namespace, config: Config) -> int:
    """Run the same command in a session of its own and show its output until it is ready or has ended."""
    log_file = Path(config.cluster.log_dir) / "up.log"
    command = [sys.executable, "-m", "loraserve.cluster", *[a for a in arguments.raw if a != "--detach"]]
    with log_file.open("wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        return _follow(child, log_file, Path(config.cluster.run_dir))
    except KeyboardInterrupt:
        _say("stopping")
        stop_cluster(Path(config.cluster.run_dir), _state_of(child, config), STOP_TIMEOUT_S)
        raise


def _follow(child: "subprocess.Popen[bytes]", log_file: Path, run_dir: Path) -> int:
    """Shows its output until it is ready, which is 0, or has ended."""
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


def _announce(config: Config, adapters: dict[str, Path]) -> None:
    _say(f"ready. Logs: {config.cluster.log_dir}. Stop: Ctrl-C or scripts/down. Try:")
    for line in try_lines(config, adapters):
        print(f"\n{line}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraserve", description="A multi-LoRA serving cluster on this machine.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="up|down")
    start = commands.add_parser(
        "up",
        help="start a cluster and serve until stopped",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  scripts/up                                       demo model, four demo adapters, two engines\n"
        "  scripts/up --detach                              return once it serves\n"
        "  scripts/up --model DIR --adapter support=DIR2    your model and adapter\n"
        "  scripts/up --set engine.pool_bytes=2147483648    any field of loraserve/config.py",
    )
    start.add_argument(
        "--model", metavar="DIR", help="Hugging Face directory (Llama, Mistral, Qwen2, Qwen3); default: demo"
    )
    start.add_argument("--name", help="what clients call the model; default: the folder's name")
    start.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="PEFT directory to register")
    start.add_argument("--engines", metavar="N", help="engine processes (one for each GPU, or 2 on a CPU)")
    start.add_argument("--device", help="auto (a GPU where there is one), cpu or cuda")
    start.add_argument("--host", help="address to serve on (127.0.0.1)")
    start.add_argument("--port", help="port to serve on (8000); 0: one that is free")
    start.add_argument("--detach", action="store_true", help="return once ready and serve in the background")
    start.set_defaults(run=up)
    stop = commands.add_parser("down", help="stop the cluster and leave nothing behind")
    stop.set_defaults(run=down)
    for command in (start, stop):
        command.add_argument(
            "--data", metavar="DIR", help=f"model, adapters, logs ({_home_relative(default_data_dir())})"
        )
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file, see loraserve/config.py")
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any one setting")
    return parser


def _home_relative(path: Path) -> str:
    return str(path).replace(str(Path.home()), "~")


if __name__ == "__main__":
    raise SystemExit(main())
