"""The page of a service that asks for keys: what it says without one, and what each scope may do on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from service.access.keys import KeyFile, Scope
from tests.conftest import ServiceThread
from tests.service.explorer.browser import Browser


class Guarded(NamedTuple):
    """A running service, and a key of each scope."""

    service: ServiceThread
    secrets: dict[Scope, str]


@pytest.fixture(scope="module")
def guarded(start_service: Callable[..., ServiceThread]) -> Iterator[Guarded]:
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    file, secrets = KeyFile(), {}
    for scope in Scope:
        file, secrets[scope] = file.with_new(f"of-{scope}", scope)
    file.write(directory / "keys.json")
    running = start_service(data_dir=directory, keys_file=directory / "keys.json")
    yield Guarded(running, secrets)
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


def use(tab: Browser, secret: str) -> None:
    """Enter a key, as a person does."""
    tab.until("!document.querySelector('#key').hidden")
    tab.evaluate("window.before = true")
    tab.evaluate(f"document.querySelector('#key-value').value = {secret!r}")
    tab.evaluate("document.querySelector('#key button').click()")
    tab.until("!window.before && document.readyState === 'complete'")


def submit(tab: Browser, button: str) -> None:
    tab.evaluate(f"document.querySelector('#try-form button[value={button}]').click()")
    tab.until("document.querySelector('#try-result').getAttribute('aria-busy') === 'false'")


def text_of(tab: Browser, selector: str) -> str:
    return str(tab.evaluate(f"document.querySelector({selector!r})?.textContent"))


def test_the_page_asks_for_a_key_and_does_what_its_scope_allows(guarded: Guarded, tab: Browser) -> None:
    tab.look()
    tab.open(f"{guarded.service.http.base_url}/")

    tab.until("document.querySelector('#about .notice')")
    assert text_of(tab, "#about strong") == "The service asks for a key."
    assert tab.evaluate("[...document.querySelectorAll('main > section:not(.intro)')].every((one) => one.inert)")
    assert tab.evaluate("document.querySelector('#scope').checkVisibility()") is False

    tab.evaluate("document.querySelector('#key-value').value = 'ключ'")  # no header can carry it
    tab.evaluate("document.querySelector('#key button').click()")
    tab.until("document.querySelector('#about strong')?.textContent === 'That is no key.'")
    assert tab.evaluate("sessionStorage.length") == 0

    use(tab, "semid_of-nobody")
    tab.until("document.querySelector('#about .notice')")
    assert text_of(tab, "#about strong") == "The service does not take this key."

    use(tab, guarded.secrets[Scope.READ])
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    assert tab.evaluate("document.querySelector('#key').hidden")
    submit(tab, "explain")
    tab.until("document.querySelector('#try-result table')")
    for section, shown in (("tree", "#tree-figure .empty"), ("health", "#health-body .card"), ("changes", ".empty")):
        tab.evaluate(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
        tab.until(f"document.querySelector('#{section}').querySelector('{shown}')")
    tab.evaluate("document.querySelector('#try-item').value = 'lamp'")
    submit(tab, "assign")
    tab.until("document.querySelector('#try-result .notice')")
    assert "this needs 'tokenize'" in text_of(tab, "#try-result .notice")

    use(tab, guarded.secrets[Scope.TOKENIZE])
    tab.until("document.querySelector('#about').textContent.includes('levels')")
    tab.evaluate("document.querySelector('#try-item').value = 'lamp'")
    submit(tab, "assign")
    tab.until("document.querySelector('#try-said').textContent.startsWith('Assigned ')")

    refused = [one for one in tab.complaints if "status of 401" not in one and "status of 403" not in one]
    assert refused == []
    assert tab.hosts() == {f"127.0.0.1:{guarded.service.address[1]}"}
    assert not any("semid_" in url for url in tab.requests)
    tab.command("Page.navigate", url="about:blank")  # else the service waits for the feed
