"""What tests of bulk ask of the service afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def nothing_left(service: Any) -> Iterator[None]:
    """No stream may end in a 5xx or leave bytes counted as held or rows queued."""
    yield
    assert service.metric("semid_http_requests_total", status="500") == 0
    service.until(lambda: service.state.gate._held_bytes == 0, "bytes of streams are still counted as held")
    service.until(lambda: service.metric("semid_queue_tokens") == 0, "rows stay in the queue")
