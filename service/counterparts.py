"""What an item holds under the other tokenizers that are loaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from service.errors import ServiceError
from service.records import Records
from service.tokenizers import LoadedTokenizer


async def counterparts(
    others: Sequence[LoadedTokenizer], records: Records, namespace: str, item_id: str
) -> dict[str, str | None]:
    """The Semantic ID that an item holds under each of these tokenizers, by full name.

    None where it holds none, or was retired. A tokenizer whose record cannot be read just now is left out: what was
    asked for is answered all the same.
    """
    found: dict[str, str | None] = {}

    async def look(tokenizer: LoadedTokenizer) -> None:
        with contextlib.suppress(ServiceError):
            record = await records.of(namespace, tokenizer.manifest)
            (assignment,) = await record.by_item_ids([item_id])
            live = assignment is not None and assignment.live
            found[tokenizer.full_name] = str(assignment.semantic_id) if assignment and live else None

    await asyncio.gather(*map(look, others))
    return {tokenizer.full_name: found[tokenizer.full_name] for tokenizer in others if tokenizer.full_name in found}
