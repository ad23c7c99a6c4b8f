"""The files of the page: nothing else can be asked for, and nothing foreign may run on it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from service.state import EXPLORER

NAMES = sorted(path.name for path in EXPLORER.iterdir())


class Inline(HTMLParser):
    """Scripts, styles and handlers within a page, and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.referred: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.referred += [value for name in ("src", "href") if (value := named.get(name))]
        self.inline += [name for name in named if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in named) else []


def test_the_page_has_nothing_inline_and_refers_to_its_own_host_alone(service: Any) -> None:
    parser = Inline()
    parser.feed(service.http.get("/").text)

    assert parser.inline == []
    assert not [url for url in parser.referred if "//" in url or url.startswith("data:")]


@pytest.mark.parametrize("path", ["/", *(f"/explorer/{name}" for name in NAMES)])
def test_each_file_comes_with_a_strict_policy_and_is_asked_for_once(service: Any, path: str) -> None:
    answer = service.http.get(path)
    again = service.http.get(path, headers={"if-none-match": answer.headers["etag"]})

    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (again.status_code, again.content) == (304, b"")


def test_scripts_have_a_type_that_browsers_run(service: Any) -> None:
    answer: httpx.Response = service.http.get("/explorer/main.js")

    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
