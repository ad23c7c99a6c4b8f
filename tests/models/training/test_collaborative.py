"""Collaborative item embeddings: without the last two interactions, item by item, and into a tokenizer."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from models import read_manifest
from models.checkpoint import load_parts
from models.embedding_files import read_embeddings
from models.training.collaborative import (
    METHODS,
    ItemEmbeddings,
    align,
    aligned,
    needs_item_ids,
    read_item_embeddings,
    train_item_embeddings,
    write_item_embeddings,
)
from models.training.cooccurrence import PPMIConfig
from models.training.data import TrainingData
from models.training.fit_config import FitConfig
from models.training.projection import ProjectionConfig
from models.training.rqvae import LossConfig
from models.training.sasrec import SASRecConfig
from models.training.train import TrainConfig, train_checkpoint

SASREC = SASRecConfig(width=8, max_length=8, negatives=0, batch_users=64, epochs=2)
PPMI = PPMIConfig(width=4)
GROUPS, ITEMS, MANY = 4, 32, 400


def quiet(_: str) -> None:
    """Say nothing."""


def chosen(users: int = 120, items: int = ITEMS) -> list[list[str]]:
    """Users who choose from one group of items each; item i belongs to group i % GROUPS."""
    rows = np.random.default_rng(0).integers(items // GROUPS, size=(users, 7))
    return [[f"i{row * GROUPS + user % GROUPS}" for row in sequence] for user, sequence in enumerate(rows)]


def interactions(path: Path, sequences: list[list[str]]) -> Path:
    pq.write_table(pa.table({"user_id": [f"u{n}" for n in range(len(sequences))], "item_ids": sequences}), path)
    return path


def embeddings_file(path: Path, item_ids: list[object], embeddings: list[object]) -> Path:
    pq.write_table(pa.table({"item_id": item_ids, "embedding": embeddings}), path)
    return path


def training_data(item_ids: list[str] | None, items: int = 3) -> TrainingData:
    ids = None if item_ids is None else pa.array(item_ids, pa.large_string())
    return TrainingData(torch.zeros(items, 2), (), None, [], ids)


@pytest.mark.parametrize("config", [SASREC, PPMI], ids=["sasrec", "ppmi"])
@pytest.mark.parametrize("catalogue", [None, [f"i{n}" for n in range(ITEMS)]], ids=["any", "catalogue"])
def test_what_a_generator_is_tested_on_changes_nothing(config, catalogue, tmp_path):
    # given: two files that differ in the last two interactions of every user, new items among them
    sequences = chosen()
    others = [
        [*sequence[:-2], f"i{user % ITEMS}", "i0" if catalogue else "new"] for user, sequence in enumerate(sequences)
    ]
    # when
    first, second = (
        train_item_embeddings(interactions(tmp_path / name, lines), config, catalogue, say=quiet)
        for name, lines in (("a.parquet", sequences), ("b.parquet", others))
    )
    # then
    assert first.item_ids == second.item_ids
    assert torch.equal(first.embeddings, second.embeddings)
    # and an interaction before them does change it
    earlier = [[sequence[0], "i0", *sequence[2:]] for sequence in sequences]
    third = train_item_embeddings(interactions(tmp_path / "c.parquet", earlier), config, catalogue, say=quiet)
    assert not torch.equal(first.embeddings, third.embeddings)


def test_unknown_items_are_left_out_before_the_split_as_a_generator_of_the_catalogue_splits(tmp_path):
    # given: of the last user the catalogue knows four items, the last two of which are its test
    sequences = [*chosen(), ["i0", "i4", "i1", "i2", "x", "y"]]
    lines = []
    catalogue = [f"i{n}" for n in range(ITEMS)]
    # when
    path = interactions(tmp_path / "i.parquet", sequences)
    found = train_item_embeddings(path, PPMI, catalogue, say=lines.append)
    sequences[-1] = ["i0", "i4", "i3", "i5"]
    expected = train_item_embeddings(interactions(tmp_path / "e.parquet", sequences), PPMI, catalogue, say=quiet)
    # then
    assert torch.equal(found.embeddings, expected.embeddings)
    assert "2 of 846 interactions are with items that the catalogue does not have" in lines[0]


def test_an_item_that_is_only_ever_last_has_no_embedding(tmp_path):
    path = interactions(tmp_path / "i.parquet", [*chosen(), ["i1", "i5", "late", "later"]])
    for config in (SASREC, PPMI):
        found = train_item_embeddings(path, config, say=quiet)
        assert sorted(found.item_ids.to_pylist()) == sorted(f"i{n}" for n in range(ITEMS))
        assert found.embeddings.isfinite().all()


def test_the_notes_say_how_they_were_made_and_nothing_of_users(tmp_path):
    path = interactions(tmp_path / "i.parquet", chosen())
    notes = train_item_embeddings(path, SASREC, say=quiet).notes
    assert notes["method"] == "sasrec"
    assert notes["config"]["width"] == 8
    assert notes["interactions"]["file"].endswith("/i.parquet")
    assert len(notes["interactions"]["sha256"]) == 64
    assert notes["test"]["users"] == 120
    assert '"u1' not in json.dumps(notes)


@pytest.mark.parametrize(
    ("sequences", "catalogue", "words"),
    [
        ([["a", "b", "c"]], ["x"], "none of the catalogue's items, such as 'x'"),
        ([["a", "b"]], None, "no user with three interactions"),
        ([["a", "b", "c"]], None, "no two items occur together"),
    ],
)
def test_interactions_of_which_nothing_can_be_learnt_are_refused(sequences, catalogue, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_item_embeddings(interactions(tmp_path / "i.parquet", sequences), PPMI, catalogue, say=quiet)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SASRecConfig(heads=0), "heads is 0; it is at least 1"),
        (SASRecConfig(max_length=0), "max_length is 0; it is at least 1"),
        (SASRecConfig(batch_users=0), "batch_users is 0"),
        (SASRecConfig(negatives=-1), "negatives is -1; it is at least 0"),
        (SASRecConfig(dropout=float("nan")), "dropout is nan"),
        (PPMIConfig(width=0), "width is 0"),
        (PPMIConfig(window=0), "window is 0"),
        (PPMIConfig(smoothing=float("nan")), "smoothing is nan"),
    ],
)
def test_a_setting_without_sense_is_refused_by_its_name(config, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_item_embeddings(tmp_path / "absent.parquet", config, say=quiet)


def test_embeddings_are_brought_to_items_by_their_id():
    found = ItemEmbeddings(pa.array(["b", "x", "a"], pa.large_string()), torch.tensor([[1.0], [2.0], [3.0]]), {})
    lines = []
    brought = aligned(found, pa.array(["a", "?", "b", "a"]), lines.append)
    torch.testing.assert_close(
        brought.embeddings, torch.tensor([[3.0], [torch.nan], [1.0], [3.0]]), equal_nan=True, rtol=0, atol=0
    )
    assert brought.notes == {"width": 1, "share_of_items": 0.75}
    assert lines == ["3 of 4 items have a collaborative embedding"]


def test_items_of_which_none_has_an_embedding_are_refused_with_examples_of_both():
    found = ItemEmbeddings(pa.array(["0001"], pa.large_string()), torch.ones(1, 2), {})
    with pytest.raises(ValueError, match=r"none of the 2 items .* such as '1', '2', .* such as '0001'"):
        aligned(found, pa.array(["1", "2"]), quiet)


def test_what_is_written_is_read_again_with_its_notes(tmp_path):
    found = train_item_embeddings(interactions(tmp_path / "i.parquet", chosen()), PPMI, say=quiet)
    write_item_embeddings(tmp_path / "e.parquet", found)
    again = read_item_embeddings(tmp_path / "e.parquet")
    assert again.item_ids == found.item_ids
    assert torch.equal(again.embeddings, found.embeddings)
    assert again.notes == found.notes


@pytest.mark.parametrize("notes", ["not json", "[1]", "{}"])
def test_notes_that_are_none_of_ours_say_nothing(notes, tmp_path):
    table = pa.table({"item_id": ["a"], "embedding": [[1.0, 2.0]]}).replace_schema_metadata({"semid": notes})
    pq.write_table(table, tmp_path / "e.parquet")
    assert read_item_embeddings(tmp_path / "e.parquet").notes == {"method": "given"}


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    found = ItemEmbeddings(pa.array([f"i{n}" for n in range(1000)], pa.large_string()), torch.rand(1000, 8), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_item_embeddings(tmp_path / "e.parquet", found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_lists_of_one_width_and_ids_that_are_numbers_will_do(tmp_path):
    found = read_item_embeddings(embeddings_file(tmp_path / "e.parquet", [7, 8], [[1.0, 2.0], [3.0, 4.0]]))
    assert found.item_ids.to_pylist() == ["7", "8"]
    assert found.embeddings.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found.notes == {"method": "given"}


@pytest.mark.parametrize(
    ("item_ids", "embeddings", "words"),
    [
        (["a", "a"], [[1.0], [2.0]], "1 items more than once, such as 'a'"),
        (["a", "b"], [[1.0], [2.0, 3.0]], "embeddings of 1 and 2 numbers, not of one width"),
        (["a", "b"], [[1.0], [float("nan")]], "not finite in 1 rows, first of item 'b'"),
        (["a", "b"], [[1.0], [float("inf")]], "not finite in 1 rows, first of item 'b'"),
        (["a", "b"], [[1.0], None], "nulls among its embeddings"),
        (["a", None], [[1.0], [1.0]], "without an item_id"),
        (["a"], [1.0], "embedding is double, expected lists of floats"),
        (["a"], [[]], "embedding is list.*, expected lists of floats"),
        ([1.5], [[1.0]], "expected strings or integers"),
    ],
)
def test_a_faulty_file_is_refused_with_its_fault(item_ids, embeddings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_item_embeddings(embeddings_file(tmp_path / "e.parquet", item_ids, embeddings))


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "e.parquet"
    path.write_text("item_id,embedding\n")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_item_embeddings(path)
    pq.write_table(pa.table({"item_id": ["a"], "vector": [[1.0]]}), path)
    with pytest.raises(ValueError, match="no column 'embedding'"):
        read_item_embeddings(path)
    pq.write_table(
        pa.table({"item_id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))}), path
    )
    with pytest.raises(ValueError, match="has no rows"):
        read_item_embeddings(path)


def test_an_array_has_a_row_for_each_item_in_their_order(tmp_path):
    path = tmp_path / "e.npy"
    np.save(path, np.eye(3, dtype=np.float32))
    assert torch.equal(align(training_data(None), file=path, say=quiet).embeddings, torch.eye(3))
    with pytest.raises(ValueError, match="3 rows for 4 items"):
        align(training_data(None, 4), file=path, say=quiet)


def test_item_ids_are_asked_for_only_where_they_are_needed():
    assert not needs_item_ids(None, None)
    assert not needs_item_ids(Path("e.npy"), None)
    assert needs_item_ids(Path("e.parquet"), None)
    assert needs_item_ids(None, Path("i.parquet"))
    with pytest.raises(ValueError, match="not both"):
        needs_item_ids(Path("e.npy"), Path("i.parquet"))
    with pytest.raises(ValueError, match=r"e\.csv: collaborative embeddings are"):
        needs_item_ids(Path("e.csv"), None)


def test_every_method_has_the_same_two_settings_of_the_command():
    assert all(hasattr(config, "width") and hasattr(config, "seed") for config in METHODS.values())


def small(collaborative: float) -> TrainConfig:
    fit = FitConfig(
        codebook_sizes=(8, 8),
        latent=6,
        hidden=(32,),
        epochs=25,
        batch_rows=64,
        learning_rate=3e-3,
        held_out=0.1,
        loss=LossConfig(collaborative=collaborative),
        projection=ProjectionConfig(local=0.0),
    )
    return TrainConfig(name="small", fit=fit)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """Items whose content says a little of who chooses them and more of other things; item i is of group i % GROUPS."""
    content = np.random.default_rng(1).standard_normal((MANY, 12)).astype(np.float32)
    content[:, :GROUPS] = 0.3 * content[:, :GROUPS] + np.eye(GROUPS, dtype=np.float32)[np.arange(MANY) % GROUPS]
    path = tmp_path_factory.mktemp("catalogue") / "items.parquet"
    return embeddings_file(path, [f"i{n}" for n in range(MANY)], fixed(content))


def fixed(content: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(content.ravel()), content.shape[1])


def alignment(checkpoint: Path, catalogue: Path) -> float:
    """Mean cosine of quantized latents of a group less that of different groups."""
    parts = load_parts(checkpoint, read_manifest(checkpoint))
    content = read_embeddings(catalogue)
    with torch.inference_mode():
        latents = parts.quantizer.decode(parts.quantizer.quantize(parts.network(content)).codes)
    directions = functional.normalize(latents - latents.mean(dim=0), dim=1)
    cosines = directions @ directions.T
    group = torch.arange(MANY) % GROUPS
    same = (group[:, None] == group) & ~torch.eye(MANY, dtype=torch.bool)
    return float(cosines[same].mean() - cosines[group[:, None] != group].mean())


def test_a_tokenizer_trained_with_them_draws_together_what_the_same_users_choose_and_says_whence(tmp_path, catalogue):
    # given
    path = interactions(tmp_path / "users.parquet", chosen(2 * MANY, MANY))
    embeddings = train_item_embeddings(path, PPMIConfig(width=6), say=quiet)
    write_item_embeddings(tmp_path / "collaborative.parquet", embeddings)
    # when
    train_checkpoint([catalogue], tmp_path / "without", small(0), say=quiet)
    manifest = train_checkpoint(
        [catalogue], tmp_path / "with", small(1.0), collaborative=tmp_path / "collaborative.parquet", say=quiet
    )
    # then
    assert alignment(tmp_path / "with", catalogue) > alignment(tmp_path / "without", catalogue) + 0.15
    notes = manifest.training["collaborative"]
    assert notes["method"] == "ppmi"
    assert notes["share_of_items"] == 1.0
    card = (tmp_path / "with" / "README.md").read_text()
    assert "learnt by PPMI and SVD from the sequences of" in card
    assert "users.parquet" in card
    assert str(tmp_path) not in card + json.dumps(manifest.training)
    assert "collaborative" not in (tmp_path / "without" / "README.md").read_text()


def test_embeddings_without_a_weight_and_a_weight_without_embeddings_are_refused(tmp_path, catalogue):
    with pytest.raises(ValueError, match="count for nothing"):
        train_checkpoint([catalogue], tmp_path / "out", small(0), collaborative=Path("e.npy"), say=quiet)
    with pytest.raises(ValueError, match="neither collaborative embeddings nor interactions"):
        train_checkpoint([catalogue], tmp_path / "out", small(0.5), say=quiet)
