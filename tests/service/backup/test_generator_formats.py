"""What generators read, written from a record's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.backup.formats import Format
from service.backup.generator_formats import vocabulary, write_format
from service.backup.record_table import Description, Origin, TableWriter
from service.registry.contents import Held
from service.semantic_id import SemanticId

SIZES = (3, 300)
ASSIGNED, DIGEST = bytes(4), bytes(8)


def held(item_id: str, packed: bytes, *, retired: bool = False, former: bytes = b"") -> Held:
    state = b"\2" + ASSIGNED if retired else b"\0"
    return Held(item_id.encode(), state + ASSIGNED + DIGEST + packed, former)


def origin_with(max_suffix: int | None) -> Origin:
    return Origin("t@0123456789abcdef", "0123456789abcdef", SIZES, max_suffix, "default", 1)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three live items; a retired one with a higher suffix, and a replaced ID."""
    path = tmp_path / "record.parquet"
    with TableWriter(path, origin_with(None)) as writer:
        writer.write_items(
            [
                held('é"', b"\0\2\1\0" + b"0"),
                held("b", b"\0\2\1\0" + b"2", former=ASSIGNED + b"\0\0\0\0" + b"7,"),
                held("c", b"\0\0\1\x2b" + b"0"),
                held("gone", b"\0\2\1\0" + b"9", retired=True),
            ]
        )
        writer.describe(Description(origin_with(None), 5, "2024-02-29T00:00:00+00:00"))
    return path


def written(table: Path, kind: Format, max_suffix: int | None = None, token_base: int = 0) -> tuple[str, int]:
    path = table.with_suffix(".out")
    suffixes = write_format(table, path, kind, origin_with(max_suffix), token_base=token_base)
    return path.read_text(encoding="utf-8"), suffixes


def test_index_json_has_the_tokens_of_each_live_item(table: Path) -> None:
    text, _ = written(table, Format.INDEX_JSON)

    assert json.loads(text) == {
        'é"': ["<a_2>", "<b_256>", "<c_0>"],
        "b": ["<a_2>", "<b_256>", "<c_2>"],
        "c": ["<a_0>", "<b_299>", "<c_0>"],
    }


def test_sid2vid_has_the_item_of_each_live_id(table: Path) -> None:
    text, _ = written(table, Format.SID2VID)

    assert json.loads(text) == {"2,256,0": [{"pid": 'é"'}], "2,256,2": [{"pid": "b"}], "0,299,0": [{"pid": "c"}]}


def test_jsonl_numbers_tokens_as_the_vocabulary_lists_them(table: Path) -> None:
    text, suffixes = written(table, Format.JSONL, token_base=1000)

    lines = [json.loads(line) for line in text.splitlines()]
    tokens = list(vocabulary(origin_with(None), suffixes))
    assert [line["item_id"] for line in lines] == ['é"', "b", "c"]
    assert lines[1] == {"item_id": "b", "token_ids": [1002, 1259, 1305], "metadata": {"semantic_id": "2-256-2"}}
    for line in lines:
        semantic_id = SemanticId.parse(line["metadata"]["semantic_id"], SIZES)
        assert [tokens[number - 1000] for number in line["token_ids"]] == list(semantic_id.tokens)


@pytest.mark.parametrize(("max_suffix", "last"), [(None, 2), (0, 0), (41, 41)])
def test_the_vocabulary_ends_with_the_suffixes_that_may_be_said(table: Path, max_suffix: int | None, last: int) -> None:
    text, suffixes = written(table, Format.VOCABULARY, max_suffix)

    tokens = text.splitlines()
    assert tokens[:4] == ["<a_0>", "<a_1>", "<a_2>", "<b_0>"]
    assert tokens[3 + 300 :] == [f"<c_{suffix}>" for suffix in range(last + 1)]
    assert suffixes == last + 1


@pytest.mark.parametrize("kind", [Format.INDEX_JSON, Format.SID2VID])
def test_a_record_without_live_items_is_an_empty_object(tmp_path: Path, kind: Format) -> None:
    table = tmp_path / "record.parquet"
    with TableWriter(table, origin_with(None)) as writer:
        writer.write_items([held("gone", b"\0\2\1\0" + b"9", retired=True)])

    text, suffixes = written(table, kind)

    assert (json.loads(text), suffixes) == ({}, 0)
