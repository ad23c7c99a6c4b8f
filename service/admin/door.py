"""Who may change a running service: holders of an admin key; where there are no keys, programs on the same machine."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request

from service.errors import AdminClosed

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class AdminDoor:
    """Keeps those out whom no key tells apart from the operator.

    Args:
        host: The address that the service listens on.
        has_keys: Whether every caller has brought a key of its scope (`service.access.door`).
    """

    def __init__(self, host: str, *, has_keys: bool) -> None:
        self._host = host
        self._has_keys = has_keys

    def check(self, request: Request) -> None:
        """Let in.

        Raises:
            AdminClosed: Anyone could be the caller: from another machine, or a page of any site that the operator has
                open in a browser on this one, which can send to loopback, under a name of its own too.
        """
        if self._has_keys:
            return
        if not _is_loopback(self._host):
            raise AdminClosed(f"the service listens on {self._host} and asks for no keys: set SID_KEYS_FILE")
        if any(name in request.headers for name in FORWARDED):
            raise AdminClosed("the request came through a proxy and the service asks for no keys: set SID_KEYS_FILE")
        host = request.headers.get("host", "")
        if not _is_loopback(_hostname(f"//{host}")):
            raise AdminClosed("the request is not addressed to loopback and the service asks for no keys")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise AdminClosed("the request comes from a page of another origin and the service asks for no keys")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets without an address
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
