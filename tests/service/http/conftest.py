"""What tests of bad input ask of the service afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def well_afterwards(service: Any) -> Iterator[None]:
    """No request of a test may end in a 5xx, stop the model, or leave bytes counted as held."""
    yield
    assert service.http.get("/healthz").status_code == 200
    assert service.http.get("/readyz").status_code == 200
    assert service.metric("semid_http_requests_total", status="500") == 0
    assert service.metric("semid_queue_tokens") == 0
    service.until(lambda: service.state.gate._held_bytes == 0, "bytes of bodies are still counted as held")
