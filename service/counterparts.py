"""What items hold under the other tokenizers that are loaded, in the answers to who looks them up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from service.answers import Answer
from service.errors import ServiceError
from service.records import Records
from service.tokenizers import LoadedTokenizer


async def show_counterparts(
    others: Sequence[LoadedTokenizer], records: Records, namespace: str, answers: Sequence[Answer]
) -> None:
    """Add to these answers the Semantic ID that the item of each holds under each of these tokenizers, by full name.

    None where it holds none, or was retired. Each record is read once, all of them at the same time. A tokenizer whose
    record cannot be read just now is left out: what was asked for is answered all the same.
    """
    of_items = [answer for answer in answers if "item_id" in answer]
    item_ids = [answer["item_id"] for answer in of_items]

    async def held(tokenizer: LoadedTokenizer) -> list[str | None] | None:
        with contextlib.suppress(ServiceError):
            record = await records.of(namespace, tokenizer.manifest)
            assignments = await record.by_item_ids(item_ids)
            return [str(each.semantic_id) if each is not None and each.live else None for each in assignments]
        return None

    found = await asyncio.gather(*map(held, others)) if of_items else []
    names = [other.full_name for other in others]
    readable = {name: ids for name, ids in zip(names, found, strict=False) if ids is not None}
    for place, answer in enumerate(of_items):
        answer["counterparts"] = {name: ids[place] for name, ids in readable.items()}
