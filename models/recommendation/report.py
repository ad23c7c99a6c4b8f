"""What was measured of several tokenizers: recommend.json, recommend.html, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.recommendation.page import report_page
from models.recommendation.ranking import Ranking
from models.recommendation.recommend import Recommendation
from models.whole_files import write_whole

JSON = "recommend.json"
HTML = "recommend.html"
HEADINGS = ("", "Recall@5", "NDCG@5", "Recall@10", "NDCG@10", "invalid without constraint", "cold Recall@10")


def write(
    directory: Path,
    settings: Mapping[str, Any],
    baselines: Mapping[str, Ranking],
    recommendations: Sequence[Recommendation],
) -> None:
    """Write both files into a directory, each whole or not at all.

    Args:
        directory: Made where it does not exist.
        settings: What was run, as JSON.
        baselines: By name.
        recommendations: As far as there are any.
    """
    content = {
        "settings": settings,
        "baselines": {name: asdict(measured) for name, measured in baselines.items()},
        "tokenizers": [_described(each) for each in recommendations],
    }
    texts = {
        JSON: json.dumps(content, indent=2) + "\n",
        HTML: report_page(settings, baselines, recommendations),
    }
    for name, text in texts.items():
        write_whole(directory / name, text)


def table(baselines: Mapping[str, Ranking], recommendations: Sequence[Recommendation]) -> str:
    """The table as Markdown, a row for each baseline and tokenizer; a measure that was not taken is left blank."""
    rows = [[name, *_figures(measured), "", ""] for name, measured in baselines.items()]
    for each in recommendations:
        cold = "" if each.cold is None else _share(each.cold.reserved.recall[10])
        rows.append([each.name, *_figures(each.test), f"{each.invalid_without:.2%}", cold])
    widths = [max(len(row[column]) for row in [HEADINGS, *rows]) for column in range(len(HEADINGS))]
    rule = ["-" * width for width in widths]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [HEADINGS, rule, *rows]
    ]
    return "\n".join(lines)


def _figures(measured: Ranking) -> list[str]:
    return [_share(value) for k in (5, 10) for value in (measured.recall[k], measured.ndcg[k])]


def _share(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _described(recommendation: Recommendation) -> dict[str, Any]:
    content = asdict(recommendation)
    trained = recommendation.trained
    content["trained"] = {
        "best": trained.best._asdict(),
        "history": [measurement._asdict() for measurement in trained.history],
        "seconds": trained.seconds,
        "targets": trained.targets,
    }
    return content
