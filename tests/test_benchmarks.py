"""Every benchmark runs, at sizes that take seconds, and keeps what it found in the one form of all results."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from benchmarks import argmin, embeddings, fairness, flips, known, one_embedding, overload, registry, report, texts
from benchmarks.serving import service

TINY = {
    "texts": "--rounds 2 --texts 4 --singles 1 --checked 9 --no-infinity",
    "known": "--rounds 2 --items 8 --embedded 2",
    "embeddings": "--rounds 2 --items 16",
    "one_embedding": "--rounds 2 --requests 40",
    "fairness": "--rounds 2 --seconds 0.3 --bulk 20",
    "overload": "--rounds 2 --seconds 0.3 --warm 0.3",
    "argmin": "--rounds 2 --rows 64 --checked 64 --batches 1 64",
    "registry": "--rounds 2 --items 200",
    "flips": "--texts 2 --embeddings 20",
}
MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (argmin, embeddings, fairness, flips, known, one_embedding, overload, registry, texts)
}
SERVED = {"texts", "known", "embeddings", "one_embedding", "fairness", "overload"}


@pytest.mark.parametrize("module", sorted(path.stem for path in Path(report.__file__).parent.glob("*.py")))
def test_each_can_be_imported(module: str) -> None:
    importlib.import_module(f"benchmarks.{module}")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service for all of them."""
    with service() as tokenizes:
        yield tokenizes.removesuffix("/tokenize")


@pytest.fixture(scope="module")
def kept(url, tmp_path_factory) -> Path:
    """The directory with the results of all benchmarks, each run once."""
    directory, threads, environment = tmp_path_factory.mktemp("results"), torch.get_num_threads(), dict(os.environ)
    for name, options in TINY.items():
        served = ["--url", url] if name in SERVED else []
        MODULES[name].main([*options.split(), *served, "--threads", "1", "--results", str(directory)])
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
    return directory


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_keeps_figures_of_every_round_and_what_they_were_measured_on(name, kept):
    result = json.loads((kept / f"{name}.json").read_text())
    assert result["benchmark"] == name
    assert result["machine"]["cores"] == os.cpu_count()
    assert result["versions"]["torch"] == torch.__version__
    assert result["arguments"]["threads"] == 1
    assert result["comparisons"] or result["checks"]
    for comparison in result["comparisons"]:
        figures = comparison["figures"]
        assert {*comparison["ours"], comparison["against"]} <= figures.keys()
        assert all(len(found) == 2 for found in figures.values())
        assert all(math.isfinite(figure) and figure > 0 for found in figures.values() for figure in found)
    for check in result["checks"]:
        assert check["items"] > 0
    assert "url" not in result["arguments"]


@pytest.mark.parametrize("name", ["texts", "flips"])
def test_no_code_differs_from_the_canonical_one(name, kept):
    checks = json.loads((kept / f"{name}.json").read_text())["checks"]
    assert [check["differ"] for check in checks] == [0] * len(checks)


def test_the_page_has_every_figure_that_was_kept_and_a_plot_of_every_ratio(kept, tmp_path):
    # when
    report.main(["--results", str(kept), "--docs", str(tmp_path)])
    # then
    page = (tmp_path / "benchmarks.md").read_text()
    drawn = "".join(ET.parse(tmp_path / "benchmarks.svg").getroot().itertext())
    for result in report.read(kept):
        for comparison in result["comparisons"]:
            for path, figures in comparison["figures"].items():
                assert path in page
                assert report.spread(figures) in page
            assert comparison["title"] in drawn


def test_the_page_in_the_documentation_is_made_of_the_results_that_are_kept_beside_it(tmp_path):
    report.write(report.RESULTS, tmp_path)
    for name in ("benchmarks.md", "benchmarks.svg"):
        assert (report.ROOT / "docs" / name).read_text() == (tmp_path / name).read_text()
