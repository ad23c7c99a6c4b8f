"""An item's panel has what the item holds under the other tokenizers that are loaded."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import read_manifest
from tests.service.explorer.browser import Browser
from tests.service.explorer.test_page import AUDITS, NARROW, show

LISTED = """[...document.querySelectorAll('#lookup-result .counterparts li')].map((line) =>
    [line.querySelector('.id').textContent, line.querySelector('.chain')?.getAttribute('aria-label') ?? null])"""


@pytest.fixture(scope="module")
def three(start_service: Callable[..., Any], make_checkpoint: Callable[..., Path]) -> Iterator[tuple[Any, list[str]]]:
    """A service with three tokenizers, and their full names, the default's first."""
    sizes = {"winter": (4, 4, 4), "spring": (6, 6), "summer": (5, 5, 5, 5)}
    paths = [make_checkpoint(name, *sizes[name], takes_text=False) for name in sizes]
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    running = start_service(checkpoint=paths[0], further_checkpoints=tuple(paths[1:]), data_dir=directory)
    yield running, [read_manifest(path).full_name for path in paths]
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


def test_an_item_is_shown_with_what_it_holds_under_other_tokenizers(
    three: tuple[Any, list[str]], tab: Browser, make_embedding: Callable[[int], list[float]]
) -> None:
    service, names = three
    item = {"item_id": "kettle-1", "embedding": make_embedding(1)}
    held = {name: service.tokenize(item, tokenizer=name)[0]["semantic_id"] for name in names[:2]}
    tab.look()
    tab.open(str(service.http.base_url))
    tab.until("document.querySelector('#about').textContent.includes('levels')")

    for asked in ("kettle-1", held[names[0]]):  # by either way
        show(tab, "lookup")
        tab.evaluate("document.querySelector('#lookup-result').replaceChildren()")
        tab.evaluate(f"document.querySelector('#lookup-key').value = {json.dumps(asked)}")
        tab.evaluate("document.querySelector('#lookup-form button').click()")
        tab.until("document.querySelector('#lookup-result .counterparts')")
        assert dict(tab.evaluate(LISTED)) == {names[1]: held[names[1]], names[2]: None}

    for dark in (False, True):
        tab.look(width=NARROW, dark=dark)
        tab.until("document.getAnimations().every((one) => one.playState === 'finished')")
        assert tab.evaluate("document.documentElement.scrollWidth") == NARROW
        assert tab.evaluate(AUDITS["nameless"]) == []
        assert tab.evaluate(AUDITS["faint"]) == []
    assert tab.complaints == []
    tab.command("Page.navigate", url="about:blank")  # else the service waits for the feed
