"""Runs a service as a process: flags, configuration, logging, signals, bus. Every ``__main__`` calls ``main``.

Exit status: 0 after a stop request, 1 after a crash, 2 for an invalid configuration, 128 + N after a second signal N.
"""

import argparse
import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvloop

from loraserve.bus.addresses import resolve_addresses
from loraserve.bus.zmq import open_bus
from loraserve.clock import RunningClock
from loraserve.config import Config, load_config
from loraserve.errors import ConfigError
from loraserve.log import configure_logging, get_logger
from loraserve.service import Service

CHECK_INTERVAL_S = 1.0
_PR_SET_PDEATHSIG = 1


class Parent:
    """The supervisor process given by ``--parent-pid``. It may be an indirect parent of this process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._direct = os.getppid() == pid
        if self._direct:
            end_with_parent()

    def is_alive(self) -> bool:
        if self._direct:
            # This is correct even if the process id was reused or the parent is a zombie.
            return os.getppid() == self._pid
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    async def watch(self, on_gone: Callable[[], None]) -> None:
        """Wait for the parent to end, then call ``on_gone``, at most CHECK_INTERVAL_S later."""
        # Polls, because the kernel notifies only direct children.
        while self.is_alive():  # noqa: ASYNC110
            await asyncio.sleep(CHECK_INTERVAL_S)
        on_gone()


def end_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies. Has no effect outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


OK, CRASHED, BAD_CONFIG = 0, 1, 2
EXIT_GRACE_S = 5.0

_log = get_logger(__name__)


def main(kind: type[Service], default_name: str, argv: Sequence[str] | None = None) -> int:
    """Parse flags, load the configuration and run the service. Return the exit status."""
    arguments = argument_parser(default_name).parse_args(argv)
    try:
        config = load_config(arguments.config, overrides=arguments.set)
    except ConfigError as error:
        return _report_bad_config(arguments.name, error)
    return run_process(kind, arguments.name, config, arguments.parent_pid)


def argument_parser(default_name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m loraserve.{default_name.rpartition('-')[0] or default_name}")
    add_config_flags(parser)
    parser.add_argument("--name", default=default_name, help=f"the process's name on the bus (default {default_name})")
    parser.add_argument("--parent-pid", type=int, default=0, metavar="PID", help="stop when this process is gone")
    return parser


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the cluster's TOML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting; repeatable"
    )


def run_process(kind: type[Service], name: str, config: Config, parent_pid: int = 0) -> int:
    """Run the service until it is stopped. Return the exit status."""
    faulthandler.enable()
    parent = Parent(parent_pid) if parent_pid else None
    try:
        configure_logging(config, name)
    except ConfigError as error:
        return _report_bad_config(name, error)
    return uvloop.run(_run(kind, name, config, parent))


async def _run(kind: type[Service], name: str, config: Config, parent: Parent | None) -> int:
    status = OK
    try:
        await _serve(kind, name, config, parent)
    except ConfigError as error:
        status = _report_bad_config(name, error)
    except Exception:
        _log.exception("crashed")
        status = CRASHED
    _end_within(EXIT_GRACE_S, status)
    return status


async def _serve(kind: type[Service], name: str, config: Config, parent: Parent | None) -> None:
    bus = open_bus(config, name, kind.inbox)
    _warn_if_unprotected(config, name)
    clock = RunningClock()
    helpers = [asyncio.ensure_future(clock.tick())]
    try:
        service = kind(config, bus, clock)

        def stop() -> None:
            service.stop()
            # Started here and not after ``run``, because closing a resource may wait for a thread that hangs.
            _end_within(service.drain_timeout_s + EXIT_GRACE_S, OK)

        _stop_on_signals(stop)
        if parent is not None:
            helpers.append(asyncio.ensure_future(parent.watch(stop)))
        await service.run()
    finally:
        for helper in helpers:
            helper.cancel()
        await bus.close()


def _warn_if_unprotected(config: Config, name: str) -> None:
    """Warn if the bus listens on TCP, because peers are not authenticated."""
    addresses = resolve_addresses(config, name).unprotected
    if addresses:
        _log.warning(
            "bus_unprotected",
            addresses=addresses,
            consequence="anybody who can connect to these addresses can command the cluster",
            remedy="keep bus.bind and bus.bind_pub at ipc://, or bind them to a private network only",
        )


def _stop_on_signals(stop: Callable[[], None]) -> None:
    """Install handlers: the first SIGTERM or SIGINT drains and stops the service, the second kills it."""
    received: list[int] = []

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            _log.info("signal", signal=number.name)
            stop()
        else:
            _log.warning("signal_again", signal=number.name, consequence="ends at once")
            logging.shutdown()
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


def _report_bad_config(name: str, error: ConfigError) -> int:
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return BAD_CONFIG


def _end_within(seconds: float, status: int) -> None:
    """Start a timer that ends the process. Otherwise Python would wait forever for a worker thread that hangs."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()
