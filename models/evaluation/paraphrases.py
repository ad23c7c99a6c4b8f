"""Paraphrases of an item's text: seeded changes that leave its meaning as it is. What keeps its codes is stable.

Each kind takes an item and gives its text, changed; the text comes back as it was where a kind finds nothing to change.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from models.catalogue import CatalogueItem
from models.template import FieldValue, TextTemplate

BOILERPLATE = " Free shipping on all orders. 100% satisfaction guaranteed."

# Words of many catalogues and others that mean the same there.
SYNONYMS: Mapping[str, str] = {
    "and": "&",
    "&": "and",
    "with": "including",
    "for": "designed for",
    "oz": "ounce",
    "ounce": "oz",
    "ounces": "oz",
    "ml": "milliliters",
    "inch": "in.",
    "inches": "in.",
    "pack": "set",
    "set": "kit",
    "kit": "set",
    "piece": "pc",
    "pieces": "pcs",
    "count": "pieces",
    "women": "ladies",
    "women's": "ladies'",
    "womens": "ladies",
    "men": "gentlemen",
    "men's": "gentlemen's",
    "kids": "children",
    "baby": "infant",
    "small": "little",
    "large": "big",
    "mini": "small",
    "new": "brand-new",
    "professional": "pro",
    "pro": "professional",
    "natural": "all-natural",
    "colour": "color",
    "color": "colour",
    "gray": "grey",
    "fragrance": "scent",
    "perfume": "fragrance",
    "moisturizer": "moisturising cream",
    "lotion": "cream",
    "cleanser": "cleaning gel",
    "bag": "pouch",
    "case": "box",
    "cordless": "wireless",
    "wireless": "cordless",
    "replacement": "spare",
    "portable": "travel-size",
}

Paraphrase = Callable[[CatalogueItem, TextTemplate, random.Random], str]


@dataclass(frozen=True)
class Kept:
    """How many items keep their codes under a kind of paraphrase.

    Attributes:
        items: Those whose text the kind changed.
        by_depth: Share of them that keep their first 1, 2, ..., L codes.
    """

    items: int
    by_depth: tuple[float, ...]


def paraphrase(kind: str, item: CatalogueItem, template: TextTemplate, seed: int = 0) -> str:
    """An item's text under a kind of `PARAPHRASES`; the same for the same item and seed, whatever else is asked.

    Args:
        kind: A key of `PARAPHRASES`.
        item: A row of the catalogue.
        template: Fields -> text.
        seed: Of what is drawn.
    """
    digest = hashlib.sha256(f"{seed} {kind} {item.item_id}".encode()).digest()
    return PARAPHRASES[kind](item, template, random.Random(digest))  # noqa: S311 - no secret hangs on it


def kept(before: Tensor, after: Tensor) -> Kept:
    """Shares of items whose codes (n, L) int64 are the same after as before, by depth."""
    same = (before == after).cumprod(dim=1).double()
    return Kept(len(before), tuple(same.mean(dim=0).tolist()) if len(before) else ())


def _upper_case(item: CatalogueItem, template: TextTemplate, _: random.Random) -> str:
    return item.content(template).upper()


def _punctuation(item: CatalogueItem, template: TextTemplate, _: random.Random) -> str:
    """Other separators between the fields, and none of the signs that only part words."""
    text = re.sub(r"[,;:()\[\]\"|]+", " ", item.content(template).replace(template.path_separator, " / "))
    return re.sub(r"\s+", " ", re.sub(r"(?<=\w)-(?=\w)", " ", text).replace(template.separator, " - ")).strip()


def _field_order(item: CatalogueItem, template: TextTemplate, _: random.Random) -> str:
    return item.content(replace(template, fields=tuple(reversed(template.fields))))


def _without_brand(item: CatalogueItem, template: TextTemplate, _: random.Random) -> str:
    """Without the field; a brand that the title names as well stays there."""
    if item.text:
        return item.content(template)
    fields = {name: value for name, value in item.fields.items() if name != "brand"}
    return replace(item, fields=fields).content(template) or item.content(template)


def _boilerplate(item: CatalogueItem, template: TextTemplate, _: random.Random) -> str:
    return item.content(template).rstrip(".") + "." + BOILERPLATE


def _synonyms(item: CatalogueItem, template: TextTemplate, _: random.Random) -> str:
    def other(word: re.Match[str]) -> str:
        return SYNONYMS.get(word[0].lower(), word[0])

    return _on_title(item, template, lambda text: re.sub(r"[A-Za-z']+|&", other, text))


def _typo(item: CatalogueItem, template: TextTemplate, source: random.Random) -> str:
    """Two neighbouring letters of one word of five or more, not its first, change places."""

    def mistype(text: str) -> str:
        places = [
            word.start() + inner
            for word in re.finditer(r"[^\W\d_]{5,}", text)
            for inner in range(1, len(word[0]) - 1)
            if word[0][inner] != word[0][inner + 1]
        ]
        if not places:
            return text
        place = source.choice(places)
        return text[:place] + text[place + 1] + text[place] + text[place + 2 :]

    return _on_title(item, template, mistype)


def _on_title(item: CatalogueItem, template: TextTemplate, change: Callable[[str], str]) -> str:
    """The text with the title changed, or all of it where the item has no title of its own."""
    title = item.fields.get("title")
    if item.text or not isinstance(title, str):
        return change(item.content(template))
    fields: dict[str, FieldValue] = {**item.fields, "title": change(title)}
    return replace(item, fields=fields).content(template)


# Every kind, by the name a report gives it.
PARAPHRASES: Mapping[str, Paraphrase] = {
    "upper case": _upper_case,
    "punctuation": _punctuation,
    "field order": _field_order,
    "brand dropped": _without_brand,
    "boilerplate": _boilerplate,
    "synonyms": _synonyms,
    "typo": _typo,
}
