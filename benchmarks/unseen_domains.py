"""Collisions and neighbours on domains a tokenizer was not trained on: a checkpoint's recipe, whole domains left out.

    python -P benchmarks/unseen_domains.py ../shared/data --embedding-cache CACHE

Two folds; each leaves out four domains at once, trains on the rest with the checkpoint's hyper-parameters (the default
one's, or `--checkpoint`'s) and measures on up to 12,101 items of each domain left out. Left out are a domain's own
sources, every source that mixes domains (marketplaces, supermarkets, vocabularies of goods), and of what remains every
item whose category or title has one of the domain's words; how many those are is printed. Neighbours: of an item's ten
nearest embeddings in its domain, how many are among the hundred items that share the longest prefix with it.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from models import DEFAULT_CHECKPOINT, TextTemplate, read_manifest
from models.catalogue import read_items
from models.embedding_cache import embed_texts
from models.evaluation.measures import collisions, evaluate, purity, usage
from models.evaluation.neighbours import nearest, neighbours_kept
from models.evaluation.prefixes import PrefixGroups
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.training.data import balanced_weights
from models.training.train import TrainConfig, config_of, fit_family

ITEMS = 12_101
QUERIES = 1000
C = TypeVar("C")

BEAUTY, INDUSTRIAL = "amazon_beauty_2014", "amazon_industrial_2018"

# Departments of all kinds stand side by side here; no fold is trained on them.
MIXED = (
    "bigbasket amazon_in amazon_in_home_baby bestbuy_categories google_taxonomy extractgpt hs_goods cpv_goods"
).split()

# Domain -> what is measured on, what is left out besides, and the words that tell its items in other sources.
DOMAINS: dict[str, tuple[list[str], list[str], str]] = {
    "beauty": (
        [BEAUTY],
        ["perfumes"],
        (
            "beauty cosmetics? make-?up lipsticks? lip mascara eyeliner foundation shampoos? conditioner perfumes? "
            "fragrances? cologne skin-?care hair-?care hygiene nail deodorants? sunscreen moisturi[sz]er lotion soaps? "
            "shav(?:er|ers|ing) grooming toothbrush toothpaste"
        ),
    ),
    "industrial": (
        [INDUSTRIAL],
        ["components_kicad"],
        (
            "industrial scientific screws? bolts? nuts? washers? drills? drill-bit hydraulic pneumatic bearings? "
            "valves? fasteners? abrasives? welding adhesives? solder connectors? resistors? capacitors? transistors? "
            "sensors? laborator(?:y|ies) hardware tools?"
        ),
    ),
    "fashion": (
        ["fashion_styles", "fashion_in", "adidas_us", "wdc_shoes", "wdc_watches"],
        [],
        (
            "fashion clothing clothes apparel wear footwear shoes? sneakers? boots? sandals? shirts? t-shirts? dress "
            "dresses jeans trousers skirts? jackets? socks? lingerie swimwear jewell?ery handbags? wallets? watch "
            "watches sunglasses eyewear"
        ),
    ),
    "books": (
        ["goodbooks", "goodreads", "gutenberg"],
        [],
        "books? e-?books? audiobooks? novels? kindle literature paperback hardcover comics?",
    ),
    "films and TV": (
        ["films_wikipedia", "films_imdb", "tv_episodes", "anime"],
        [],
        "films? movies? dvds? blu-?ray cinema television tv episodes? series anime",
    ),
    "electronics": (
        ["pricerunner", "abt_buy", "wdc_cameras", "wdc_computers", "phones", "laptops"],
        ["software_amazon_google"],
        (
            "electronics? electrical phones? smartphones? mobile laptops? computers? pc tablets? cameras? lens "
            "headphones? earphones? speakers? chargers? usb hdmi monitors? printers? televisions? tv keyboards? "
            "processors? appliances? fridges? refrigerators? freezers? dishwashers? microwaves? smartwatch"
        ),
    ),
    "food": (
        ["recipes", "wines", "beers_openbeerdb", "beers_ratebeer", "ramen", "openfoodfacts_part"],
        ["restaurants", "petfood_au"],
        (
            "foods? grocery groceries gourmet snacks? beverages? drinks? tea coffee chocolate cooking recipes? wines? "
            "beers? noodles? sauces? spices? cereals? biscuits? cakes? bakery dairy restaurants?"
        ),
    ),
    "games": (
        ["steam", "vgsales", "board_games", "android_games"],
        [],
        "games? gaming playstation xbox nintendo wii puzzles? arcade toys?",
    ),
}
FOLDS = (("beauty", "fashion", "books", "games"), ("industrial", "films and TV", "electronics", "food"))


def main() -> None:
    """Print a table, a row a domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="whose recipe is followed")
    parser.add_argument("--embedding-cache", type=Path)
    parser.add_argument("--fold", type=int, choices=range(len(FOLDS)))
    options = parser.parse_args()
    recipe = recipe_of(read_manifest(options.checkpoint).training["config"])
    texts, sources, categories, labels = read(options.data)
    embeddings = embed_texts(TextEncoder(TextEncoderConfig()), texts, options.embedding_cache)
    for number in range(len(FOLDS)) if options.fold is None else [options.fold]:
        kept = trained_on(FOLDS[number], sources, labels)
        weights = balanced_weights([sources[row] for row in kept], recipe.balance)
        model = fit_family(embeddings[kept], recipe, weights).model
        report = evaluate(embeddings[kept], model.network, model.quantizer, model.decoder, weights)
        print_domains(FOLDS[number], embeddings, sources, categories, model)
        print(f"\ntrained without {', '.join(FOLDS[number])}:\n{report}\n", flush=True)


