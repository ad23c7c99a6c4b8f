"""The addresses that the service listens on: found taken at start, before anything is loaded.

    bind    each address of the host, and one port on all of them; nobody is taken yet
    listen  once the service can answer

By `SO_REUSEADDR`, which a restart needs where connections of before have not timed out, two services may bind one
address until either listens. So it is set last: until then the address is this service's alone.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any

from service.errors import SemidError

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKLOG = 2048
TRIES = 16  # for a port that is free on every address

_ABSENT = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})


class CannotListen(SemidError):
    """An address is taken, or not ours."""

    title = "The service cannot listen"


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host that this machine has, all on one port, which is free where it is 0.

    Raises:
        CannotListen: An address is taken or not ours.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        for _ in range(TRIES - 1):
            try:
                return _bound(addresses, port)
            except OSError as error:
                if port or len(addresses) == 1 or error.errno != errno.EADDRINUSE:
                    raise
        return _bound(addresses, port)
    except OSError as error:
        raise CannotListen(f"{host}:{port} cannot be listened on: {error.strerror}") from error


def listen(listeners: Sequence[socket.socket]) -> None:
    """Let callers connect; whoever takes them may.

    Raises:
        CannotListen: Another listens on an address, which it has bound in the same way.
    """
    for listener in listeners:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.listen(BACKLOG)
        except OSError as error:
            host, port, *_ = listener.getsockname()
            raise CannotListen(f"{host}:{port} cannot be listened on: {error.strerror}") from error


def _bound(addresses: Sequence[tuple[int, Any]], port: int) -> list[socket.socket]:
    """All of them on one port; without those that the machine has not, unless it has none."""
    listeners: list[socket.socket] = []
    try:
        for place, (family, address) in enumerate(addresses):
            try:
                listeners.append(_socket(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in _ABSENT or (place + 1 == len(addresses) and not listeners):
                    raise
            else:
                port = listeners[-1].getsockname()[1]
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _socket(family: int, address: Any) -> socket.socket:
    # Its protocol is named, or asyncio leaves connections waiting for acknowledgements before they send (Nagle).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # By connections of before, or by somebody: who listens first shows it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
