"""The commands that learn from users' sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from service.cli import app

ITEMS = 20


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Users of items i0 to i19 and one of another catalogue; embeddings of i0 to i19 and of one that nobody chose."""
    random = np.random.default_rng(0)
    sequences = [[f"i{row}" for row in random.integers(ITEMS, size=6)] for _ in range(60)]
    sequences += [[f"i{row}" for row in range(ITEMS)] + ["i0", "i1"], ["x", "y", "z", "x"]]
    pq.write_table(pa.table({"user_id": list(range(62)), "item_ids": sequences}), tmp_path / "users.parquet")
    content = pa.array(random.standard_normal((ITEMS + 1, 8)).astype(np.float32).ravel())
    ids = [f"i{row}" for row in range(ITEMS + 1)]
    items = pa.table({"item_id": ids, "embedding": pa.FixedSizeListArray.from_arrays(content, 8)})
    pq.write_table(items, tmp_path / "items.parquet")
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"i{row},thing\n" for row in range(ITEMS)))
    return tmp_path


def trained(files: Path, *words: Any) -> Result:
    small = ("--levels", 2, "--codebook-size", 4, "--latent", 4, "--hidden", "", "--epochs", 2)
    return run("train", files / "items.parquet", "--out", files / "out", *small, *words)


@pytest.mark.parametrize("method", ["sasrec", "ppmi"])
@pytest.mark.parametrize("catalogue", ["items.parquet", "items.csv"])
def test_a_file_of_item_embeddings_is_written_and_a_tokenizer_trained_with_it(
    files: Path, method: str, catalogue: str
) -> None:
    path = files / "collaborative.parquet"

    result = run(
        *("item-embeddings", files / "users.parquet", "--out", path, "--catalogue", files / catalogue),
        *("--method", method, "--width", 6),
    )

    assert result.exit_code == 0, result.output
    assert "wrote embeddings of 20 items" in result.output
    assert ("NDCG@10" in result.output) == (method == "sasrec")
    assert pq.read_table(path).schema.field("embedding").type == pa.list_(pa.float32(), 6)
    result = trained(files, "--collaborative", path)
    assert result.exit_code == 0, result.output
    notes = json.loads((files / "out" / "manifest.json").read_text())["training"]
    assert notes["collaborative"]["method"] == method
    assert notes["collaborative"]["share_of_items"] == pytest.approx(20 / 21)
    assert notes["config"]["fit"]["loss"]["collaborative"] > 0


def test_interactions_train_the_item_embeddings_on_the_way(files: Path) -> None:
    result = trained(files, "--interactions", files / "users.parquet", "--set", "loss.collaborative=0.5")

    assert result.exit_code == 0, result.output
    assert "20 of 21 items have a collaborative embedding" in result.output
    training = json.loads((files / "out" / "manifest.json").read_text())["training"]
    assert training["collaborative"]["method"] == "sasrec"
    assert training["config"]["fit"]["loss"]["collaborative"] == 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--interactions", "users.parquet", "--family", "pq"], "count for nothing"),
        (["--interactions", "users.parquet", "--set", "loss.collaborative=0"], "count for nothing"),
        (["--interactions", "users.parquet", "--collaborative", "items.parquet"], "not both"),
        (["--collaborative", "items.csv"], "collaborative embeddings are .parquet"),
        (["--set", "loss.collaborative=0.1"], "neither collaborative embeddings nor interactions"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(files: Path, words: list[str], said: str) -> None:
    result = run(
        *("train", files / "items.parquet", "--out", files / "out"),
        *(files / word if word.endswith((".parquet", ".csv")) else word for word in words),
    )

    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert not (files / "out").exists()


def test_a_method_that_is_none_is_refused_by_name(files: Path) -> None:
    result = run("item-embeddings", files / "users.parquet", "--out", files / "e.parquet", "--method", "word2vec")

    assert result.exit_code == 1
    assert "there is no method 'word2vec'; known are sasrec, ppmi" in " ".join(result.output.split())
