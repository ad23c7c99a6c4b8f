"""The names of what `semid export` writes."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """What `semid export` writes."""

    PARQUET = "parquet"
    """The whole table, retired and replaced IDs too: for a backup, and for `semid import`."""
    INDEX_JSON = "index-json"
    """`{"item": ["<a_12>", "<b_200>", ...], ...}`, as LC-Rec, LETTER and MiniOneRec read it."""
    SID2VID = "sid2vid"
    """`{"12,200,7,0": [{"pid": "item"}], ...}`, as flashrec reads it."""
    JSONL = "jsonl"
    """`{"item_id": "item", "token_ids": [12, 456, ...], "metadata": {...}}`, as NVIDIA's sid-gr-inference reads it."""
    VOCABULARY = "vocabulary"
    """`<a_0>`, `<a_1>`, ..., a token a line: what a language model's tokenizer is given."""
