"""The README says what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from models import DEFAULT_CHECKPOINT, load, read_manifest
from service.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_settings_table_has_every_setting_with_its_default_and_description() -> None:
    rows = dict(re.findall(r"^\| `(SID_\w+)` \| (.*) \|$", README, re.MULTILINE))
    assert set(rows) == {f"SID_{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        assert rows[f"SID_{name.upper()}"].endswith(f"| {field.description}")


@pytest.mark.parametrize("room", ["models", "service", "docs", "benchmarks"])
def test_the_tree_names_every_module_and_nothing_that_is_gone(room: str) -> None:
    tree = README.split("## The house")[1].split("```")[1]
    section = re.split(r"^(?=\S)", tree, flags=re.MULTILINE)
    named = {
        name for part in section if part.startswith(f"{room}/") for name in re.findall(r"[\w-]+\.(?:py|lua|md)", part)
    }
    there = {
        path.name
        for suffix in ("py", "lua", "md")
        for path in (ROOT / room).rglob(f"*.{suffix}")
        if not {"checkpoints", "decisions"} & {*path.parts}
    } - {"__init__.py"}
    assert named == there


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) <= targets


def test_the_first_answer_is_what_the_default_tokenizer_gives() -> None:
    text = re.search(r'"text": "([^"]+)"', README)[1]
    answer = json.loads(README.split("```json")[1].split("```")[0])
    tokenizer = load(DEFAULT_CHECKPOINT)

    encoding = tokenizer.encode_texts(tokenizer.split([text]))

    assert answer["tokenizer"] == read_manifest(DEFAULT_CHECKPOINT).full_name
    assert answer["items"][0]["codes"] == encoding.codes[0].tolist()
    assert answer["items"][0]["margin"] == pytest.approx(float(encoding.margin[0]), abs=1e-4)


def test_nothing_is_left_to_be_filled_in() -> None:
    assert "@@" not in README
