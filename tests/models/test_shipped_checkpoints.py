"""The checkpoints that ship: they load, give their golden codes, and their manifests' figures can be had again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from models import load, read_manifest
from models.catalogue import read_items
from models.checkpoint import DEFAULT_CHECKPOINT, MANIFEST, WEIGHTS, load_parts
from models.evaluation.measures import evaluate
from models.training.card import family_section

SHIPPED = sorted(path.parent for path in DEFAULT_CHECKPOINT.parent.glob(f"*/{MANIFEST}"))
GOLDEN = Path(__file__).parents[1] / "golden"
DATA = Path(__file__).parents[3] / "shared" / "data"
MEGABYTE = 2**20
SAMPLE = 200

every_checkpoint = pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)


@pytest.fixture
def beauty():
    """Beauty's items: all with SID_FULL set, else a sample spread over the file."""
    path = DATA / "amazon_beauty_2014" / "items.parquet"
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{path} is missing")
        pytest.skip(f"{path} is not here")
    items = [item for batch in read_items(path) for item in batch]
    return items if os.environ.get("SID_FULL") else items[:: len(items) // SAMPLE][:SAMPLE]


def test_the_default_and_the_reference_checkpoint_ship():
    assert DEFAULT_CHECKPOINT in SHIPPED
    assert {path.name for path in SHIPPED} >= {"tiger-beauty"}
    manifest = read_manifest(DEFAULT_CHECKPOINT.parent / "tiger-beauty")
    assert tuple(manifest.codebook_sizes) == (256, 256, 256)
    assert tuple(manifest.widths) == (384, 512, 256, 128, 32)


@every_checkpoint
def test_a_shipped_checkpoint_is_small_and_has_weights_manifest_and_card(directory):
    assert {path.name for path in directory.iterdir()} == {MANIFEST, WEIGHTS, "README.md"}
    assert sum(path.stat().st_size for path in directory.iterdir()) < 5 * MEGABYTE


@every_checkpoint
def test_a_shipped_checkpoint_s_card_names_it_its_data_command_and_limits(directory):
    card = (directory / "README.md").read_text(encoding="utf-8")
    manifest = read_manifest(directory)
    assert manifest.full_name in card
    assert family_section(manifest.family) in card
    for part in ("## Data and terms", "semid train", "## Figures", "## Limits", "on your own catalogue takes minutes"):
        assert part in card


@every_checkpoint
def test_a_shipped_checkpoint_gives_its_golden_codes(directory):
    # given
    golden = json.loads((GOLDEN / f"{directory.name}.json").read_text(encoding="utf-8"))
    tokenizer = load(directory)
    assert tokenizer.full_name == golden["tokenizer"]
    # when
    codes = tokenizer.encode_texts(tokenizer.split(golden["texts"])).codes
    # then
    assert codes.tolist() == golden["codes"]


@every_checkpoint
def test_every_level_of_a_shipped_checkpoint_is_in_use(directory):
    report = read_manifest(directory).report
    assert all(level["used"] >= 0.99 for level in report["levels"])
    if directory == DEFAULT_CHECKPOINT:
        assert all(level["perplexity"] > 220 for level in report["levels"])
        assert report["collisions"]["rate"] < 0.05


@every_checkpoint
def test_a_shipped_manifest_s_figures_are_had_again_on_its_data(directory, beauty):
    # given
    manifest = read_manifest(directory)
    told = manifest.report.get("files", {"amazon_beauty_2014/items.parquet": manifest.report})
    told = told["amazon_beauty_2014/items.parquet"]
    tokenizer = load(directory)
    texts = [item.content(tokenizer.template) for item in beauty]
    # when
    embeddings = torch.cat(
        [tokenizer.embed(tokenizer.split(texts[start : start + 50])) for start in range(0, len(texts), 50)]
    )
    parts = load_parts(directory, manifest)
    report = evaluate(embeddings, parts.network, parts.quantizer, parts.decoder)
    # then: the mean of a sample is near the catalogue's, the whole is the catalogue
    tolerance = 0.005 if len(beauty) == told["items"] else 0.1
    assert report.quantization_error["mean"] == pytest.approx(told["quantization_error"]["mean"], rel=tolerance)
    assert report.reconstruction_error == pytest.approx(told["reconstruction_error"], rel=tolerance)
    if len(beauty) == told["items"]:
        assert report.collisions.rate == pytest.approx(told["collisions"]["rate"], abs=0.002)
    else:
        assert report.collisions.rate <= told["collisions"]["rate"]
