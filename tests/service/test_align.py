"""`semid align`: another checkpoint, the same codewords under numbers that another tokenizer's users know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from models import load, read_manifest
from models.training.train import train_checkpoint
from service.cli import app
from tests.families import rows_of_families, small_config


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, ["align", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, rows_of_families().numpy())
    return path


@pytest.fixture(scope="module")
def retrained(families: dict[str, Path], rows: Path) -> Path:
    """The tokenizer rq-kmeans, trained once more with another seed."""
    out = rows.parent / "retrained"
    train_checkpoint([rows], out, small_config("rq-kmeans", seed=8), say=lambda _: None)
    return out


def test_a_retrained_tokenizer_is_numbered_like_the_one_before_it(
    families: dict[str, Path], retrained: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spring"

    done = run(retrained, "--to", families["rq-kmeans"], "--items", rows, "--out", out)

    assert done.exit_code == 0, done.output
    manifest, before = read_manifest(out), read_manifest(retrained)
    assert manifest.name == "spring"
    assert manifest.fingerprint not in {before.fingerprint, read_manifest(families["rq-kmeans"]).fingerprint}
    assert (manifest.bounds, manifest.report) == (before.bounds, before.report)
    embeddings = torch.from_numpy(np.load(rows))
    old, new, numbered = (load(path).encode(embeddings) for path in (families["rq-kmeans"], retrained, out))
    assert torch.equal(numbered.quantization_error, new.quantization_error)
    equal = [((codes == old.codes).double().mean(dim=0)).tolist() for codes in (new.codes, numbered.codes)]
    assert all(after > was for was, after in zip(*equal, strict=True))
    assert equal[1][0] > 3 * equal[0][0]
    notes = json.loads((out / "manifest.json").read_text())["training"]["aligned"]
    for name, shares in zip(("before", "after"), equal, strict=True):
        assert [level["equal_codes"] for level in notes[name]] == pytest.approx(shares)
    # what items that are yet to come may expect: less than those it was aligned on, and far more than by chance
    assert equal[1][0] > notes["unseen"][0]["equal_codes"] > 3 * equal[0][0]
    for share in (notes[name][0]["equal_codes"] for name in ("before", "after", "unseen")):
        assert re.search(rf"\b1 +{share:.1%}", done.output)
        assert f"{share:.1%} (" in (out / "README.md").read_text()
    assert f"{manifest.full_name}, numbered like {read_manifest(families['rq-kmeans']).full_name}" in done.output
    assert (out / "README.md").read_text().startswith(f"# {manifest.full_name}\n")


def test_a_tokenizer_that_takes_other_embeddings_is_refused_and_nothing_is_left(
    families: dict[str, Path], checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    refused = run(checkpoint, "--to", families["pq"], "--items", rows, "--out", tmp_path / "spring")

    assert refused.exit_code == 1
    assert "takes embeddings of 384 numbers, these have 24" in refused.stderr
    assert not (tmp_path / "spring").exists()


def test_a_checkpoint_is_not_written_over(families: dict[str, Path], rows: Path) -> None:
    refused = run(families["pq"], "--to", families["opq"], "--items", rows, "--out", families["opq"])

    assert refused.exit_code == 1
    assert "is there already" in refused.stderr
    assert "--force" not in refused.stderr  # there is no such option
