"""Whoever asks for a stream has it alone."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from models.device.streams import give_back, own_stream

DEVICE = torch.device("cuda", 0)


def test_no_stream_is_taken_twice_until_it_is_given_back():
    # given three, handed out in turn
    streams = cycle(["first", "second", "third"])

    def take() -> str:
        return own_stream(DEVICE, lambda _: next(streams))

    # when, then
    assert [take(), take()] == ["first", "second"]
    give_back("first")
    assert [take(), take()] == ["third", "first"]
    with pytest.raises(RuntimeError, match="all streams of cuda:0 are taken"):
        take()
    give_back("second")
    assert take() == "second"
    for stream in ("first", "second", "third"):
        give_back(stream)