def trained_on(fold: tuple[str, ...], sources: list[str], labels: list[str]) -> list[int]:
    """Rows that have nothing of the fold's domains; prints how many others there are by source."""
    own = {source for domain in fold for part in DOMAINS[domain][:2] for source in part}
    words = "|".join(word for domain in fold for word in DOMAINS[domain][2].split())
    told = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    kept, left_out = [], Counter[str]()
    for row, (source, label) in enumerate(zip(sources, labels, strict=True)):
        if source in own or source in MIXED or told.search(label):
            left_out[source] += 1
        else:
            kept.append(row)
    counts = Counter(sources)
    by_word = [f"{source} {n:,} of {counts[source]:,}" for source, n in left_out.most_common() if n < counts[source]]
    print(f"\nleft out as {', '.join(fold)}: {sum(left_out.values()):,} items; by their words {'; '.join(by_word)}\n")
    return kept


def print_domains(
    fold: tuple[str, ...], embeddings: torch.Tensor, sources: list[str], categories: list[str], model: Any
) -> None:
    """A row for each of the fold's domains, and beauty's purity."""
    told = ""
    columns = "domain left out,items,raw collisions,equal embeddings,largest group,perplexity by level,neighbours"
    print(f"| {columns.replace(',', ' | ')} |\n{'| --- ' * 7}|")
    for domain in fold:
        rows = torch.tensor([row for row, source in enumerate(sources) if source in DOMAINS[domain][0]])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:ITEMS]]
        with torch.no_grad():
            codes = model.quantizer.quantize(model.network(embeddings[rows])).codes
        found = collisions(codes, embeddings[rows])
        perplexities = "/".join(f"{level.perplexity:.0f}" for level in usage(codes, model.quantizer.codebook_sizes))
        queries = torch.arange(min(QUERIES, len(rows)))  # the rows are in an order by lot
        neighbours = neighbours_kept(PrefixGroups(codes), queries, nearest(embeddings[rows], queries))
        print(
            f"| {domain} | {len(rows):,} | {found.rate:.2%} | {found.duplicates:.2%} | {found.largest_group} "
            f"| {perplexities} | {neighbours.of_nearest_by_prefix:.1%} |",
            flush=True,
        )
        if domain == "beauty":
            told = f"\nbeauty: {purity_words(codes, [categories[row] for row in rows.tolist()])}"
    print(told)


def purity_words(codes: torch.Tensor, categories: list[str]) -> str:
    """Category purity of prefixes, beside the same with the categories shuffled."""
    order = torch.randperm(len(categories), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [categories[row] for row in order]
    return ", ".join(
        f"purity at depth {depth} {purity(codes, categories, depth):.1%} ({purity(codes, shuffled, depth):.1%})"
        for depth in (1, 2)
    )


def read(data: Path) -> tuple[list[str], list[str], list[str], list[str]]:
    """Texts, sources, categories (two parts of the path) and labels (category and title) of the three catalogues."""
    texts, sources, categories, labels = [], [], [], []
    template = TextTemplate()
    for catalogue in ("broad", BEAUTY, INDUSTRIAL):
        for batch in read_items(data / catalogue / "items.parquet", keep=["source"]):
            texts += [item.content(template) for item in batch]
            sources += [item.kept["source"] or catalogue for item in batch]
            categories += [" > ".join(str(item.fields.get("categories", "")).split(" > ")[:2]) for item in batch]
            labels += [f"{item.fields.get('categories', '')} {item.fields.get('title', '')}" for item in batch]
    return texts, sources, categories, labels


def recipe_of(stored: dict[str, Any]) -> TrainConfig:
    """The hyper-parameters that a manifest holds."""
    fit = rebuilt(config_of(stored["family"]), stored["fit"])
    return TrainConfig(family=stored["family"], fit=fit, balance=stored["balance"])


def rebuilt(default: C, stored: dict[str, Any]) -> C:
    """A frozen config with the values stored of it; nested ones too."""
    values: dict[str, Any] = {}
    for name, value in stored.items():
        present = getattr(default, name)
        if is_dataclass(present):
            values[name] = rebuilt(present, value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return replace(default, **values)  # type: ignore[type-var]


if __name__ == "__main__":
    main()
