"""Titles on the page: wherever items are listed, as text whatever they say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.service.explorer.browser import Browser
from tests.service.explorer.test_page import AUDITS, HOSTILE, NARROW, show

MakeEmbedding = Callable[[int], list[float]]
BYTES = 40  # of the service's titles

TITLES = [title for title in HOSTILE if len(title.encode()) <= BYTES] + [
    "<script>window.ran=1</script>",
    "<iframe src=javascript:top.ran=1>",
    "</span><b onclick=ran=1>",
    "&lt;img src=x&gt; &amp;",
    "W" * BYTES,
]
IN_LISTS = {
    "try": ("#try-result", "#try-result .items li"),
    "tree": ("#tree-detail", "#tree-detail .items li"),
    "changes": ("#changes", "#changes-list li"),
}
PAIRS = """[...document.querySelectorAll({selector})].map((line) =>
    [line.querySelector('.id').textContent, line.querySelector('.title')?.textContent ?? null])"""


@pytest.fixture(scope="module")
def titled(titled_service: Any, make_embedding: MakeEmbedding) -> dict[str, str | None]:
    """Item id -> title, of items of one group in a namespace of their own."""
    titles: dict[str, str | None] = {f"item {number}": title for number, title in enumerate(TITLES)}
    titles |= {"plain": None, "<img src=x onerror=window.ran=1>": "both are hostile <svg onload=ran=1>"}
    vector = make_embedding(1)
    entries = [
        {"item_id": item_id, "embedding": vector, **({} if title is None else {"display": title})}
        for item_id, title in titles.items()
    ]
    titled_service.tokenize(*entries, namespace="titles")
    return titles


@pytest.fixture
def page(titled_service: Any, tab: Browser, titled: dict[str, str | None]) -> Iterator[Browser]:
    tab.look()
    tab.open(f"{titled_service.http.base_url}/?namespace=titles")
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    yield tab
    assert tab.complaints == []
    assert tab.hosts() == {f"127.0.0.1:{titled_service.address[1]}"}
    assert tab.evaluate("window.ran") is None
    assert (
        tab.evaluate("document.querySelectorAll('main img, main script, main iframe, main b, main [onload]').length")
        == 0
    )
    tab.command("Page.navigate", url="about:blank")  # else the service waits for the feed


def listed(page: Browser, section: str) -> dict[str, str | None]:
    return dict(page.evaluate(PAIRS.format(selector=json.dumps(IN_LISTS[section][1]))))


def test_every_title_is_shown_as_text_where_items_are_listed(
    titled_service: Any, page: Browser, titled: dict[str, str | None]
) -> None:
    show(page, "changes")
    page.until(f"document.querySelectorAll('#changes-list li').length === {len(titled)}")
    assert listed(page, "changes") == titled

    show(page, "tree")
    page.until("document.querySelector('#tree-detail .bars button')")
    page.evaluate("document.querySelector('#tree-detail .bars button').click()")
    page.until("document.querySelector('#tree-detail .items')")
    page.evaluate(
        "[...document.querySelectorAll('#tree-detail button')].find((one) => one.textContent === 'More')?.click()"
    )
    page.until(f"document.querySelectorAll('#tree-detail .items li').length === {len(titled)}")
    assert listed(page, "tree") == titled

    for item_id, title in titled.items():
        page.evaluate("document.querySelector('#lookup-result').replaceChildren()")
        page.evaluate(f"document.querySelector('#lookup-key').value = {json.dumps(item_id)}")
        page.evaluate("document.querySelector('#lookup-form button').click()")
        page.until(f"document.querySelector('#lookup-result .id')?.textContent === {json.dumps(item_id)}")
        shown = page.evaluate("document.querySelector('#lookup-result .title')?.textContent ?? null")
        assert shown == title

    for dark in (False, True):
        page.look(width=NARROW, dark=dark)
        page.until("document.getAnimations().every((one) => one.playState === 'finished')")
        assert page.evaluate("document.documentElement.scrollWidth") == NARROW
        assert page.evaluate(AUDITS["nameless"]) == []
        assert page.evaluate(AUDITS["faint"]) == []


def test_a_title_that_comes_later_is_told_by_the_feed(titled_service: Any, page: Browser) -> None:
    show(page, "changes")
    page.until("document.querySelector('#changes-list .badge')")
    item_id = f"late {time.monotonic_ns()}"

    titled_service.tokenize({"item_id": item_id, "text": "lamp", "display": "A <late> lamp"}, namespace="titles")

    page.until(f"document.querySelector('#changes-list li:first-child .id').textContent === {json.dumps(item_id)}")
    assert page.evaluate("document.querySelector('#changes-list li:first-child .title').textContent") == "A <late> lamp"
    titled_service.http.delete("/assignment", params={"item_id": item_id, "namespace": "titles"})
    page.until("document.querySelector('#changes-list li:first-child .badge').textContent === 'retired'")
    assert page.evaluate("document.querySelector('#changes-list li:first-child .title')") is None
