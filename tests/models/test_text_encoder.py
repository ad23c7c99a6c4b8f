"""Word pieces are those that the tokenizer's own call gives, in a fraction of its time."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from models.text_encoder import CANARY_TEXTS, TextEncoder

SIGNS = ["a", "é", "漢", "🎧", " ", "\t", "\u200d", "[SEP]", "[MASK]", "ß", "\x00", "½", "ﬁ", "İ", ".", "-ing", "##ed"]


def test_word_pieces_are_those_of_the_tokenizers_own_call(text_encoder: TextEncoder, monkeypatch) -> None:
    # given hostile texts, one of them too long
    own = text_encoder._word_piece_tokenizer
    draw = random.Random(4)
    texts = ["".join(draw.choices(SIGNS, k=draw.randint(1, 30))) for _ in range(200)]
    texts += [*CANARY_TEXTS, "[CLS]", "", " ".join(["kettle 500x"] * 300)]
    expected = own([text.strip() for text in texts], truncation=True, max_length=text_encoder.max_tokens)["input_ids"]
    # when
    pieces = text_encoder.split(texts)
    # then
    assert pieces == expected
    assert [text_encoder.split([text])[0] for text in texts] == expected  # most of them by another call of the library
    assert max(map(len, pieces)) == text_encoder.max_tokens == 256
    # when the tokenizer is no fast one
    assert text_encoder._splitter is not None
    monkeypatch.setattr(text_encoder, "_splitter", None)
    # then
    assert text_encoder.split(texts) == expected


GIVING_WAY = """
import os
from pathlib import Path

from models.text_encoder import TextEncoder, TextEncoderConfig, split_behind

def seconds_by_niceness():
    found = {}
    for task in Path("/proc/self/task").iterdir():
        steps = os.getpriority(os.PRIO_PROCESS, int(task.name)) - os.getpriority(os.PRIO_PROCESS, os.getpid())
        found[steps] = found.get(steps, 0) + int((task / "schedstat").read_text().split()[0]) / 1e9
    return found

split_behind(5)
encoder = TextEncoder(TextEncoderConfig())
before = seconds_by_niceness()
encoder.split(["a cordless kettle of stainless steel, 1.7 l"] * 16)
few = seconds_by_niceness()
encoder.split(["a cordless kettle of stainless steel, 1.7 l"] * 20_000)
after = seconds_by_niceness()
print(few[5] - before[5], after[5] - few[5])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
def test_many_texts_are_split_by_threads_that_give_way_and_a_few_by_the_caller() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVING_WAY], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True
    )
    few, many = map(float, done.stdout.split())

    assert few < 0.001
    assert many > 0.1
