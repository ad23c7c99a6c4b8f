"""The pages of docs/ do what they say: each is run line by line, and its answers are those of the service."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import DEFAULT_CHECKPOINT, exactness
from service.errors import ServiceError
from tests.end_to_end.conftest import ServiceProcess
from tests.pages import DOCS, Block, Reader, blocks_of, compare, fits

ROOT = DOCS.parent
TEXTS_OF_A_CALIBRATION = 8  # of 96: each goes alone through the model in float64
PAGES = [ROOT / "README.md", ROOT / "deploy" / "README.md", *DOCS.rglob("*.md"), ROOT / "models" / "README.md"]


@pytest.fixture(scope="module")
def newcomer() -> Iterator[ServiceProcess]:
    """The service as `make serve` starts it, with nothing in its record."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    process = ServiceProcess(directory, checkpoint=DEFAULT_CHECKPOINT)
    try:
        yield process.wait_until_ready()
    finally:
        process.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def environment(tmp_path: Path) -> str:
    """A directory with the commands of the environment that `make serve` makes."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "python").symlink_to(sys.executable)
    return str(commands)


def done_already() -> str:
    """In the place of the command that starts the service, and of the one that enters its environment."""
    return ""


def test_the_quickstart_does_what_it_says(newcomer: ServiceProcess, environment: str, tmp_path: Path) -> None:
    instead = {"make serve": done_already, ". .venv/bin/activate": done_already}

    Reader(tmp_path, str(newcomer.http.base_url), path=environment, instead=instead).read("quickstart.md")


def test_the_api_answers_as_its_page_says(newcomer: ServiceProcess, environment: str, tmp_path: Path) -> None:
    Reader(tmp_path, str(newcomer.http.base_url), path=environment).read("api.md")


def test_the_page_of_the_api_has_every_call_and_no_type_that_is_none(newcomer: ServiceProcess) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    asked = "\n".join(block.text for block in blocks_of("api.md"))
    routes = newcomer.http.get("/openapi.json").json()["paths"]

    for route in routes:
        if not route.startswith("/admin"):  # operators'
            assert route.partition("{")[0] in asked, f"docs/api.md has no {route}"
    slugs = {kind.slug for kind in _kinds(ServiceError)}
    for row in re.findall(r"^\| [\d, ]+ \| (.*?) \|", page, re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", row)) <= slugs


def test_a_generator_is_constrained_to_live_ids_as_its_page_says(newcomer: ServiceProcess, tmp_path: Path) -> None:
    Reader(tmp_path, str(newcomer.http.base_url)).read("generator.md")


def test_a_first_checkpoint_is_trained_compared_and_served_as_its_page_says(
    start_service: Callable[..., Any], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "SAMPLE_TEXTS", TEXTS_OF_A_CALIBRATION)
    (tmp_path / "models").symlink_to(ROOT / "models")
    started: list[Any] = []

    def serve() -> str:
        service = start_service(checkpoint=tmp_path / "my-tokenizer", data_dir=data_dir)
        started.append(service)
        reader.url = str(service.http.base_url)
        return ""

    reader = Reader(tmp_path, "", instead={"SID_CHECKPOINT=my-tokenizer semid serve": serve})
    try:
        reader.read("first-checkpoint.md")
    finally:
        for service in started:
            service.stop()

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [one["name"] for one in report["results"]] == ["my-tokenizer", "broad-6x256"]


@pytest.mark.parametrize(
    ("shown", "answered"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, "...": "..."}, {"b": 1}),
        ([1, "..."], [2, 3]),
        ([1], [1, 2]),
        (0.5, 0.502),
        (True, 1),
        ("2026-11-22T08:54:33Z", "soon"),
    ],
)
def test_another_answer_than_the_one_shown_is_noticed(shown: Any, answered: Any) -> None:
    assert fits(shown, shown)
    assert not fits(shown, answered)
    with pytest.raises(AssertionError, match=r"another answer"):
        compare(Block("json", json.dumps(shown), 1), json.dumps(answered), "here")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} leads to {target}"
        assert not heading or heading in _headings(there), f"{page.name} leads to {target}"


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s:]+)\)", index)}

    assert {*DOCS.rglob("*.md")} - {DOCS / "README.md"} <= linked


def _headings(page: Path) -> set[str]:
    """The anchors of a page, as they are made of its headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)
