"""What a refusal looks like."""

from __future__ import annotations

from typing import Any

TYPE = "urn:semid:problem:"


def assert_problem(response: Any, status: int, slug: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == TYPE + slug
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert len(response.content) < 2000
    assert "Traceback" not in response.text
