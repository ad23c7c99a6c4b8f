"""A service that asks for keys, and a key of each scope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.access.keys import Scope
from tests.conftest import ServiceThread

PAGE = "https://shop.example"


class Guarded:
    """A running service, and a key of each scope."""

    def __init__(self, service: ServiceThread, path: Path, secrets: dict[Scope, str]) -> None:
        self.service = service
        self.path = path
        self.secrets = secrets

    def status(self, method: str, path: str, secret: str | None, **body: Any) -> int:
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        return self.service.http.request(method, path, headers=headers, **body).status_code
