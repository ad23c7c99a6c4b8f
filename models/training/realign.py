"""A checkpoint once more, its codewords numbered like another one's, as on a catalogue: `semid align`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.agreement import LevelAgreement, agreement
from models.alignment import Aligned, aligned
from models.checkpoint import Manifest, freeze, load, load_parts, read_manifest, save
from models.evaluation.material import Embedder, read_catalogue
from models.ladder import ErrorBounds
from models.tokenizer import Tokenizer

CARD = "README.md"


@dataclass(frozen=True)
class Realigned:
    """What became of it.

    Attributes:
        manifest: Of the new checkpoint.
        items: N, on which it was aligned.
        before: How far the tokenizer agreed with the other one.
        after: How far it does under the new numbers.
        unseen: How far it would, on half of the items, under the numbers that the other half alone would give: what to
            expect of items that are yet to come. None of fewer than two items.
    """

    manifest: Manifest
    items: int
    before: tuple[LevelAgreement, ...]
    after: tuple[LevelAgreement, ...]
    unseen: tuple[LevelAgreement, ...]


def realign(
    directory: Path,
    to: Path,
    items: Path,
    out: Path,
    *,
    name: str,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
) -> Realigned:
    """Write a checkpoint once more, its codewords numbered so that most items keep the codes of another one.

    Bounds, calibration and report stay what they were: no codeword moves.

    Args:
        directory: The checkpoint.
        to: The other one.
        items: A catalogue, or an array of embeddings, on which codes are compared; rows without a text are passed over.
        out: The new checkpoint's directory; must not exist, or be empty.
        name: The new tokenizer's name.
        cache: A directory that keeps embeddings of texts between runs.
        device: Where the tokenizers run.

    Raises:
        CheckpointError: A checkpoint cannot be loaded.
        ValueError: One does not take what the catalogue has; or an item lies exactly between two codewords, so that
            other numbers give it another one.
        FileExistsError: `out` is not empty.
    """
    embedder = Embedder(read_catalogue(items), cache)
    manifest, other = read_manifest(directory), read_manifest(to)
    parts, bounds = load_parts(directory, manifest), ErrorBounds(**manifest.bounds)
    rows, new = _encoded(load(directory, device), embedder)
    old_rows, old = _encoded(load(to, device), embedder)
    both = torch.isin(rows, old_rows)
    new, old = new[both], old[torch.isin(old_rows, rows)]

    def under(numbered: Aligned) -> Tensor:
        """The codes (N, L) that the items get."""
        return _encoded(Tokenizer(name, numbered.parts, bounds, device), embedder)[1][both]

    found = aligned(parts, new, old)
    if ties := int((under(found) != found.codes).any(dim=1).sum()):
        raise ValueError(f"{ties} items lie exactly between codewords: under other numbers they would get other ones")
    before, after = agreement(old, new), agreement(old, found.codes)
    seen, rest = torch.randperm(len(new), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    unseen: tuple[LevelAgreement, ...] = ()
    if len(rest):
        unseen = agreement(old[rest], under(aligned(parts, new[seen], old[seen]))[rest])
    notes = {
        "of": manifest.full_name,
        "to": other.full_name,
        "items": len(new),
        "before": _shares(before),
        "after": _shares(after),
        "unseen": _shares(unseen),
    }
    frozen = freeze(
        name,
        found.parts,
        bounds,
        calibration=manifest.calibration,
        training={**manifest.training, "aligned": notes},
        report=manifest.report,
        max_suffix=manifest.max_suffix,
    )
    save(out, found.parts, frozen, beside={CARD: _card(directory, frozen)})
    return Realigned(frozen, len(new), before, after, unseen)


def _encoded(tokenizer: Tokenizer, embedder: Embedder) -> tuple[Tensor, Tensor]:
    """The rows (n,) that have a content, and their codes (n, L), on the CPU."""
    space = embedder.space(tokenizer)
    return space.rows, tokenizer.encode(space.embeddings).codes.cpu().clone()


def _shares(levels: Sequence[LevelAgreement]) -> list[dict[str, float]]:
    """What the manifest keeps of each level."""
    return [{"equal_codes": level.equal_codes, "equal_prefixes": level.equal_prefixes} for level in levels]


def _card(directory: Path, manifest: Manifest) -> str:
    """The model card of the checkpoint as it was, under the new name and with what became of it."""
    notes = manifest.training["aligned"]
    card = directory / CARD
    lines = card.read_text(encoding="utf-8").splitlines()[1:] if card.is_file() else []
    measured = [
        [f"{share['equal_codes']:.1%} ({share['equal_prefixes']:.1%})" for share in shares]
        for shares in (notes["before"], notes["after"], notes["unseen"])
        if shares
    ]
    rows = [f"| {level} | {' | '.join(shares)} |" for level, shares in enumerate(zip(*measured, strict=True), 1)]
    heads = ["as it was", "aligned", "half of the items, aligned on the other half"][: len(measured)]
    aligned_to = [
        "",
        "## Aligned",
        "",
        f"This is {notes['of']}, its codewords numbered like those of {notes['to']}, as on {notes['items']:,} items.",
        "No codeword moved, so all that is said above holds; the fingerprint is another one, since the codes are.",
        "Share of items with equal codes, in brackets with equal prefixes:",
        "",
        f"| level | {' | '.join(heads)} |",
        "|" + " --- |" * (1 + len(heads)),
        *rows,
    ]
    return "\n".join([f"# {manifest.full_name}", *lines, *aligned_to]) + "\n"
