"""Every way to fail has one status, one stable type and plain words."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from service import errors
from service.errors import ChangesGone, ItemError, Overloaded, Retired, SemidError, ServiceError


def leaves(root: type[SemidError]) -> list[type[SemidError]]:
    below = [leaf for child in root.__subclasses__() for leaf in leaves(child)]
    return below or [root]


FAULTS = [fault for fault in leaves(SemidError) if fault.__module__ == errors.__name__]


MEMBERS: dict[type[SemidError], dict[str, Any]] = {
    Retired: {"item_id": "a", "semantic_id": "1-0", "retired_at": datetime(2026, 1, 1, tzinfo=UTC)},
    ChangesGone: {"revision": 7},
}


def occurrence(fault: type[SemidError]) -> SemidError:
    return fault("this one", **MEMBERS.get(fault, {}))


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_carries_its_status_type_title_and_members(fault: type[SemidError]) -> None:
    error = occurrence(fault)

    words = {"type": f"urn:semid:problem:{fault.slug}", "title": fault.title, "detail": "this one"}
    assert error.as_error() == words | MEMBERS.get(fault, {})
    assert error.as_problem() == {**error.as_error(), "status": fault.status}
    assert 400 <= fault.status < 600
    assert fault.slug != SemidError.slug
    assert fault.title != SemidError.title


def test_no_two_errors_share_a_type() -> None:
    slugs = [fault.slug for fault in FAULTS]

    assert len(slugs) == len(set(slugs))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if issubclass(fault, ServiceError)])
def test_where_waiting_helps_the_answer_says_how_long(fault: type[ServiceError]) -> None:
    error = occurrence(fault)
    assert isinstance(error, ServiceError)
    headers = error.headers()

    assert ("Retry-After" in headers) == (fault.status in {429, 503})
    assert int(headers.get("Retry-After", 1)) >= 1


@pytest.mark.parametrize(("wait_s", "seconds"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")])
def test_retry_after_is_in_whole_seconds_and_never_nought(wait_s: float, seconds: str) -> None:
    assert Overloaded("full", retry_after_s=wait_s).headers() == {"Retry-After": seconds}


def test_an_item_error_is_no_fault_of_the_request() -> None:
    assert not issubclass(ItemError, ServiceError)
    assert all(400 <= fault.status < 500 for fault in FAULTS if issubclass(fault, ItemError))
