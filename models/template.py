"""The text template: structured fields of an item -> the text that is tokenized. Part of the fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FieldValue = str | Sequence[str] | None


@dataclass(frozen=True)
class TextTemplate:
    """Puts fields together in a fixed order, leaving out the empty ones.

    Attributes:
        fields: Names of the fields, in the order they stand in the text. Fields not named here are ignored.
        separator: What stands between two fields.
        path_separator: What stands between the parts of a list, such as a category path.
    """

    fields: tuple[str, ...] = ("title", "brand", "categories", "description")
    separator: str = ". "
    path_separator: str = " > "

    def render(self, values: Mapping[str, FieldValue]) -> str:
        """The text of an item; empty where no named field has any content."""
        parts = (self._part(values.get(field)) for field in self.fields)
        return self.separator.join(part for part in parts if part)

    def _part(self, value: FieldValue) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value.strip()
        return self.path_separator.join(part.strip() for part in value if part.strip())
