"""Items that the service knows, sent again through HTTP, beside an embedding of their texts.

    python -P benchmarks/known.py [--items 4096] [--times 4]

Known items with unchanged content are answered from the registry, without the model; a peer without a record computes
them again.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import ARROW, NDJSON, arrow_body, as_texts, json_bodies, ndjson_body, new_prefix
from benchmarks.contents import Texts
from benchmarks.harness import Comparison, Result, keep, limit_threads, parser_of, rate, rounds_of
from benchmarks.serving import Sender, service
from benchmarks.text_peers import FLOAT32, sentence_transformer

AS_JSON, AS_LINES, AS_ARROW = "semid, HTTP JSON", "semid, HTTP NDJSON", "semid, HTTP Arrow"


def run(arguments: Namespace) -> Result:
    """Make the items known, then measure."""
    peer = sentence_transformer()
    texts = Texts(arguments.catalogue).take(arguments.items)
    count, prefix = arguments.items * arguments.times, new_prefix()
    items = as_texts(prefix, texts)
    known = json_bodies(items, arguments.batch)
    bodies, lines = known * arguments.times, ndjson_body(items * arguments.times)
    arrow = arrow_body(prefix, texts, times=arguments.times)
    peer(texts[:32])
    with (
        service(arguments.url) as url,
        Sender(url) as as_json,
        Sender(url, media_type=NDJSON) as as_lines,
        Sender(url, media_type=ARROW) as as_arrow,
    ):
        as_json.send(known)
        again: dict[str, Callable[[int], float]] = {
            FLOAT32: lambda _: rate(arguments.embedded, lambda: peer(texts[: arguments.embedded])),
            AS_ARROW: lambda _: as_arrow.checked_rate(count, arrow),
            AS_JSON: lambda _: as_json.checked_rate(count, bodies),
            AS_LINES: lambda _: as_lines.checked_rate(count, lines),
        }
        figures = rounds_of(again, arguments.rounds, "items/s")
    ours = [name for name in again if name != FLOAT32]
    return Result("known", [Comparison("Known items", "items/s", ours, FLOAT32, figures)])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, serves=True)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--items", type=int, default=4096, help="known items (default %(default)s)")
    parser.add_argument("--times", type=int, default=4, help="times that each is sent a round (default %(default)s)")
    parser.add_argument("--embedded", type=int, default=256, help="texts a round of the peer (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="items of one JSON request (default %(default)s)")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
