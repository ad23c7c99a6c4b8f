"""Ports of loopback for servers that are started, killed and started again."""

from __future__ import annotations

import secrets
import socket

# Below what systems give to outgoing connections (from 32,768), with the bus of a cluster's server, BUS above: a port
# that is free between two lives of a server stays so.
LOWEST, HIGHEST = 10_240, 20_000
BUS = 10_000

_given: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, nor on the one `BUS` above; never the same twice."""
    while True:
        port = LOWEST + secrets.randbelow(HIGHEST - LOWEST)
        if port not in _given and _is_free(port) and _is_free(port + BUS):
            _given.add(port)
            return port


def free_ports(count: int) -> list[int]:
    """So many of them."""
    return [free_port() for _ in range(count)]


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
