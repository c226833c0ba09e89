"""The listening socket, taken before anything is loaded."""

from __future__ import annotations

import errno
import ipaddress
import resource
import socket
from dataclasses import dataclass

from decoding.errors import ConfigError

BACKLOG = 2048
MAX_DESCRIPTORS = 65536
_PROBES = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))  # of silent connections; seconds, count


@dataclass(frozen=True)
class Address:
    host: str
    port: int


def listen(address: Address, write_seconds: float) -> socket.socket:
    """A listening socket; taken before the model is loaded, so that a port in use is known at once.

    Args:
        write_seconds: how long a client may leave unread what is sent to it.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address.host!r}: {error.strerror}; choose another --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_dead_peers(listener, write_seconds)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_why_not(address, error)) from error
    listener.setblocking(False)
    return listener


def _notice_dead_peers(listener: socket.socket, write_seconds: float) -> None:
    """Have the kernel end connections whose other end is gone, or does not read; they inherit this from the listener.

    Without it a client that loses its power keeps its request for as long as the answer takes, and one that never reads
    keeps a connection which the server has closed already.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (*_PROBES, ("TCP_USER_TIMEOUT", int(write_seconds * 1000))):
        if hasattr(socket, name):  # Linux has them all
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _why_not(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {address.port} on {address.host} is in use; stop the program that uses it, or choose another port "
            f"with --port {address.port + 1}"
        )
    return f"cannot listen on port {address.port} of {address.host}: {error.strerror}; choose another --port or --host"


def allow_many_connections() -> None:
    """Use as many file descriptors as the system allows: the usual soft limit of 1024 is fewer than a full queue has
    connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_loopback(listener: socket.socket) -> bool:
    """Only this machine can connect to it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
