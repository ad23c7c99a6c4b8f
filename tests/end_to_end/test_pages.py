"""The pages load in a real browser, complain of nothing, and ask no other host for anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OWN_SCHEMES = {"data", "blob", "about", "chrome", "chrome-error", "devtools"}


@pytest.fixture(scope="module")
def browser() -> str:
    """A Chromium to run."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        assert "CI" not in os.environ, "no Chromium is installed"
        pytest.skip("no Chromium is installed")
    return found


class Visit:
    """What a headless browser saw of a page: its DOM after its scripts ran, its console, its requests."""

    def __init__(self, browser: str, url: str, directory: Path) -> None:
        net_log = directory / "net.json"
        self.screenshot = directory / "page.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={directory / 'profile'}"]
        options += [f"--log-net-log={net_log}", "--virtual-time-budget=10000", "--timeout=60000"]
        ended = subprocess.run(
            [browser, *options, "--dump-dom", url], capture_output=True, text=True, timeout=180, check=True
        )
        self.dom = ended.stdout
        self.console = re.findall(r":CONSOLE[^\]]*\] (.*)", ended.stderr)
        self.requests = _requested(net_log.read_text(), url)


def _requested(net_log: str, url: str) -> set[str]:
    """The URLs that the page asked for."""
    document = json.loads(net_log)
    start = document["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    origin = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"
    asked = [event["params"] for event in document["events"] if event["type"] == start and "params" in event]
    # The browser itself asks for its own updates and the like; what the page asks for bears the page's origin.
    return {
        params.get("url", "") for params in asked if origin in str(params.get("initiator")) or params.get("url") == url
    }


@pytest.mark.parametrize(
    ("path", "shown"), [("/docs", "POST"), ("/", "Semantic ID")], ids=["the documentation", "the page"]
)
def test_a_page_works_without_the_rest_of_the_world(
    running: Any, browser: str, tmp_path: Path, path: str, shown: str
) -> None:
    base = str(running.http.base_url)

    visit = Visit(browser, f"{base}{path}", tmp_path)

    assert shown in visit.dom
    assert [line for line in visit.console if "favicon" not in line] == []
    assert f"{base}{path}" in visit.requests
    hosts = {urlsplit(url).netloc for url in visit.requests if urlsplit(url).scheme not in OWN_SCHEMES}
    assert hosts == {urlsplit(base).netloc}


def test_the_documentation_lists_every_route(running: Any, browser: str, tmp_path: Path) -> None:
    visit = Visit(browser, f"{running.http.base_url}/docs", tmp_path)

    for route in running.http.get("/openapi.json").json()["paths"]:
        assert route.replace("/", "/\u200b") in visit.dom or route in visit.dom
