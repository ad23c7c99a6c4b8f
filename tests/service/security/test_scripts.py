"""Script in an item id is text, wherever it is said; in a browser: tests/service/explorer/test_page.py."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

HOSTILE = [
    "<script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "</script><svg onload=window.ran=1>",
    "{{constructor.constructor('window.ran=1')()}}",
    "a\r\nset-cookie: x=1\r\n\r\n<script>window.ran=1</script>",
    "\u2028\u2029\u202e",
]


@pytest.mark.parametrize("item_id", HOSTILE)
def test_an_item_id_comes_back_as_json_text_from_every_call(service: Any, namespace: str, item_id: str) -> None:
    (entry,) = service.tokenize({"item_id": item_id, "text": item_id}, namespace=namespace)
    held = entry["semantic_id"]
    asked = [
        ("GET", f"/assignment/{quote(item_id, safe='')}", {}),
        ("GET", f"/item/{held}", {}),
        ("GET", "/prefix/", {}),
        ("GET", "/changes", {"after": 0}),
        ("DELETE", f"/assignment/{quote(item_id, safe='')}", {}),
        ("GET", f"/item/{held}", {}),  # 410: a problem with the item's id in it
    ]

    for method, path, options in asked:
        answer = service.http.request(method, path, params={"namespace": namespace, **options})

        assert answer.headers["content-type"] in {"application/json", "application/problem+json"}
        assert "set-cookie" not in answer.headers
        assert item_id in strings(json.loads(answer.content)), path


@pytest.mark.parametrize("item_id", HOSTILE)
def test_what_is_refused_is_told_as_json_text(service: Any, item_id: str) -> None:
    for path in (f"/item/{quote(item_id, safe='')}", f"/{quote(item_id, safe='')}", f"/trie?{quote(item_id)}=1"):
        answer = service.http.get(path)

        assert answer.status_code in {404, 422}
        assert answer.headers["content-type"] == "application/problem+json"
        assert "set-cookie" not in answer.headers


def test_the_page_is_the_same_whatever_its_address_says(service: Any) -> None:
    plain = service.http.get("/")
    asked = service.http.get("/", params={"namespace": HOSTILE[0], HOSTILE[1]: HOSTILE[2]})

    assert asked.content == plain.content
    assert asked.headers["content-security-policy"] == plain.headers["content-security-policy"]


def strings(value: Any) -> set[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        return {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return set().union(*map(strings, inner))
