"""The TCP socket on which gateways accept the connections of clients.

``scripts/up`` binds the socket once and passes it to every gateway process. All gateways accept from it. Connections
that arrive while no gateway accepts wait in the kernel's queue, so a restart of the only gateway refuses none. A
gateway that is started without ``scripts/up`` binds a socket of its own.
"""

import errno
import os
import socket
import stat
import sys

from loraserve.config import Config
from loraserve.errors import ConfigError

BACKLOG = 1024
"""Most connections that wait to be accepted. The kernel may limit it further (net.core.somaxconn, kern.ipc.somaxconn)
and ignores attempts to connect beyond it, which clients repeat."""


def open_listener(config: Config) -> socket.socket:
    """Return the socket of a gateway: the one it inherited, or a new one. Raises ConfigError that names the setting."""
    if config.gateway.listen_fd >= 0:
        return inherit(config.gateway.listen_fd)
    return bind(config.gateway.host, config.gateway.port, shared=config.cluster.gateways > 1)


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """Return a bound socket that does not listen yet. ``shared`` lets other processes bind the same port.

    Raises:
        ConfigError: The host or port cannot be used, or the platform cannot share a port. The text names the setting.
    """
    if shared and sys.platform != "linux":
        raise ConfigError(
            "cluster.gateways: only Linux distributes connections between gateways that bind the same port; start the "
            "gateways with scripts/up, which shares one socket between them, or set cluster.gateways to 1"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as error:
        raise ConfigError(f"gateway.host {host!r}, gateway.port {port}: {error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise port_error(error, port) from error
    return listener


def inherit(descriptor: int) -> socket.socket:
    """Return the socket with this number that the parent process passed on. Raises ConfigError if it is no socket."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        raise ConfigError(
            f"gateway.listen_fd {descriptor}: this process inherited no socket with this number; remove the setting, "
            "which scripts/up sets itself"
        )
    listener = socket.socket(fileno=descriptor)
    # Processes that the gateway starts must not keep the port in use.
    listener.set_inheritable(False)
    return listener


def port_error(error: OSError, port: int) -> ConfigError:
    """Return the error for a port that cannot be bound, with a remedy."""
    remedies = {
        errno.EADDRINUSE: "it is in use; stop its user, or choose another with --port N or --set gateway.port=N",
        errno.EACCES: "not permitted; choose a port from 1024 up with --port N or --set gateway.port=N",
        errno.EADDRNOTAVAIL: "gateway.host is not an address of this machine; use 127.0.0.1 or 0.0.0.0",
    }
    return ConfigError(f"gateway.port {port}: {remedies.get(error.errno or 0, str(error))}")
