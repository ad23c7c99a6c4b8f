"""Tokenizers side by side, from files to a report."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models import load
from models.evaluation import plots, report_plots
from models.evaluation.compare import CompareConfig, compare
from models.evaluation.measures import collisions
from models.evaluation.page import NO_FIGURE
from models.evaluation.paraphrases import Kept
from models.evaluation.report import report_page, write_report
from models.evaluation.subjects import Inputs
from models.evaluation.summary import COLUMNS, FEW, summary_cells
from models.training.cluster import ClusterConfig
from models.training.train import TrainConfig, train_checkpoint

SMALL = CompareConfig(queries=50, paraphrased=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A catalogue of 300 items in 12 clusters, users who stay in theirs, two checkpoints and an index file."""
    directory = tmp_path_factory.mktemp("compare")
    random = np.random.default_rng(0)
    cluster = random.integers(12, size=300)
    centres = random.standard_normal((12, 10))
    np.save(directory / "items.npy", (centres[cluster] + 0.1 * random.standard_normal((300, 10))).astype(np.float32))
    for name, config in (("coarse", (4, 4)), ("fine", (12, 8, 8))):
        fit = ClusterConfig(codebook_sizes=config, held_out=0.7)
        train_checkpoint(
            [directory / "items.npy"],
            directory / name,
            TrainConfig(name=name, family="rq-kmeans", fit=fit),
            say=lambda _: None,
        )
    items = [
        {"item_id": f"i{row}", "number": row, "title": f"thing {row}", "category": f"All > {c % 3} > {c}"}
        for row, c in enumerate(cluster)
    ]
    pq.write_table(pa.Table.from_pylist(items), directory / "items.parquet")
    users = [{"user_id": str(c), "item_ids": [f"i{row}" for row in np.flatnonzero(cluster == c)]} for c in range(12)]
    pq.write_table(pa.Table.from_pylist(users), directory / "interactions.parquet")
    index = {str(row): [f"<a_{cluster[row]}>", f"<b_{row % 5}>"] for row in range(0, 300, 2)}
    (directory / "peer.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def comparison(world):
    inputs = Inputs(
        world / "items.parquet",
        interactions=world / "interactions.parquet",
        embeddings=world / "items.npy",
        key_column="number",
    )
    return compare([world / "coarse", world / "fine", world / "peer.json"], inputs, SMALL, lambda _: None)


def test_each_tokenizers_collisions_are_those_of_its_codes(world, comparison):
    codes = load(world / "fine").encode(torch.from_numpy(np.load(world / "items.npy"))).codes
    fine = comparison.results[1]
    assert fine.collisions.rate == collisions(codes).rate
    assert fine.resolved.with_suffix == fine.collisions.rate
    assert fine.resolved.largest_suffix == fine.collisions.largest_group - 1
    assert fine.collisions_by_depth[-1] == pytest.approx(fine.collisions.rate)


def test_an_array_of_given_embeddings_and_a_catalogue_know_which_items_were_seen_by_the_array(world):
    found = compare([world / "fine"], Inputs(world / "items.npy"), SMALL, lambda _: None)
    result = found.results[0]
    assert result.unseen_items == 210
    assert result.on_unseen.items == 210
    assert result.cold_start.seen == 90
    assert found.unseen_in_common == 210


def test_of_items_in_another_file_it_says_that_nothing_is_known(comparison):
    fine = comparison.results[1]
    assert fine.unseen_items is None
    assert fine.on_unseen is None
    assert "not known" in fine.unseen_how


def test_the_callers_word_on_unseen_items_is_taken_for_all_tokenizers(world):
    inputs = Inputs(
        world / "items.parquet",
        embeddings=world / "items.npy",
        key_column="number",
        unseen=frozenset({"i0", "i1", "elsewhere"}),
    )
    lines = []
    found = compare([world / "fine", world / "peer.json"], inputs, SMALL, lines.append)
    assert [result.on_unseen.items for result in found.results] == [2, 1]
    assert "1 of 3 items said to be unseen are not in items.parquet, such as 'elsewhere'" in lines
    assert found.results[0].unseen_how == "said by the caller; 1 of these 3 item ids are not in the catalogue"


def test_users_who_stay_in_their_cluster_and_categories_of_clusters_show_in_the_figures(comparison):
    fine = comparison.results[1].on_all
    assert fine.consecutive.shared[0] > 0.9
    assert fine.consecutive.shuffled[0] < 0.2
    assert fine.purity["leaf"].by_depth[0] > 0.9
    assert set(fine.purity) == {"level 2", "level 3", "leaf"}
    assert fine.neighbours.of_nearest_by_prefix > 0.9


def test_an_index_file_has_the_figures_that_codes_give_and_no_others(comparison):
    peer = comparison.results[2]
    assert (peer.kind, peer.items, peer.codebook_sizes) == ("index", 150, (16, 16))
    assert peer.on_all.purity["leaf"].by_depth[0] == 1.0
    assert peer.on_all.consecutive.shared[0] == 1.0
    assert peer.on_all.reconstruction_error is None
    assert peer.on_all.neighbours is None
    assert peer.cold_start is None


def test_what_does_not_fit_is_refused_in_words(world):
    quiet = {"config": SMALL, "say": lambda _: None}
    with pytest.raises(ValueError, match="takes embeddings only"):
        compare([world / "fine"], Inputs(world / "items.parquet"), **quiet)
    with pytest.raises(ValueError, match="names no item"):
        compare([world / "peer.json"], Inputs(world / "items.parquet"), **quiet)
    with pytest.raises(ValueError, match=r"none of the 1 items said to be unseen is in items\.npy, such as 'x'"):
        compare([world / "fine"], Inputs(world / "items.npy", unseen=frozenset({"x"})), **quiet)
    np.save(world / "short.npy", np.zeros((3, 10), np.float32))
    with pytest.raises(ValueError, match="3 embeddings for 300 items"):
        compare([world / "fine"], Inputs(world / "items.parquet", embeddings=world / "short.npy"), **quiet)


def test_what_an_index_file_cannot_mean_is_refused_in_words(world, tmp_path):
    quiet = {"config": SMALL, "say": lambda _: None}
    items = pq.read_table(world / "items.parquet").to_pylist()
    twice = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_pylist([{**item, "number": item["number"] // 2} for item in items]), twice)
    with pytest.raises(ValueError, match="several of the catalogue's"):
        compare([world / "peer.json"], Inputs(twice, key_column="number"), **quiet)
    with pytest.raises(ValueError, match="nothing in a column 'nubmer'"):
        compare([world / "peer.json"], Inputs(world / "items.parquet", key_column="nubmer"), **quiet)


def test_embeddings_with_item_ids_are_the_items_that_users_chose(world, tmp_path):
    """Ids that are numbers, but not those of the rows."""
    embeddings = np.load(world / "items.npy")
    parquet, users = tmp_path / "items.parquet", tmp_path / "users.parquet"
    rows = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    pq.write_table(pa.table({"item_id": [str(299 - row) for row in range(300)], "embedding": rows}), parquet)
    pq.write_table(pa.table({"user_id": ["u"], "item_ids": [["299", "298", "0"]]}), users)
    codes = load(world / "fine").encode(torch.from_numpy(embeddings)).codes[:, 0].tolist()

    found = compare([world / "fine"], Inputs(parquet, interactions=users), SMALL, lambda _: None)

    shared = ((codes[0] == codes[1]) + (codes[1] == codes[299])) / 2
    assert found.results[0].on_all.consecutive.shared[0] == shared
    with pytest.raises(ValueError, match="no other column"):
        compare([world / "fine"], Inputs(parquet, key_column="number"), SMALL, lambda _: None)
    pq.write_table(pa.table({"item_id": ["a"] * 300, "embedding": rows}), parquet)
    with pytest.raises(ValueError, match="'a' more than once"):
        compare([world / "fine"], Inputs(parquet), SMALL, lambda _: None)


def test_two_words_on_unseen_items_are_refused(world):
    inputs = Inputs(world / "items.npy", unseen=frozenset({"1"}), all_unseen=True)
    with pytest.raises(ValueError, match="both were said"):
        compare([world / "fine"], inputs, SMALL, lambda _: None)


def test_a_single_unseen_item_has_no_variance_to_take_a_share_of(world, tmp_path):
    found = compare([world / "fine"], Inputs(world / "items.npy", unseen=frozenset({"7"})), SMALL, lambda _: None)

    assert found.results[0].on_unseen.items == 1
    assert found.results[0].on_unseen.reconstruction_error is None
    assert 0 < found.results[0].on_all.reconstruction_error < 1
    write_report(found, tmp_path)


def test_the_codes_of_a_checkpoint_written_as_an_index_have_the_checkpoints_figures(world, tmp_path):
    codes = load(world / "fine").encode(torch.from_numpy(np.load(world / "items.npy"))).codes.tolist()
    index = {
        f"i{row}": [f"<{letter}_{code}>" for letter, code in zip("abc", of, strict=True)]
        for row, of in enumerate(codes)
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    inputs = Inputs(
        world / "items.parquet", interactions=world / "interactions.parquet", embeddings=world / "items.npy"
    )

    checkpoint, peer = compare([world / "fine", tmp_path / "index.json"], inputs, SMALL, lambda _: None).results

    assert peer.collisions == replace(checkpoint.collisions, duplicates=0.0)
    assert peer.collisions_by_depth == checkpoint.collisions_by_depth
    assert peer.growth == checkpoint.growth
    assert peer.on_all.colliding == checkpoint.on_all.colliding
    assert peer.on_all.purity == checkpoint.on_all.purity
    assert peer.on_all.consecutive == checkpoint.on_all.consecutive
    # The file does not say how large the codebooks are, so the share that is used may differ.
    assert [level.perplexity for level in peer.on_all.levels] == [
        level.perplexity for level in checkpoint.on_all.levels
    ]


def test_a_tokenizer_has_one_colour_in_all_plots(comparison):
    """The index file, put first, is in no plot of neighbours; the others keep their colours there."""
    if not plots.available():
        pytest.skip("matplotlib is not installed")
    coarse, fine, peer = comparison.results
    text = report_page(replace(comparison, results=(peer, coarse, fine)))
    neighbours = text[text.index("<h2>Neighbours kept") :]
    legend = neighbours[neighbours.index('<ul class="legend">') : neighbours.index("</ul>")]
    drawing = neighbours[neighbours.index("<figure>") : neighbours.index("</figure>")]
    assert "peer.json" not in legend
    for colour, seen in (("--s0", False), ("--s1", True), ("--s2", True)):
        assert (colour in legend) is (colour in drawing) is seen


def test_the_markers_of_many_tokenizers_stay_in_the_row_of_their_kind():
    matplotlib = pytest.importorskip("matplotlib.figure")
    kinds = {kind: Kept(10, (0.5, 0.4)) for kind in ("typo", "synonyms")}
    results = [SimpleNamespace(on_all=SimpleNamespace(stability=kinds))] * 20
    axes = matplotlib.Figure().add_subplot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda _name, _alt, paint: paint(axes) or "")
        report_plots.stability(results, 1)
    rows = np.array([line.get_ydata() for line in axes.lines])
    assert rows.shape == (20, 2)
    assert np.abs(rows - [0, 1]).max() < 0.5


def test_the_same_question_gets_the_same_report(world, comparison):
    inputs = Inputs(
        world / "items.parquet",
        interactions=world / "interactions.parquet",
        embeddings=world / "items.npy",
        key_column="number",
    )
    again = compare([world / "coarse", world / "fine", world / "peer.json"], inputs, SMALL, lambda _: None)
    assert again.as_dict() == comparison.as_dict()


def test_two_checkpoints_of_one_name_are_told_apart(world):
    found = compare([world / "fine", world / "fine"], Inputs(world / "items.npy"), SMALL, lambda _: None)
    names = [result.name for result in found.results]
    assert names[0].startswith("fine@")
    assert len(set(names)) == 2


def test_the_best_of_a_column_is_marked_and_figures_on_seen_items_do_not_compete(world):
    results = compare([world / "coarse", world / "fine"], Inputs(world / "items.npy"), SMALL, lambda _: None).results
    cells = summary_cells(results)
    error = [column.title for column in COLUMNS].index("Reconstruction error")
    raw = [column.title for column in COLUMNS].index("Raw collisions")
    assert [row[error].best for row in cells] == [False, True]
    assert [row[raw].best for row in cells] == [False, True]

    flattered = replace(results[1], on_unseen=None)
    row = summary_cells([results[0], results[0], flattered])[2]
    assert row[error].text.endswith("†")
    assert not row[error].best


def test_a_figure_of_few_items_has_a_mark_and_no_star(world):
    # given two tokenizers with enough unseen items
    found = compare([world / "coarse", world / "fine"], Inputs(world / "items.npy"), SMALL, lambda _: None)
    coarse, fine = found.results
    error = [column.title for column in COLUMNS].index("Reconstruction error")
    neighbours = [column.title for column in COLUMNS].index("Neighbours kept")
    few = replace(fine, on_unseen=replace(fine.on_unseen, items=FEW - 1))
    # when one of them has few, and a third has enough
    rows = summary_cells([coarse, few, coarse])
    # then it is the others that compete
    assert [row[error].best for row in rows] == [True, False, True]
    assert [row[error].text.endswith("‡") for row in rows] == [False, True, False]
    # and where all have few, none does: neighbours were searched of 50 items
    assert not any(row[neighbours].best for row in summary_cells([coarse, fine]))
    assert all(row[neighbours].text.endswith("‡") for row in summary_cells([coarse, fine]))
    # and the page says why, where there is such a figure
    assert "‡ of fewer than 200 items, or pairs of items" in report_page(found)
    enough = replace(fine.on_unseen, neighbours=replace(fine.on_unseen.neighbours, queries=FEW))
    assert "‡" not in report_page(replace(found, results=(replace(fine, on_unseen=enough),) * 2))


def test_the_page_says_why_a_figure_of_its_first_table_is_missing(world):
    # given a catalogue with neither texts nor users nor categories
    bare = compare([world / "coarse", world / "fine"], Inputs(world / "items.npy"), SMALL, lambda _: None)
    # then
    assert f"{NO_FIGURE} not measured:" in report_page(bare)


def test_a_report_that_cannot_be_written_is_the_one_before(comparison, tmp_path):
    # given
    write_report(comparison, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"report.json", "report.html"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # when no file may be as large as another one
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(replace(comparison, results=comparison.results[:1]), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # then
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_catalogue_of_few_items_has_no_stars_at_all(world):
    _, fine = compare([world / "coarse", world / "fine"], Inputs(world / "items.npy"), SMALL, lambda _: None).results
    small = replace(fine, items=40, on_unseen=None, on_all=replace(fine.on_all, items=40))
    assert not any(cell.best for row in summary_cells([small, small]) for cell in row)


class Page(HTMLParser):
    """Tags left open, and what is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.fetched += [
            v for k, v in attributes if k in {"src", "href", "xlink:href"} and not v.startswith(("#", "data:"))
        ]
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_fetches_nothing_runs_nothing_and_escapes_what_it_is_given(comparison, tmp_path):
    # given a name from a file that would be markup
    evil = replace(comparison.results[0], name="<script>alert(1)</script>")
    # when
    write_report(replace(comparison, results=(evil, *comparison.results[1:])), tmp_path / "report")
    # then
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert not {"script", "iframe"} & {tag for tag, _ in page.tags}
    assert "&lt;script&gt;" in text
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert all(attributes.get("scope") in {"row", "col"} for attributes in headers)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawings) >= 7
    assert all(attributes["aria-label"] for attributes in drawings)
    assert "#0001" not in text
    assert json.loads((tmp_path / "report" / "report.json").read_text())["results"][2]["name"] == "peer.json"


def test_without_matplotlib_there_are_tables_and_a_line_that_says_so(comparison, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    page = Page(report_page(comparison))
    text = report_page(comparison)
    assert not [tag for tag, _ in page.tags if tag == "svg"]
    assert "pip install" in text
    assert [tag for tag, _ in page.tags].count("table") >= 7
