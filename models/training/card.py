"""The model card of a checkpoint, written from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.checkpoint import Manifest

# What a user of such a text encoder is told.
BELOW_FLOAT64 = "the canonical path of this text encoder computes parts in float32"


def model_card(manifest: Manifest) -> str:
    """README.md of a checkpoint: data and terms, training, figures, limits."""
    sections = [
        _heading(manifest),
        _data(manifest.training),
        _training(manifest.training),
        _figures(manifest.report),
        _exactness(manifest),
        _limits(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _heading(manifest: Manifest) -> str:
    sizes = " x ".join(map(str, manifest.codebook_sizes))
    encoder = manifest.text_encoder["source"] if manifest.text_encoder else "none: it takes embeddings only"
    widths = "-".join(map(str, manifest.widths))
    return "\n".join(
        [
            f"# {manifest.full_name}",
            "",
            "A frozen tokenizer: content -> codes. It never changes; another training makes another fingerprint.",
            "",
            f"- family: {manifest.family}, {len(manifest.codebook_sizes)} levels ({sizes} codewords)",
            f"- encoder network: {widths}" + (" (one linear map)" if len(manifest.widths) == 2 else " (ReLU)"),
            f"- text encoder: {encoder}",
            f"- text template: {', '.join(manifest.template['fields'])}, joined by {manifest.template['separator']!r}",
        ]
    )


def _data(training: Mapping[str, Any]) -> str:
    lines = ["## Data and terms", ""]
    if training.get("data_terms"):
        lines += [str(training["data_terms"]), ""]
    lines += ["| file | items | sha256 |", "| --- | --- | --- |"]
    lines += [f"| {note['file']} | {note['items']:,} | `{note['sha256'][:16]}...` |" for note in training["files"]]
    if training.get("left_out"):
        lines += ["", f"Of these files {training['left_out']:.0%} of all contents were left out, by their digest."]
    lines += ["", "No text is in the checkpoint: it holds the networks' weights and the codebooks only."]
    return "\n".join(lines)


def _training(training: Mapping[str, Any]) -> str:
    command = training.get("command")
    lines = ["## Training", ""]
    if command:
        lines += ["```", command, "```", ""]
    if "stopped_on" in training:
        lines += [
            f"{training['epochs_run']} epochs of joint training were run. Kept is the state with the smallest",
            f"{training['stopped_on']} ({training['held_out_items']:,} items were held out).",
        ]
    else:
        lines += [f"By k-means alone, on all items but {training['held_out_items']:,} that were held out."]
    if "collaborative" in training:
        lines += [_collaborative(training["collaborative"])]
    lines += [
        "All hyper-parameters are in `manifest.json`.",
        "",
        "Training on your own catalogue takes minutes and gives better IDs for it:",
        "",
        "```",
        "semid train items.parquet --out my-tokenizer",
        "```",
    ]
    return "\n".join(lines)


def _collaborative(notes: Mapping[str, Any]) -> str:
    """A sentence on the item embeddings that the collaborative objective was given."""
    method = {"sasrec": "SASRec", "ppmi": "PPMI and SVD"}.get(notes["method"])
    source = notes.get("interactions") or notes["file"]
    words = f"learnt by {method} from the sequences of" if method else "read from"
    before = " but each user's last two interactions" if method else ""
    return (
        f"The collaborative objective had {notes['width']} numbers for {notes['share_of_items']:.1%} of the items, "
        f"{words} {source['file']} (`{source['sha256'][:16]}...`){before}. Nothing of users is in the checkpoint."
    )


def _figures(report: Mapping[str, Any]) -> str:
    held_out, collisions = report["held_out"], report["collisions"]
    lines = [
        "## Figures",
        "",
        "Raw: before the collision suffix, which makes every Semantic ID unique.",
        "",
        "| on the training data | |",
        "| --- | --- |",
        f"| items | {report['items']:,} |",
        f"| reconstruction error, share of the variance | {report['reconstruction_error']:.3f} |",
        f"| the same, held out | {held_out['reconstruction']:.3f} |",
        f"| raw collisions, 1 - unique/N | {collisions['rate']:.2%} |",
        f"| items whose embedding equals an earlier one's | {collisions['duplicates']:.2%} |",
        f"| largest group | {collisions['largest_group']} |",
        "",
        "| level | codewords used | perplexity | entropy, bits |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {number} | {level['used']:.1%} | {level['perplexity']:.1f} | {level['entropy']:.2f} |"
        for number, level in enumerate(report["levels"], 1)
    ]
    if "files" in report:
        lines += ["", "| file | items | raw collisions | largest group | reconstruction error |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {part['items']:,} | {part['collisions']['rate']:.2%} | "
            f"{part['collisions']['largest_group']} | {part['reconstruction_error']:.3f} |"
            for name, part in report["files"].items()
        ]
    return "\n".join(lines)


def _exactness(manifest: Manifest) -> str:
    notes = manifest.calibration
    largest, shares = notes["largest_error"], notes["recomputed_share"]
    below = notes["canonical_below_float64"]
    warning = (
        f"{BELOW_FLOAT64.capitalize()} ({', '.join(below)}): another processor may place an item near a tie elsewhere."
    )
    return "\n".join(
        [
            "## Exactness",
            "",
            "Rows nearer to a tie than the bound are computed again, alone in float64: codes depend on content only.",
            "",
            "| path | largest latent error seen | bound | rows computed again |",
            "| --- | --- | --- | --- |",
            *(
                f"| {path} | {largest[path]:.2g} | {manifest.bounds[path]:.2g} | {shares[path]:.3%} |"
                for path in ("text", "embedding")
            ),
            *(["", warning] if below else []),
        ]
    )


def _limits() -> str:
    return """## Limits

- Codes are as good as the text: items with equal texts share all codes, and short or formulaic texts come close to it.
- A catalogue of one domain uses few codewords of level 1 of a tokenizer trained on many domains; the deeper levels
  tell its items apart.
- The text encoder cuts long texts; what stands first counts.
- IDs of different tokenizers cannot be compared, nor mixed in one recommender."""
