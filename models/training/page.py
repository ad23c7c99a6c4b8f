"""The page of a training, drawn from `training.json` alone: losses, held-out measures, use of the codewords."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from models.evaluation import page, plots
from models.evaluation.page import NO_FIGURE, Cell, Plot
from models.training.history import (
    INITIALISED,
    REFITTED,
    TRAINING,
    WARM_UP,
    EpochRecord,
    TrainingHistory,
)

HTML = "training.html"
SVG = "training.svg"

# Where a level uses so much more of its codebook than its perplexity is of it, the page says what that means.
UNEVEN = 0.3

# Epochs of the table: the first and the last, the one that was kept, and others evenly between them.
TABLE_ROWS = 40


def training_pages(history: TrainingHistory, name: str) -> dict[str, str]:
    """The texts of `training.html` and, where plots can be drawn, `training.svg`, by file name.

    Args:
        history: Of the training.
        name: What the page calls the tokenizer.
    """
    pages = {HTML: training_page(history, name)}
    if plots.available():
        pages[SVG] = plots.draw_alone(name, [curve.paint for curve in _curves(history)])
    return pages


def training_page(history: TrainingHistory, name: str) -> str:
    """The page."""
    curves = _curves(history)
    drawn = [Plot(plots.draw(c.name, c.caption, c.paint), c.caption) for c in curves] if plots.available() else []
    levels = [f"level {number}" for number in range(1, len(history.codebook_sizes) + 1)]
    losses = _loss_names(history.records)
    sections = [
        *_words(history),
        "" if drawn else page.paragraph(plots.WITHOUT_PLOTS),
        page.paragraph("Levels:") + plots.legend(levels) if drawn else "",
        page.paragraph("Losses:") + plots.legend(losses) if drawn and losses else "",
        page.plots(drawn),
        _levels_table(history),
        _epochs_table(history),
    ]
    return page.page(f"Training of {name}", [section for section in sections if section])


class _Curve(NamedTuple):
    """A plot of the page."""

    name: str
    caption: str
    paint: Callable[[Any], None]


def _curves(history: TrainingHistory) -> list[_Curve]:
    """What there is to draw: a family without epochs has the use of its codewords alone."""
    curves = []
    if _loss_names(history.records):
        curves.append(_losses(history))
    if sum(record.held_out is not None for record in history.records) > 1:
        curves += [_held_out(history, "reconstruction"), _held_out(history, "colliding"), _perplexity(history)]
        if any(level.restarted for record in history.records for level in record.levels):
            curves.append(_restarted(history))
    if history.codeword_use:
        curves.append(_use(history))
    return curves


def _losses(history: TrainingHistory) -> _Curve:
    def paint(axes: Any) -> None:
        for number, name in enumerate(_loss_names(history.records)):
            points = [(_place(history, r), r.losses[name]) for r in history.records if r.losses.get(name, 0) > 0]
            axes.plot(*_columns(points), color=plots.colour(number), linewidth=2.4 if name == "total" else 1.4)
        axes.set(yscale="log", title="Losses, before they are weighted")
        _epochs(axes, history)

    return _Curve(
        "losses",
        "Mean of each loss over an epoch's rows; total is their weighted sum, which training makes small.",
        paint,
    )


def _held_out(history: TrainingHistory, measure: str) -> _Curve:
    titles = {
        "reconstruction": (
            "Reconstruction error, held out",
            f"Share of the variance that the codes lose, of {_measured_on(history)}.",
        ),
        "colliding": ("Held-out items that collide, %", "Share that has all codes in common with another item."),
    }
    title, caption = titles[measure]
    factor = 100 if measure == "colliding" else 1

    def paint(axes: Any) -> None:
        points = [
            (_place(history, record), factor * getattr(record.held_out, measure), record.stage)
            for record in history.records
            if record.held_out
        ]
        line = [point[:2] for point in points if point[2] != REFITTED]
        refitted = [point[:2] for point in points if point[2] == REFITTED]
        axes.plot(*_columns(line), color=plots.INK)
        axes.plot(*_columns(refitted), color=plots.INK, linestyle="none", marker="o", markerfacecolor="none")
        axes.set(title=title)
        _epochs(axes, history)

    return _Curve(
        measure, caption + " The dashed line is the state that was kept; a ring, codebooks clustered anew.", paint
    )


def _perplexity(history: TrainingHistory) -> _Curve:
    def paint(axes: Any) -> None:
        measured = [record for record in history.records if record.levels]
        for number, size in enumerate(history.codebook_sizes):
            points = [(_place(history, r), 100 * r.levels[number].perplexity / size) for r in measured]
            axes.plot(*_columns(points), color=plots.colour(number))
        axes.set(ylim=(0, 102), title="Perplexity, % of the codebook")
        _epochs(axes, history)

    return _Curve("perplexity", "How evenly each level's codewords are used; 100% is all alike.", paint)


def _restarted(history: TrainingHistory) -> _Curve:
    def paint(axes: Any) -> None:
        measured = [record for record in history.records if record.stage == TRAINING]
        for number in range(len(history.codebook_sizes)):
            points = [(record.epoch, record.levels[number].restarted) for record in measured]
            axes.plot(*_columns(points), color=plots.colour(number))
        axes.set(title="Dead codewords restarted")
        axes.set_ylim(bottom=0)
        _epochs(axes, history)

    return _Curve("restarted", "Codewords that no row chose and that were moved to where rows are.", paint)


def _use(history: TrainingHistory) -> _Curve:
    def paint(axes: Any) -> None:
        for number, use in enumerate(history.codeword_use):
            places = [100 * rank / max(1, len(use) - 1) for rank in range(len(use))]
            axes.plot(places, [max(value, 1e-3) for value in use], color=plots.colour(number))
        axes.axhline(1, color=plots.INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set(yscale="log", title="Use of the codewords, as frozen")
        axes.set(xlabel="codewords, most to least chosen, %", ylabel="chosen, times an even share")

    caption = (
        f"How often {_all_items(history)} choose each codeword; the dotted line: all alike. Level lines that drop "
        "early leave codewords idle."
    )
    return _Curve("use", caption, paint)


def _words(history: TrainingHistory) -> list[str]:
    kept, records = history.records[history.kept], history.records
    shape = " x ".join(map(str, history.codebook_sizes))
    seconds = sum(record.seconds for record in records)
    epochs = sum(record.stage == TRAINING for record in records)
    lines = [
        f"Family {history.family}, codebooks {shape}. {seconds:,.0f} seconds"
        + (f", {epochs} epochs of joint training." if epochs else " of k-means.")
    ]
    if history.items is not None and history.held_out_items is not None:
        lines[0] += (
            f" {history.items:,} items: {history.items - history.held_out_items:,} trained on, "
            f"{history.held_out_items:,} held out."
        )
    if kept.held_out and (measured := _measured_on(history)):
        figures = (
            f"a reconstruction error of {kept.held_out.reconstruction:.3f} of the variance; "
            f"{kept.held_out.colliding:.2%} of them share all codes with another item"
        )
        lines.append(
            f"Kept: {_called(kept)}, with the smallest {history.stopped_on}. On {measured}: {figures}."
            if len(history.records) > 1
            else "Fitted by k-means alone, which makes the squared distances to the codewords small; there are no "
            f"epochs and nothing was chosen. On {measured}: {figures}."
        )
    return [page.paragraph(line) for line in lines]


def _measured_on(history: TrainingHistory) -> str:
    """The rows of `EpochRecord.held_out`, in words."""
    return "items that were trained on, as none were held out" if history.held_out_items == 0 else "the held-out items"


def _all_items(history: TrainingHistory) -> str:
    held_out = ", held-out ones counted in," if history.held_out_items != 0 else ""
    return ("all items" if history.items is None else f"all {history.items:,} items") + held_out


def _uneven(history: TrainingHistory) -> str:
    """What it means that a level uses most of its codewords and has a low perplexity; empty where none does."""
    levels = zip(history.codebook_sizes, history.records[history.kept].levels, strict=False)
    uneven = [
        (number, size, level)
        for number, (size, level) in enumerate(levels, 1)
        if level.used - level.perplexity / size > UNEVEN
    ]
    if not uneven:
        return ""
    number, size, level = max(uneven, key=lambda entry: entry[2].used - entry[2].perplexity / entry[1])
    return (
        "Used counts a codeword that a single item chose as much as one that a thousand chose. Perplexity is how many "
        f"codewords, chosen alike, would be as even: level {number} uses {level.used:.0%} of its {size:,} codewords, "
        f"but most items choose among few of them, as evenly as {level.perplexity:,.0f} would be."
    )


def _levels_table(history: TrainingHistory) -> str:
    kept = history.records[history.kept]
    if not kept.levels:
        return ""
    columns = [
        ("Level", ""),
        ("Codewords", ""),
        ("Used", "chosen at least once"),
        ("Perplexity", "how evenly"),
        ("Left over", "of the latents' variance"),
    ]
    rows = [
        (
            Cell(str(number)),
            [
                Cell(f"{size:,}"),
                Cell(f"{level.used:.1%}"),
                Cell(f"{level.perplexity:.1f}", note=f"{level.perplexity / size:.0%} of {size:,}"),
                Cell(f"{level.left_over:.3f}"),
            ],
        )
        for number, (size, level) in enumerate(zip(history.codebook_sizes, kept.levels, strict=True), 1)
    ]
    trained = "" if history.items is None else f"{history.items - (history.held_out_items or 0):,} "
    caption = f"Each level as it was kept, over the {trained}items that were trained on"
    if history.held_out_items:
        caption += "; the model card counts held-out ones in, so its figures differ a little"
    return page.table(caption, columns, rows) + (page.paragraph(words) if (words := _uneven(history)) else "")


def _epochs_table(history: TrainingHistory) -> str:
    records = history.records
    if len(records) < 2:
        return ""
    chosen = {round(number * (len(records) - 1) / (TABLE_ROWS - 1)) for number in range(TABLE_ROWS)} | {history.kept}
    names = _loss_names(records)
    columns = [("Epoch", ""), *((name, "loss") for name in names)]
    columns += [("Reconstruction", "held out"), ("Colliding", "held out"), ("Perplexity", "by level"), ("Seconds", "")]
    rows = []
    for place in sorted(chosen):
        record = records[place]
        losses = [Cell(f"{record.losses[name]:.4g}" if name in record.losses else NO_FIGURE) for name in names]
        held_out = record.held_out
        cells = [
            *losses,
            Cell(f"{held_out.reconstruction:.4f}" if held_out else NO_FIGURE),
            Cell(f"{held_out.colliding:.2%}" if held_out else NO_FIGURE),
            Cell(" / ".join(f"{level.perplexity:.0f}" for level in record.levels) or NO_FIGURE),
            Cell(f"{record.seconds:.1f}"),
        ]
        rows.append((Cell(_called(record), note="kept" if place == history.kept else ""), cells))
    caption = (
        "Epochs" if len(chosen) == len(records) else f"{len(chosen)} of {len(records)} epochs; all are in training.json"
    )
    return page.table(caption, columns, rows)


def _called(record: EpochRecord) -> str:
    names = {
        WARM_UP: f"warm-up {record.epoch}",
        INITIALISED: "k-means",
        TRAINING: f"epoch {record.epoch}",
        REFITTED: f"epoch {record.epoch}, codebooks clustered anew",
    }
    return names[record.stage]


def _loss_names(records: Sequence[EpochRecord]) -> list[str]:
    """Losses by name, those of single levels left out, the total first."""
    names = dict.fromkeys(name for record in records for name in record.losses)
    return sorted((name for name in names if not name[-1].isdigit()), key=lambda name: name != "total")


def _place(history: TrainingHistory, record: EpochRecord) -> int:
    """On the axis of epochs: the warm-up lies before 0, which is the k-means solution."""
    if record.stage == WARM_UP:
        return record.epoch - sum(other.stage == WARM_UP for other in history.records)
    if record.stage == REFITTED:
        return 1 + max(other.epoch for other in history.records if other.stage in {INITIALISED, TRAINING})
    return record.epoch


def _epochs(axes: Any, history: TrainingHistory) -> None:
    axes.axvline(_place(history, history.records[history.kept]), color=plots.INK, linewidth=0.8, linestyle=(0, (4, 3)))
    names = ["warm-up before 0"] if history.records[0].stage == WARM_UP else []
    names += ["0: k-means"] if any(record.stage == INITIALISED for record in history.records) else []
    axes.set_xlabel("epoch" + (f" ({', '.join(names)})" if names else ""))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _columns(points: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]
