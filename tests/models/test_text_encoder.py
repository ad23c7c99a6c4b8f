"""Word pieces are those that the tokenizer's own call gives, in a fraction of its time."""

from __future__ import annotations

import random

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
    assert [text_encoder.split([text])[0] for text in texts[-20:]] == expected[-20:]
    assert max(map(len, pieces)) == text_encoder.max_tokens == 256
    # when the tokenizer is no fast one
    assert text_encoder._splitter is not None
    monkeypatch.setattr(text_encoder, "_splitter", None)
    # then
    assert text_encoder.split(texts) == expected
