"""Raw collisions on domains a tokenizer was not trained on: the default checkpoint's recipe, whole domains left out.

    python -P benchmarks/unseen_domains.py ../shared/data --embedding-cache CACHE

Two folds; each leaves out four domains at once (all their sources), trains on the rest with the default checkpoint's
hyper-parameters and measures on up to 12,101 items of each domain left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from models import DEFAULT_CHECKPOINT, TextTemplate, read_manifest
from models.catalogue import read_items
from models.embedding_cache import embed_texts
from models.evaluate import collisions, evaluate, purity, usage
from models.fit import FitConfig, fit
from models.kmeans import KMeansConfig
from models.projection import ProjectionConfig
from models.rqvae import LossConfig
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.train import balanced_weights

ITEMS = 12_101
BEAUTY, INDUSTRIAL = "amazon_beauty_2014", "amazon_industrial_2018"

# Domain -> what is measured on, and what is left out besides.
DOMAINS: dict[str, tuple[list[str], list[str]]] = {
    "beauty": ([BEAUTY], ["perfumes"]),
    "industrial": ([INDUSTRIAL], ["components_kicad"]),
    "fashion": (["fashion_styles", "fashion_in", "adidas_us", "wdc_shoes", "wdc_watches"], []),
    "books": (["goodbooks", "goodreads", "gutenberg"], []),
    "films and TV": (["films_wikipedia", "films_imdb", "tv_episodes", "anime"], []),
    "electronics": (["pricerunner", "abt_buy", "wdc_cameras", "wdc_computers", "phones", "laptops"], []),
    "food": (
        ["recipes", "wines", "beers_openbeerdb", "beers_ratebeer", "ramen", "openfoodfacts_part", "bigbasket"],
        [],
    ),
    "games": (["steam", "vgsales", "board_games", "android_games"], []),
}
FOLDS = (("beauty", "fashion", "books", "games"), ("industrial", "films and TV", "electronics", "food"))


def main() -> None:
    """Print a table, a row a domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--embedding-cache", type=Path)
    parser.add_argument("--fold", type=int, choices=range(len(FOLDS)))
    options = parser.parse_args()
    training = read_manifest(DEFAULT_CHECKPOINT).training
    config = fit_config(training["config"]["fit"])
    texts, sources, categories = read(options.data)
    embeddings = embed_texts(TextEncoder(TextEncoderConfig()), texts, options.embedding_cache)
    print("| domain left out | items | raw collisions | equal embeddings | largest group | perplexity by level |")
    print("| --- | --- | --- | --- | --- | --- |")
    for number in range(len(FOLDS)) if options.fold is None else [options.fold]:
        run_fold(FOLDS[number], embeddings, sources, categories, config=config, balance=training["config"]["balance"])


def run_fold(
    fold: tuple[str, ...],
    embeddings: torch.Tensor,
    sources: list[str],
    categories: list[str],
    *,
    config: FitConfig,
    balance: float,
) -> None:
    """Train without the fold's domains and print a row for each."""
    left_out = {source for domain in fold for part in DOMAINS[domain] for source in part}
    kept = [row for row, source in enumerate(sources) if source not in left_out]
    weights = balanced_weights([sources[row] for row in kept], balance)
    trained = embeddings[kept]
    model = fit(trained, config, weights).model
    for domain in fold:
        rows = torch.tensor([row for row, source in enumerate(sources) if source in DOMAINS[domain][0]])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:ITEMS]]
        with torch.no_grad():
            codes = model.quantizer.quantize(model.network(embeddings[rows])).codes
        found = collisions(codes, embeddings[rows])
        perplexities = "/".join(f"{level.perplexity:.0f}" for level in usage(codes, config.codebook_sizes))
        print(
            f"| {domain} | {len(rows):,} | {found.rate:.2%} | {found.duplicates:.2%} | {found.largest_group} "
            f"| {perplexities} |",
            flush=True,
        )
        if domain == "beauty":
            print_purity(codes, [categories[row] for row in rows.tolist()])
    report = evaluate(trained, model.network, model.quantizer, model.decoder, weights)
    print(f"\ntrained without {', '.join(fold)}:\n{report}\n", flush=True)


def print_purity(codes: torch.Tensor, categories: list[str]) -> None:
    """Category purity of prefixes, beside the same with the categories shuffled."""
    order = torch.randperm(len(categories), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [categories[row] for row in order]
    for depth in (1, 2):
        print(f"purity at depth {depth}: {purity(codes, categories, depth):.1%} ({purity(codes, shuffled, depth):.1%})")


def read(data: Path) -> tuple[list[str], list[str], list[str]]:
    """Texts, sources and categories (two parts of the path) of the three catalogues."""
    texts, sources, categories = [], [], []
    template = TextTemplate()
    for catalogue in ("broad", BEAUTY, INDUSTRIAL):
        for batch in read_items(data / catalogue / "items.parquet", keep=["source"]):
            texts += [item.content(template) for item in batch]
            sources += [item.kept["source"] or catalogue for item in batch]
            categories += [" > ".join(str(item.fields.get("categories", "")).split(" > ")[:2]) for item in batch]
    return texts, sources, categories


def fit_config(stored: dict) -> FitConfig:  # type: ignore[type-arg]
    """The hyper-parameters a manifest holds."""
    nested = {
        "loss": LossConfig(**stored["loss"]),
        "projection": ProjectionConfig(**stored["projection"]),
        "kmeans": KMeansConfig(**stored["kmeans"]),
    }
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items() if name not in nested}
    return FitConfig(**plain, **nested)


if __name__ == "__main__":
    main()
