"""New texts through HTTP, and one text alone, beside other ways to embed the same texts.

    python -P benchmarks/texts.py [--catalogue items.parquet] [--texts 512] [--checked 256]

The service gives each text an embedding, its codes and a Semantic ID that is on disk when it answers; the peers give
embeddings alone. Every path takes the same texts in the same round. Of the texts answered some are computed again alone
in float64, and the codes compared (`--checked 20000` for as many).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import as_texts, entries_of, json_bodies, new_prefix
from benchmarks.contents import Texts
from benchmarks.harness import Check, Comparison, Result, keep, limit_threads, median_ms, parser_of, rate, rounds_of
from benchmarks.reference import canonical_codes
from benchmarks.serving import Sender, service
from benchmarks.text_peers import FLOAT32, Embed, text_peers

OURS = "semid, HTTP JSON"


def run(arguments: Namespace) -> Result:
    """Measure, then compare codes."""
    result = Result("texts")
    texts = Texts(arguments.catalogue)
    rounds = [texts.take(arguments.texts) for _ in range(arguments.rounds)]
    alone = texts.take(arguments.rounds * arguments.singles)
    codes: dict[str, list[int]] = {}
    with (
        text_peers(result.skipped, arguments.batch, with_infinity=arguments.infinity) as peers,
        service(arguments.url) as url,
        Sender(url) as sender,
    ):
        sender.send(json_bodies(as_texts(new_prefix(), Texts(seed=-1).take(64)), 64))
        paths = {OURS: partial(tokenize, sender, rounds, codes, arguments.batch)}
        paths |= {name: partial(embed_round, embed, rounds) for name, embed in peers.items()}
        figures = rounds_of(paths, arguments.rounds, "items/s")
        result.comparisons.append(Comparison("New texts", "items/s", [OURS], FLOAT32, figures))
        singly: dict[str, Callable[[int], float]] = {OURS: lambda number: one_alone(sender, alone, number, arguments)}
        singly |= {name: partial(one_by_one, embed, alone, arguments.singles) for name, embed in peers.items()}
        figures = rounds_of(singly, arguments.rounds, "ms")
        result.comparisons.append(Comparison("One text alone, median time", "ms", [OURS], FLOAT32, figures))
        checked = list(codes)[: arguments.checked]
        if extra := texts.take(max(0, arguments.checked - len(checked))):
            tokenize(sender, [extra], codes, arguments.batch, 0)
            checked = list(codes)[: arguments.checked]
    differ = sum(codes[text] != row for text, row in zip(checked, canonical_codes(checked), strict=True))
    result.checks.append(Check("Codes answered, and those of the text alone in float64", len(checked), differ))
    return result


def tokenize(
    sender: Sender, rounds: Sequence[Sequence[str]], codes: dict[str, list[int]], batch_items: int, number: int
) -> float:
    """Items a second of a round's texts, all new to the service; their codes are noted."""
    texts = rounds[number]
    bodies = json_bodies(as_texts(new_prefix(), texts), batch_items)
    answers: list[bytes] = []
    found = rate(len(texts), lambda: answers.extend(sender.send(bodies)))
    entries = [entry for answer in answers for entry in entries_of(answer)]
    codes.update((text, entry["codes"]) for text, entry in zip(texts, entries, strict=True))
    return found


def embed_round(embed: Embed, rounds: Sequence[Sequence[str]], number: int) -> float:
    """Items a second of a peer."""
    return rate(len(rounds[number]), lambda: embed(rounds[number]))


def one_alone(sender: Sender, texts: Sequence[str], number: int, arguments: Namespace) -> float:
    """Median milliseconds of a request of one new text."""
    first = number * arguments.singles
    bodies = [json_bodies(as_texts(new_prefix(), [text]), 1) for text in texts[first : first + arguments.singles]]
    return median_ms(lambda i: sender.send(bodies[i]), arguments.singles)


def one_by_one(embed: Embed, texts: Sequence[str], singles: int, number: int) -> float:
    """Median milliseconds of a peer's call with one text."""
    return median_ms(lambda i: embed([texts[number * singles + i]]), singles)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, serves=True)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--texts", type=int, default=512, help="texts a round (default %(default)s)")
    parser.add_argument("--singles", type=int, default=20, help="texts sent alone a round (default %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="texts of one request (default %(default)s)")
    parser.add_argument("--checked", type=int, default=256, help="texts computed again (default %(default)s)")
    parser.add_argument("--no-infinity", dest="infinity", action="store_false", help="do not start infinity")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
