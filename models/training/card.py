"""The model card of a checkpoint, written from its manifest alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from models.checkpoint import Manifest

# What a user of such a text encoder is told.
BELOW_FLOAT64 = "the canonical path of this text encoder computes parts in float32"

NOT_MEASURED = "not measured"

# Of each path of the ladder (see `models.ladder`), by the name that its bound has.
_PATHS: Mapping[str, str] = {
    "text_bfloat16": "texts, bfloat16",
    "text": "texts, float32",
    "embedding_float32": "embeddings, float32",
    "embedding": "embeddings, float64",
}

# Of each family: what its prefix means, how training chose, what it is good and bad at. What was measured of them is in
# docs/families.md.
FAMILY_WORDS: Mapping[str, str] = {
    "rqvae": """
A prefix is a coarser description: each level names what the levels before it left of a learned latent. Networks and
codebooks are trained together, from a start by k-means, and the epoch is chosen on held-out items. Good at few
collisions for what it rebuilds, with levels used evenly. Bad at being quick: it has the most settings and takes the
longest to train, and it rebuilds items that it never saw less well than those it was trained on.""",
    "rq-kmeans": """
A prefix is a coarser description: each level names what the levels before it left of the embedding, or of its
principal components. Nothing is learned but the codebooks, by k-means of all rows, level by level, and nothing is
chosen. Good at rebuilding unseen items on the embeddings themselves, with hardly a setting. Bad at collisions
there, as its later levels are used unevenly; on few principal components it collides far less and rebuilds less.""",
    "rk-means": """
A prefix is a coarser description: each level names what the levels before it left of the embedding, or of its
principal components. Codebooks are those of residual k-means by mini-batches, and nothing is chosen. Good at data
of any size, as one batch is in memory at a time; it errs and collides about as `rq-kmeans` does. Bad where that
is: at collisions on the embeddings themselves.""",
    "r-vq": """
A prefix is a coarser description: each level names what the levels before it left of the embedding, or of its
principal components. Codebooks are learned batch by batch, by running means or by the gradient, from a start by
k-means, and the epoch is chosen on held-out items. Good at going on where k-means ended, with dead codewords
restarted and no encoder to train. Bad where a learned latent is needed: what the embeddings do not part, it cannot.""",
    "hierarchical": """
A prefix is a coarser description: a node of a tree, its items one cluster of its parent's. A code means something
under its prefix alone. K-means of each node's rows grows the tree, and nothing is chosen. Good at rebuilding the
items that it was trained on. Bad at items it never saw: where nodes hold few items each, a new item gets the codes
of a known one.""",
    "pq": """
A prefix is NO coarser description: each code names one part of the latent and says nothing of the others. K-means
of each part makes its codebook, and nothing is chosen. Good at using every level evenly, at little cost, with many
levels (VQ-Rec has 32). Bad with few: it collides most of all families, as the parts of an embedding tell much the
same.""",
    "opq": """
A prefix is NO coarser description: each code names one part of the latent and says nothing of the others. A
rotation is learned first, which spreads the variance over the parts; then k-means of each part makes its codebook,
and nothing is chosen. Good at what `pq` is, with fewer collisions and less error. Bad with few levels all the same.""",
}


def model_card(manifest: Manifest) -> str:
    """README.md of a checkpoint: its family, data and terms, training, figures, limits."""
    sections = [
        _heading(manifest),
        family_section(manifest.family),
        _data(manifest.training),
        _training(manifest.training),
        _figures(manifest.report, held_out_items=manifest.training["held_out_items"]),
        _exactness(manifest),
        _limits(manifest),
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


def family_section(family: str) -> str:
    """What a user of any tokenizer of this family should know; empty where nothing is written of it."""
    words = " ".join(FAMILY_WORDS.get(family, "").split())
    return f"## Family\n\n{textwrap.fill(words, 120, break_on_hyphens=False)}" if words else ""


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
            f"{training['epochs_run']} epochs were run. Kept is the state with the smallest",
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


def _figures(report: Mapping[str, Any], *, held_out_items: int) -> str:
    collisions = report["collisions"]
    held_out = f"{report['held_out']['reconstruction']:.3f}" if held_out_items else NOT_MEASURED
    lines = [
        "## Figures",
        "",
        "Raw: before the collision suffix, which makes every Semantic ID unique.",
        "",
        "| on the training data | |",
        "| --- | --- |",
        f"| items | {report['items']:,} |",
        f"| reconstruction error, share of the variance | {report['reconstruction_error']:.3f} |",
        f"| the same, held out | {held_out} |",
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
    shares, below = notes["recomputed_share"], notes["canonical_below_float64"]
    moved = notes.get("bfloat16_moves_margins_by", {})
    largest = {**notes["largest_error"], "text_bfloat16": moved.get("largest")}
    measured = [path for path in _PATHS if path in shares and manifest.bounds.get(path) is not None]
    if manifest.text_encoder is None:
        measured = [path for path in measured if not path.startswith("text")]
    lines = [
        "## Exactness",
        "",
        "Rows nearer to a tie than a path's bound go on to a more exact one, at last alone in float64: codes depend on",
        "content only (docs/exactness.md). Errors are norms of latents; bfloat16's is by what it moved a margin.",
        "",
        "| path | largest error seen | bound | rows that go on |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {_PATHS[path]} | {largest[path]:.2g} | {manifest.bounds[path]:.2g} | {shares[path]:.3%} |"
        for path in measured
    ]
    if below:
        parts = ", ".join(below)
        lines += [
            "",
            f"{BELOW_FLOAT64.capitalize()} ({parts}): another processor may place an item near a tie elsewhere.",
        ]
    return "\n".join(lines)


def _limits(manifest: Manifest) -> str:
    equal = "- Codes are as good as the embeddings: items with equal ones share all codes."
    if manifest.text_encoder:
        equal = """\
- Codes are as good as the text: items with equal texts share all codes, and short or formulaic texts come close to it.
- The text encoder cuts long texts; what stands first counts."""
    return f"""## Limits

{equal}
- A catalogue of one domain uses few codewords of level 1 of a tokenizer trained on many domains; the deeper levels
  tell its items apart.
- IDs of different tokenizers cannot be compared, nor mixed in one recommender."""
