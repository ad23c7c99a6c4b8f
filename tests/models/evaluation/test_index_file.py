"""Published index files."""

from __future__ import annotations

import json

import pytest

from models.evaluation.index_file import read_index


def test_tokens_become_codes_and_the_codebooks_are_as_large_as_the_codes_need(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"7": ["<a_12>", "<b_200>"], "8": ["<a_0>", "<b_3>"]}))
    index = read_index(path)
    assert index.keys == ("7", "8")
    assert index.codes.tolist() == [[12, 200], [0, 3]]
    assert index.codebook_sizes == (256, 256)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "no index file"),
        ('{"7": ["<a_1>"], "8": ["<a_1>", "<b_2>"]}', "1, 2"),
        ('{"7": ["a1"]}', "item '7'"),
        ('{"7": "<a_1>"}', "item '7'"),
        ('{"7": []}', "item '7'"),
        ('{"7": ["<a_99999999>"]}', "number 99999999"),
        ('{"7": ["<a_99999999999999999999>"]}', "item '7'"),
    ],
)
def test_what_is_no_index_file_is_refused_with_the_reason(tmp_path, content, words):
    path = tmp_path / "index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_index(path)


def test_a_file_that_is_no_text_is_said_to_be_no_tokenizer(tmp_path):
    path = tmp_path / "items.parquet"
    path.write_bytes(b"PAR1\xb4\xff")
    with pytest.raises(ValueError, match="neither a checkpoint's directory nor an index file"):
        read_index(path)
