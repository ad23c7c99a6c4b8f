"""The explorer in a real browser: it needs nobody else, complains of nothing, and runs no item's script."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.service.explorer.browser import Browser

MakeEmbedding = Callable[[int], list[float]]

HOSTILE = [
    "<img src=x onerror=window.ran=1>",
    "<script>window.ran=1</script>",
    "javascript:window.ran=1",
    "'\"><svg onload=window.ran=1>",
    "{{constructor.constructor('window.ran=1')()}}",
    "W" * 256,
    "\u202eltr\u202c and 日本語",
    ".",
    "..",
    "../metrics?a=b#c",
]
NARROW = 390
AUDITS = {path.stem: path.read_text() for path in Path(__file__).parent.glob("*.js")}


@pytest.fixture(scope="module")
def catalogue(service: Any, make_embedding: MakeEmbedding) -> str:
    """A namespace with plain and hostile item ids."""
    namespace = f"explorer-{time.monotonic_ns()}"
    names = [*HOSTILE, *(f"item {number}" for number in range(50))]
    items = [{"item_id": name, "embedding": make_embedding(i % 40)} for i, name in enumerate(names)]
    service.tokenize(*items, namespace=namespace)
    return namespace


@pytest.fixture
def page(service: Any, tab: Browser, catalogue: str) -> Iterator[Browser]:
    """The page on that namespace; at the end it must have complained of nothing and asked nobody else."""
    tab.look()
    tab.open(f"{service.http.base_url}/?namespace={catalogue}")
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    yield tab
    assert tab.complaints == []
    assert tab.hosts() == {f"127.0.0.1:{service.address[1]}"}
    assert tab.evaluate("window.ran") is None


def show(page: Browser, section: str) -> None:
    """Scroll there and stay for two frames: a section scrolled past between frames never knows that it was seen."""
    page.evaluate(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
    page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")


def text_of(page: Browser, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({selector!r}).textContent"))


def test_a_text_shows_its_path_and_the_id_it_would_get(service: Any, page: Browser, catalogue: str) -> None:
    text = text_of(page, "#try-text")
    answer = service.http.post("/explain", json={"item": {"text": text}, "namespace": catalogue}).json()

    page.evaluate("document.querySelector('#try-form button').click()")
    page.until("document.querySelector('#try-result table')")

    assert text_of(page, "#try-said") == f"It would get {answer['semantic_id']}."
    assert page.evaluate(
        "[...document.querySelectorAll('#try-result tbody th')].map((cell) => Number(cell.textContent))"
    ) == [level["code"] for level in answer["levels"]]
    shown = page.evaluate("[...document.querySelectorAll('#try-result .items .id')].map((id) => id.textContent)")
    assert shown == [near["item_id"] for near in answer["nearest"]]


def test_an_assignment_made_on_the_page_is_told_by_the_feed(service: Any, page: Browser) -> None:
    show(page, "changes")
    page.until("document.querySelector('#changes-list .badge')")
    item_id = f"lamp-{time.monotonic_ns()}"

    page.evaluate(f"document.querySelector('#try-item').value = '{item_id}'")
    page.evaluate("document.querySelector('#try-form button[value=assign]').click()")
    page.until(f"document.querySelector('#changes-list li .id').textContent === '{item_id}'")

    page.until("document.querySelector('#try-said').textContent.startsWith('Assigned ')")
    assert text_of(page, "#changes-list li .badge") == "assigned"


def test_the_tree_is_walked_by_the_keyboard(service: Any, page: Browser, catalogue: str) -> None:
    show(page, "tree")
    page.until("document.querySelectorAll('[role=treeitem][data-depth=\"2\"]').length > 0")
    root = service.http.get("/prefix/", params={"namespace": catalogue}).json()

    page.evaluate("document.querySelector('[role=treeitem][tabindex=\"0\"]').focus()")
    for key in ("ArrowRight", "Enter"):
        page.press(key)
    chosen = root["children"][1]
    page.until("document.querySelector('#tree-detail .items')")

    assert page.evaluate("document.activeElement.dataset.prefix") == chosen["prefix"]
    assert text_of(page, "#tree-detail .row .faint") == f"{chosen['count']} item{'s' * (chosen['count'] != 1)}"
    page.until("document.querySelector('#toast').textContent.includes('prefix')")
    page.press("Enter")
    page.until(f"document.querySelector('#tree-crumbs [aria-current]').textContent === '{chosen['prefix']}'")


def test_every_item_id_is_shown_as_text(page: Browser) -> None:
    show(page, "changes")
    page.evaluate("document.querySelector('#changes-list').scrollIntoView({behavior: 'instant'})")
    page.until("document.querySelector('#changes-list .badge')")

    for item_id in HOSTILE:
        page.evaluate(f"document.querySelector('#lookup-key').value = {item_id!r}")
        page.evaluate("document.querySelector('#lookup-form button').click()")
        page.until(f"document.querySelector('#lookup-result .id')?.textContent === {item_id!r}")

    assert page.evaluate("document.querySelectorAll('main img, main script, main svg [onload]').length") == 0


def test_a_semantic_id_leads_back_to_its_item(service: Any, page: Browser, catalogue: str) -> None:
    held = service.http.get("/assignment/item 7", params={"namespace": catalogue}).json()

    for written in (held["semantic_id"], "".join(held["tokens"])):
        page.evaluate("document.querySelector('#lookup-result').replaceChildren()")
        page.evaluate(f"document.querySelector('#lookup-key').value = {written!r}")
        page.evaluate("document.querySelector('#lookup-form button').click()")
        page.until("document.querySelector('#lookup-result .id')")
        assert text_of(page, "#lookup-result .id") == "item 7"


def test_the_health_of_the_code_is_that_of_the_statistics(service: Any, page: Browser, catalogue: str) -> None:
    show(page, "health")
    page.until("document.querySelectorAll('.heat').length === 3")
    stats = service.http.get("/stats", params={"namespace": catalogue, "codewords": True}).json()

    labels = page.evaluate("[...document.querySelectorAll('.heat')].map((map) => map.getAttribute('aria-label'))")
    assert all(f"{level['used']} of 16 used" in label for level, label in zip(stats["levels"], labels, strict=True))
    page.evaluate("document.querySelector('.heat').focus()")
    page.press("ArrowRight")
    first = stats["levels"][0]["counts"][0]
    assert text_of(page, ".readout") == f"a 0: {first} item{'s' * (first != 1)}"
    assert stats["drift"]["meaning"] in text_of(page, "#health-body")


def test_an_empty_namespace_says_so_in_every_section(service: Any, tab: Browser) -> None:
    tab.open(f"{service.http.base_url}/?namespace=empty-one")
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    for section in ("tree", "health", "changes"):
        show(tab, section)

    for section in ("tree-figure", "health-body", "changes-list"):
        tab.until(f"document.querySelector('#{section} .empty')")
    assert tab.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_can_be_read_by_everyone(page: Browser, *, dark: bool) -> None:
    page.look(width=NARROW, dark=dark)
    page.evaluate("document.querySelector('#try-form button').click()")
    for section in ("tree", "health", "changes"):
        show(page, section)
    for wanted in ("#try-result table", ".sunburst", ".heat", "#changes-list .badge"):
        page.until(f"document.querySelector({wanted!r})")

    assert page.evaluate("document.documentElement.scrollWidth") == NARROW
    assert page.evaluate(AUDITS["nameless"]) == []
    assert page.evaluate(AUDITS["faint"]) == []
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))")
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert page.evaluate("document.querySelectorAll('header, main, nav[aria-label], footer').length") >= 4
