"""What a step on a cluster replies is what came of it, whatever others made of the item before the reply was read."""

from __future__ import annotations

from service.registry.keys import RecordKeys
from service.registry.steps import Work
from service.semantic_id import CodeLayout

ID = b"\x00\x020"
RETIRED_AT, ASSIGNED_AT, NOW = b"\0\0\0\2", b"\0\0\0\1", b"\0\0\0\3"
KEYS = RecordKeys("shop:0123456789abcdef", CodeLayout((4, 4)), 16)


def test_an_item_that_came_back_is_told_its_own_content_though_another_was_kept_since() -> None:
    back = b"\0" + ASSIGNED_AT + b"contents" + ID
    work = Work(b"item", b"\0\0\0\1B" + NOW + back, b"\2" + RETIRED_AT + ASSIGNED_AT + b"contents" + ID, b"")
    work.semantic_id = ID

    work.value = b"\1" + ASSIGNED_AT + b"anothers" + ID

    assert work.reply(KEYS) == back


def test_an_item_that_got_back_an_earlier_id_is_told_so_though_another_content_was_kept_since() -> None:
    other, earlier_at = b"\x00\x030", b"\0\0\0\x04"
    digest, base, codes = b"contents", b"\xff" * 4, ID[:2]
    before = b"\0" + ASSIGNED_AT + b"previous" + other
    work = Work(b"item", b"\0\0\0\1R" + NOW + digest + base + codes, before, earlier_at + ID + b",")
    work.semantic_id = ID

    work.value = b"\1" + earlier_at + b"anothers" + ID

    assert work.reply(KEYS) == b"\0" + earlier_at + digest + ID
