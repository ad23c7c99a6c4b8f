"""Tokenizers side by side on one catalogue: load each, encode, measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.evaluation.cold_start import ColdStart, cold_start
from models.evaluation.figures import Material, Measurement, Result, Subject, growth_of, resolved
from models.evaluation.material import read_catalogue, read_pairs
from models.evaluation.subjects import Inputs, Paraphraser, Read, Reader

# Unseen items in common below which each tokenizer is measured on its own.
FEWEST_IN_COMMON = 100


@dataclass(frozen=True)
class CompareConfig:
    """What is drawn, and how much of it.

    Attributes:
        seed: Of every sample.
        queries: Items whose neighbours are searched, of all and of unseen ones each.
        paraphrased: Items whose text is paraphrased, unseen ones first; 0 leaves stability out.
    """

    seed: int = 0
    queries: int = 1000
    paraphrased: int = 300


@dataclass(frozen=True)
class Comparison:
    """The report.

    Attributes:
        catalogue: File, digest and number of items.
        interactions: File, users, pairs; None where there are none.
        config: What was drawn.
        unseen_in_common: Items that no tokenizer saw, on which all are measured; None where each is measured on its own
            unseen items, and the figures on them do not compare.
        results: A tokenizer each, in the order given.
    """

    catalogue: dict[str, Any]
    interactions: dict[str, Any] | None
    config: CompareConfig
    unseen_in_common: int | None
    results: tuple[Result, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        content = {"format": 1, **asdict(self)}
        for result in content["results"]:
            sizes = result["collisions"]["group_sizes"]
            result["collisions"]["group_sizes"] = {str(size): count for size, count in sizes.items()}
        return content


def compare(
    sources: Sequence[Path], inputs: Inputs, config: CompareConfig | None = None, say: Callable[[str], None] = print
) -> Comparison:
    """Measure checkpoints and index files on a catalogue.

    Args:
        sources: Directories of checkpoints, and index files (`.json`).
        inputs: What they are measured on.
        config: What is drawn.
        say: Takes lines for the user.

    Raises:
        ValueError: Something cannot be read, or does not fit the catalogue.
        CheckpointError: A checkpoint cannot be loaded.
    """
    config = config or CompareConfig()
    catalogue = read_catalogue(inputs.catalogue, inputs.key_column)
    pairs, notes = torch.empty(0, 2, dtype=torch.int64), None
    if inputs.interactions:
        pairs, users, unknown = read_pairs(inputs.interactions, catalogue.item_ids)
        notes = {"file": _short(inputs.interactions), "users": users, "pairs": len(pairs), "unknown": unknown}
    reader = Reader(catalogue, inputs, say)
    sources_read = []
    for source in sources:
        say(f"encoding the catalogue with {source.name}")
        sources_read.append(reader.read(source))
    common = _in_common([read.subject for read in sources_read])
    paraphraser = Paraphraser(reader, common, count=config.paraphrased, seed=config.seed)
    material = Material(len(catalogue.item_ids), catalogue.categories, pairs, config.queries, config.seed)
    results = []
    for read in _named_apart(sources_read):
        say(f"measuring {read.subject.name}")
        results.append(_measure(paraphraser.applied(read), material, common))
    return Comparison(
        catalogue={"file": _short(inputs.catalogue), "sha256": catalogue.sha256, "items": len(catalogue.item_ids)},
        interactions=notes,
        config=config,
        unseen_in_common=None if common is None else int(common.sum()),
        results=tuple(results),
    )


def _in_common(subjects: Sequence[Subject]) -> Tensor | None:
    """(N,) bool, the items that none of those that know it saw; None where these are too few."""
    known = [subject.unseen.rows for subject in subjects if subject.unseen.rows is not None]
    if not known:
        return None
    common = torch.stack(known).all(dim=0)
    alike = all(torch.equal(rows, common) for rows in known)
    return common if alike or int(common.sum()) >= FEWEST_IN_COMMON else None


def _measure(subject: Subject, material: Material, common: Tensor | None) -> Result:
    measurement = Measurement(subject, material)
    found = measurement.collisions
    manifest, unseen = subject.manifest, subject.unseen
    rows = unseen.rows if common is None or unseen.rows is None else common
    mask = None if rows is None else rows[subject.rows]
    return Result(
        name=subject.name,
        kind="checkpoint" if manifest else "index",
        family=manifest.family if manifest else None,
        codebook_sizes=subject.codebook_sizes,
        prefix_is_coarse_to_fine=manifest.prefix_is_coarse_to_fine if manifest else None,
        items=len(subject.rows),
        collisions=found,
        collisions_by_depth=tuple(measurement.groups.collisions_by_depth()),
        resolved=resolved(found, manifest.max_suffix if manifest else None),
        growth=growth_of(found),
        on_all=measurement.figures(torch.ones(len(subject.rows), dtype=torch.bool)),
        unseen_items=None if unseen.rows is None else int(unseen.rows[subject.rows].sum()),
        unseen_how=unseen.how,
        on_unseen=measurement.figures(mask) if mask is not None and bool(mask.any()) else None,
        cold_start=_cold_start(measurement, material),
    )


def _cold_start(measurement: Measurement, material: Material) -> ColdStart | None:
    subject = measurement.subject
    if subject.manifest is None or subject.unseen.rows is None or subject.embeddings is None or subject.errors is None:
        return None
    quantiles = subject.manifest.report.get("quantization_error", {})
    return cold_start(
        measurement.groups,
        subject.embeddings,
        subject.errors,
        subject.unseen.rows[subject.rows],
        sample=material.queries,
        training_q95=quantiles.get("q95"),
        seed=material.seed,
    )


def _named_apart(sources: Sequence[Read]) -> list[Read]:
    """Checkpoints of one name get their fingerprint, and what is then still alike a number."""
    names = [read.subject.name for read in sources]
    taken: list[str] = []
    found = []
    for read in sources:
        manifest = read.subject.manifest
        name = manifest.full_name if manifest and names.count(manifest.name) > 1 else read.subject.name
        taken.append(name)
        name = name if taken.count(name) == 1 else f"{name} ({taken.count(name)})"
        found.append(read._replace(subject=replace(read.subject, name=name)))
    return found


def _short(path: Path) -> str:
    """A file's last two parts: what lies above is the machine's business."""
    return "/".join(path.parts[-2:])
