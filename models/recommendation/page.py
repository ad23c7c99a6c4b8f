"""The report of `semid recommend` as a page: recommend.html."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.evaluation import page, plots
from models.evaluation.page import NO_FIGURE, Cell, Plot
from models.recommendation.ranking import CUTOFFS, Ranking
from models.recommendation.recommend import Recommendation

COLUMNS = [
    ("Recommender", ""),
    *((f"{measure}@{k}", "higher is better") for k in CUTOFFS for measure in ("Recall", "NDCG")),
]


def report_page(
    settings: Mapping[str, Any], baselines: Mapping[str, Ranking], recommendations: Sequence[Recommendation]
) -> str:
    """The page; see `models.recommendation.report.write`."""
    sections = [
        page.paragraph(
            "TIGER, trained on each tokenizer's Semantic IDs with the same settings and as many steps, recommends the "
            "last item of each user after all before it. All figures are in recommend.json beside this page."
        ),
        *_test(baselines, recommendations),
        *_cold(recommendations),
        *_training(recommendations),
        page.heading("What was run"),
        page.paragraph(str(settings.get("command", "")), faint=True),
    ]
    return page.page("What tokenizers are good for", sections)


def _test(baselines: Mapping[str, Ranking], recommendations: Sequence[Recommendation]) -> list[str]:
    columns = [*COLUMNS, ("Invalid", "without the constraint, lower is better"), ("Invalid", "over the live trie")]
    figures = [_figures(each.test) for each in recommendations]
    best = [max(column) for column in zip(*figures, strict=True)] if len(figures) > 1 else []
    rows = [
        (Cell(name, note="baseline"), [*(Cell(f"{value:.4f}") for value in _figures(measured)), *_none(2)])
        for name, measured in baselines.items()
    ]
    for each, values in zip(recommendations, figures, strict=True):
        cells = [Cell(f"{value:.4f}", best=bool(best) and value == best[place]) for place, value in enumerate(values)]
        rows.append((Cell(each.name), [*cells, Cell(f"{each.invalid_without:.2%}"), Cell(f"{each.invalid:.2%}")]))
    words = ""
    if recommendations:
        first = recommendations[0].test
        words = (
            f"{first.users:,} users. The draw of users alone leaves Recall@10 uncertain by about {first.error:.4f} "
            "(one standard error); another seed moves it besides. Invalid: the share of the first ten IDs that no live "
            "item has."
        )
        words += " The star marks the best tokenizer." if best else ""
    return [page.heading("The next item"), page.paragraph(words), page.table("Test", columns, rows)]


def _cold(recommendations: Sequence[Recommendation]) -> list[str]:
    measured = [each for each in recommendations if each.cold is not None]
    if not measured:
        return []
    columns = [
        ("Recall@10", "of users who want a cold item"),
        ("TIGER", ""),
        ("TIGER", "places reserved"),
        ("Content-kNN", ""),
        ("Content-kNN", "places reserved"),
        ("TIGER", "of all other users"),
    ]
    rows = []
    for each in measured:
        assert each.cold is not None
        kinds = [each.cold.plain, each.cold.reserved, each.cold.by_content, each.cold.by_content_reserved, each.warm]
        cells = [Cell(NO_FIGURE if kind is None else f"{kind.recall[10]:.4f}") for kind in kinds]
        rows.append((Cell(each.name), cells))
    first = measured[0].cold
    assert first is not None
    words = (
        f"{first.items:,} items were taken out of all training sequences; {first.plain.users:,} users want one of "
        "them. Places reserved: the last of the ten are given to the likeliest cold items. Content-kNN: the items "
        "whose embeddings are nearest to the mean of the user's."
    )
    return [page.heading("Cold items"), page.paragraph(words), page.table("Cold items", columns, rows)]


def _training(recommendations: Sequence[Recommendation]) -> list[str]:
    columns = [
        ("Tokenizer", ""),
        ("Step kept", "best NDCG@10 on validation users"),
        ("NDCG@10", "on validation users"),
        ("Targets", "trained on"),
        ("Parameters", ""),
        ("Training", "seconds"),
        ("Test", "seconds"),
    ]
    rows = []
    for each in recommendations:
        trained = each.trained
        texts = [
            f"{trained.best.step:,}",
            f"{trained.best.ndcg:.4f}",
            f"{trained.targets:,}",
            f"{each.parameters:,}",
            f"{trained.seconds:.0f}",
            f"{each.test_seconds:.0f}",
        ]
        rows.append((Cell(each.name), [Cell(text) for text in texts]))
    drawn = [
        _curves(recommendations, "NDCG@10 of validation users", lambda measured: measured.ndcg),
        _curves(recommendations, "Loss in training, nats a token", lambda measured: measured.loss),
    ]
    names = plots.legend([each.name for each in recommendations]) if plots.available() else ""
    return [page.heading("Training"), names, page.plots(drawn), page.table("Training", columns, rows)]


def _curves(recommendations: Sequence[Recommendation], title: str, value: Callable[[Any], float]) -> Plot | None:
    """A line for each tokenizer over the steps."""
    if not plots.available():
        return None

    def paint(axes: Any) -> None:
        for number, each in enumerate(recommendations):
            history = each.trained.history
            axes.plot(
                [measured.step for measured in history],
                [value(measured) for measured in history],
                color=plots.colour(number),
                marker=plots.marker(number),
            )
        axes.set(xlabel="steps", title=title)

    name = title.split(maxsplit=1)[0].lower().replace("@", "-")
    return Plot(plots.draw(name, f"{title}, a line for each tokenizer.", paint), f"{title}, over the steps.")


def _figures(measured: Ranking) -> list[float]:
    return [value for k in CUTOFFS for value in (measured.recall[k], measured.ndcg[k])]


def _none(cells: int) -> list[Cell]:
    return [Cell(NO_FIGURE)] * cells
