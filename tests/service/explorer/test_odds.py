"""What people meet on the page when something does not go as it should."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.explorer.browser import Browser
from tests.service.explorer.test_page import show, text_of

ENTRIES_TOGETHER = 100  # of a log, forgotten together
FIRST = "document.querySelector('#changes-list .id')?.textContent"


@pytest.fixture
def page(service: Any, tab: Browser, namespace: str) -> Iterator[Browser]:
    """The page on a namespace with one item."""
    service.tokenize({"item_id": "kettle", "text": "kettle"}, namespace=namespace)
    tab.look()
    tab.open(f"{service.http.base_url}/?namespace={namespace}")
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    yield tab
    tab.command("Page.navigate", url="about:blank")  # else the service waits for the feed


def assign(page: Browser, item_id: str) -> None:
    page.evaluate(f"document.querySelector('#try-item').value = {json.dumps(item_id)}")
    page.evaluate("document.querySelector('#try-form button[value=assign]').click()")


def test_the_tree_has_what_the_page_assigned_also_where_it_was_empty(service: Any, tab: Browser) -> None:
    tab.open(f"{service.http.base_url}/?namespace=begun-{time.monotonic_ns()}")
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    show(tab, "changes")
    show(tab, "tree")
    tab.until("document.querySelector('#tree-figure .empty')")

    assign(tab, "first")

    tab.until("document.querySelector('#tree-figure .centre')?.textContent === '1'")
    tab.until(f"{FIRST} === 'first'")
    time.sleep(0.2)  # the feed goes on from there
    assert tab.complaints == []
    tab.command("Page.navigate", url="about:blank")


def test_an_item_at_fault_is_told_in_whole_sentences(page: Browser) -> None:
    assign(page, "x" * 257)

    page.until("document.querySelector('#try-result .notice')")
    assert text_of(page, "#try-result .notice").startswith("The item id is not valid. it has 257 bytes")


def test_what_was_assigned_is_told_though_its_path_cannot_be_shown(page: Browser) -> None:
    page.evaluate(
        "real = fetch, window.fetch = (url, ...rest) =>"
        " String(url).endsWith('/explain') ? Promise.reject(new TypeError()) : real(url, ...rest)"
    )

    assign(page, "lamp")

    page.until("document.querySelector('#try-result .notice')")
    assert text_of(page, "#try-said").startswith("Assigned ")


def test_a_feed_that_pauses_shows_nothing_new_and_all_of_it_when_it_goes_on(
    service: Any, page: Browser, namespace: str
) -> None:
    show(page, "changes")
    page.until(f"{FIRST} === 'kettle'")
    page.evaluate("document.querySelector('#changes-pause').click()")

    service.tokenize({"item_id": "lamp", "text": "lamp"}, namespace=namespace)
    time.sleep(0.7)
    assert page.evaluate(FIRST) == "kettle"

    page.evaluate("document.querySelector('#changes-pause').click()")
    page.until(f"{FIRST} === 'lamp'")


def test_a_feed_that_is_there_again_does_not_say_that_it_is_away(page: Browser) -> None:
    show(page, "changes")
    page.until(f"{FIRST} === 'kettle'")
    page.evaluate("real = fetch, window.fetch = () => Promise.reject(new TypeError())")
    page.evaluate("document.querySelector('#scope button').click()")
    page.until("document.querySelector('#changes-list .failed')")

    page.evaluate("window.fetch = real")

    page.until(f"!document.querySelector('#changes-list .failed') && {FIRST} === 'kettle'")


def test_a_feed_tells_nothing_of_the_namespace_that_it_has_left(service: Any, page: Browser, namespace: str) -> None:
    # An answer may be there already when nobody wants it any more: here no request is called off.
    page.evaluate(
        "real = fetch, answered = [], window.fetch = async (url, { signal, ...rest }) =>"
        " { const answer = await real(url, rest); answered.push(String(url)); return answer; }"
    )
    show(page, "changes")
    page.until(f"{FIRST} === 'kettle'")
    page.evaluate("document.querySelector('#namespace').value = 'another-one'")
    page.evaluate("document.querySelector('#scope button').click()")
    page.until("document.querySelector('#changes-list .empty')")

    service.tokenize({"item_id": "lamp", "text": "lamp"}, namespace=namespace)

    waits = f"answered.filter((url) => url.includes('wait_s=20') && url.includes({json.dumps(namespace)})).length"
    page.until(f"{waits} === 2")
    time.sleep(0.2)
    assert page.evaluate(FIRST) is None


def test_a_feed_whose_past_is_not_kept_begins_with_what_comes(
    start_service: Callable[..., Any], data_dir: Path, tab: Browser, make_embedding: Callable[[int], list[float]]
) -> None:
    service = start_service(data_dir=data_dir, changes_kept=0)
    for number in range(ENTRIES_TOGETHER + 1):  # all but the last one are forgotten
        service.tokenize({"item_id": f"kettle {number}", "embedding": make_embedding(0)})
    tab.look()
    tab.open(f"{service.http.base_url}/")
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    show(tab, "changes")
    time.sleep(1)

    service.tokenize({"item_id": "lamp", "text": "lamp"})

    tab.until(f"{FIRST} === 'lamp'")
    assert sum("/changes?" in url for url in tab.requests) < 10
    tab.command("Page.navigate", url="about:blank")
    service.stop()


def test_an_answer_that_ends_early_is_told_as_one(page: Browser) -> None:
    page.evaluate("window.fetch = async () => new Response('{\"items\": [{')")

    page.evaluate("document.querySelector('#lookup-key').value = '1-2-3-0'")
    page.evaluate("document.querySelector('#lookup-form button').click()")

    page.until("document.querySelector('#lookup-result .notice')")
    assert text_of(page, "#lookup-result .notice strong") == "The answer cannot be read."


def test_an_address_of_what_is_not_there_says_so(service: Any, tab: Browser) -> None:
    tab.open(f"{service.http.base_url}/?tokenizer=gone@00&namespace=two%20words")

    tab.until("document.querySelector('#about').textContent.includes('levels')")
    about = text_of(tab, "#about")
    assert "The tokenizer of the address, gone@00, is not loaded" in about
    assert "The namespace of the address, two words, is no name of a namespace: this is default." in about
