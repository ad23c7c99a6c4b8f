"""What a record promises, said with dicts."""

from __future__ import annotations

from service.semantic_id import SemanticId

Codes = tuple[int, ...]


class Model:
    """A record that holds what was claimed of it."""

    def __init__(self, max_suffix: int) -> None:
        self.max_suffix = max_suffix
        self.holders: dict[SemanticId, str] = {}  # for good
        self.held: dict[str, SemanticId] = {}
        self.retired: set[str] = set()
        self.latest: dict[str, Codes] = {}
        self.content_changed: dict[str, bool] = {}
        self.changes: list[tuple[str, str, SemanticId, SemanticId | None]] = []

    @property
    def live(self) -> dict[SemanticId, str]:
        return {semantic_id: item for item, semantic_id in self.held.items() if item not in self.retired}

    def claim(self, item_id: str, places: list[Codes], *, reassign: bool) -> tuple[SemanticId | None, bool]:
        """The ID that the item holds now, None where there is no suffix left; and whether it was issued now."""
        old = self.held.get(item_id)
        fits = old is not None and old.codes in places[: self.first_free(places) + 1]
        given = self.latest.get(item_id) == places[0] and not self.content_changed[item_id]
        if old is not None and (fits or given or not reassign):
            if item_id in self.retired:
                self.changes.append(("returned", item_id, old, None))
            self.retired.discard(item_id)
            if self.latest[item_id] != places[0]:
                self.latest[item_id] = places[0]
                self.content_changed[item_id] = not fits
            return old, False
        earlier = {found.codes: found for found, holder in self.holders.items() if holder == item_id}
        place = next((codes for codes in places if codes in earlier or not self.full(codes)), None)
        if place is None:
            return None, False
        semantic_id = earlier.get(place) or SemanticId(place, self.group_size(place))
        self.changes.append(("returned" if place in earlier else "assigned", item_id, semantic_id, None))
        if old:
            self.changes.append(("replaced", item_id, old, semantic_id))
        self.holders[semantic_id] = item_id
        self.held[item_id] = semantic_id
        self.retired.discard(item_id)
        self.latest[item_id] = places[0]
        self.content_changed[item_id] = False
        return semantic_id, place not in earlier

    def group_size(self, codes: Codes) -> int:
        return sum(found.codes == codes for found in self.holders)

    def full(self, codes: Codes) -> bool:
        return self.group_size(codes) > self.max_suffix

    def first_free(self, places: list[Codes]) -> int:
        return next((place for place, codes in enumerate(places) if not self.full(codes)), len(places))

    def retire(self, item_id: str) -> None:
        if item_id in self.held and item_id not in self.retired:
            self.retired.add(item_id)
            self.changes.append(("retired", item_id, self.held[item_id], None))
