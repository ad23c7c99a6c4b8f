"""Embeddings through HTTP, beside the model alone and beside a FastAPI route that validates lists of numbers.

    python -P benchmarks/embeddings.py [--items 16384] [--catalogue FILE]

The service answers each with a Semantic ID that is on disk; in a dry run with its codes, what its id holds and how many
items have these codes: the two differ by what the writing of the record costs. The model alone (encoder network and
argmin, in batches of 1,024 in this process, with as many threads as the service's) has neither HTTP nor a registry; the
FastAPI route has neither model nor registry.

The default tokenizer's encoder network is one projection, and takes next to nothing; so the same is measured with an
RQ-VAE, whose network has five layers.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import ARROW, NDJSON, arrow_body, as_base64, as_floats, json_bodies, ndjson_body, new_prefix
from benchmarks.contents import Embeddings, Recombined, Texts
from benchmarks.harness import Comparison, Result, keep, limit_threads, parser_of, rate, rounds_of
from benchmarks.reference import RQVAE_CHECKPOINT, rqvae, tokenizer
from benchmarks.serving import Sender, fastapi_routes, service
from models import Tokenizer

AS_BASE64, AS_LISTS = "semid, HTTP JSON base64", "semid, HTTP JSON lists"
AS_LINES, AS_ARROW = "semid, HTTP NDJSON base64", "semid, HTTP Arrow"
DRY_BASE64, DRY_ARROW = f"{AS_BASE64}, dry run", f"{AS_ARROW}, dry run"
ALONE = "encoder and argmin alone, one process"
RQVAE = ", RQ-VAE"
FASTAPI = "FastAPI and pydantic, lists, no model"

BASE_TEXTS = 2048
AGAIN = 4  # the model alone does all that often: it is done too soon to be timed


def made_up(seed: int = 0) -> Embeddings:
    """Embeddings like those of products."""
    return Embeddings(tokenizer().embed(tokenizer().split(Texts(seed=seed).take(128))).numpy(), seed)


def of_catalogue(catalogue: Path) -> Recombined:
    """Embeddings as different from each other as those of the catalogue's texts: each of a pair of them."""
    texts = sorted(Texts(catalogue).take(BASE_TEXTS), key=len)
    pieces = tokenizer().split(texts)
    parts = [tokenizer().embed(pieces[start : start + 64]) for start in range(0, len(pieces), 64)]
    return Recombined(torch.cat(parts).numpy())


def run(arguments: Namespace) -> Result:
    """Measure."""
    embeddings = made_up() if arguments.catalogue is None else of_catalogue(arguments.catalogue)
    count, batch = arguments.items, arguments.batch
    result = Result("embeddings")
    clients = arguments.clients
    with (
        service(arguments.url, further_checkpoints=RQVAE_CHECKPOINT) as url,
        fastapi_routes() as plain,
        Sender(url, clients=clients) as as_json,
        Sender(url, clients=clients, media_type=NDJSON) as lines,
        Sender(url, clients=clients, media_type=ARROW) as arrow,
        Sender(f"{url}?assign=false", clients=clients) as dry,
        Sender(f"{url}?assign=false", clients=clients, media_type=ARROW) as dry_arrow,
        Sender(f"{url}?tokenizer={rqvae().full_name}", clients=clients, media_type=ARROW) as arrow_rqvae,
        Sender(
            f"{url}?assign=false&tokenizer={rqvae().full_name}", clients=clients, media_type=ARROW
        ) as dry_arrow_rqvae,
        Sender(f"{plain}/embeddings", clients=clients) as peer,
    ):
        few = count // 4  # lists are slow

        def lists() -> list[bytes]:
            return json_bodies(as_floats(new_prefix(), embeddings.take(few)), batch)

        def base64() -> list[bytes]:
            return json_bodies(as_base64(new_prefix(), embeddings.take(count)), batch)

        def columns() -> bytes:
            return arrow_body(new_prefix(), embeddings.take(count))

        def alone(model: Tokenizer) -> float:
            parts = torch.from_numpy(embeddings.take(count)).split(1024) * AGAIN
            return rate(count * AGAIN, lambda: [model.encode(part) for part in parts])

        paths: dict[str, Callable[[int], float]] = {
            AS_ARROW: lambda _: arrow.checked_rate(count, columns()),
            DRY_ARROW: lambda _: dry_arrow.checked_rate(count, columns()),
            AS_BASE64: lambda _: as_json.checked_rate(count, base64()),
            DRY_BASE64: lambda _: dry.checked_rate(count, base64()),
            AS_LINES: lambda _: lines.checked_rate(count, ndjson_body(as_base64(new_prefix(), embeddings.take(count)))),
            AS_LISTS: lambda _: as_json.checked_rate(few, lists()),
            ALONE: lambda _: alone(tokenizer()),
            FASTAPI: lambda _: peer.rate(few, lists()),
        }
        if arguments.url:
            result.skipped["RQ-VAE"] = "the service at hand may not have it"
        else:
            paths |= {
                AS_ARROW + RQVAE: lambda _: arrow_rqvae.checked_rate(count, columns()),
                DRY_ARROW + RQVAE: lambda _: dry_arrow_rqvae.checked_rate(count, columns()),
                ALONE + RQVAE: lambda _: alone(rqvae()),
            }
        for path in paths.values():
            path(-1)
        figures = rounds_of(paths, arguments.rounds, "items/s")
    of_rqvae = {name: found for name, found in figures.items() if name.endswith(RQVAE)}
    over_http = {name: found for name, found in figures.items() if name not in {ALONE, *of_rqvae}}
    in_process = {name: found for name, found in figures.items() if name not in {FASTAPI, *of_rqvae}}
    kinds = [
        ("New embeddings, over a plain route", FASTAPI, over_http),
        ("New embeddings, over the model alone", ALONE, in_process),
        ("New embeddings of an RQ-VAE, over the model alone", ALONE + RQVAE, of_rqvae),
    ]
    for title, against, found in kinds:
        if found:
            ours = [name for name in found if name.startswith("semid")]
            result.comparisons.append(Comparison(title, "items/s", ours, against, found))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, serves=True)
    parser.add_argument(
        "--catalogue", type=Path, help="embeddings like those of its texts, of made-up ones where absent"
    )
    parser.add_argument("--items", type=int, default=16384, help="embeddings a round (default %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="JSON requests in flight (default %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="items of one JSON request (default %(default)s)")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads or len(os.sched_getaffinity(0)))
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
