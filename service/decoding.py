"""The decoder's side of the record: what a generator may say next, and how it stays fresh."""

from __future__ import annotations

from service.answers import Answer
from service.changes import Change
from service.records import Records


class Decoding:
    """Answers those who constrain a decoder by the record."""

    def __init__(self, records: Records, *, max_wait_s: float) -> None:
        self._records = records
        self._max_wait_s = max_wait_s

    async def changes(self, after: int, limit: int, wait_s: float, namespace: str, tokenizer: str | None) -> Answer:
        """Answer `GET /changes`: what came and went after a revision, in order.

        Raises:
            ChangesGone: Those are no longer kept.
        """
        record = await self._records.of(namespace, tokenizer)
        found = await record.changes.after(after, limit, min(wait_s, self._max_wait_s))
        return {
            **self._records.origin(namespace),
            "revision": found.revision,
            "next_after": found.changes[-1].revision if found.changes else after,
            "changes": [_change(change) for change in found.changes],
        }


def _change(change: Change) -> Answer:
    return {
        "revision": change.revision,
        "change": change.kind,
        "item_id": change.item_id,
        "semantic_id": str(change.semantic_id),
        "replaced_by": str(change.replaced_by) if change.replaced_by else None,
    }
