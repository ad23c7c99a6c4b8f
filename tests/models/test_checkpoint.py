"""Every kind of tampering is refused, naming what differs."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CheckpointError, load, read_manifest
from models.checkpoint import MANIFEST, WEIGHTS, freeze, save
from models.template import TextTemplate
from models.text_encoder import TextEncoder
from models.tokenizer import ErrorBounds


@pytest.fixture
def parts(make_parts):
    return make_parts((12, 16, 8))


@pytest.fixture
def frozen(parts, tmp_path):
    """A checkpoint of embeddings."""
    directory = tmp_path / "frozen"
    save(directory, parts, freeze("frozen", parts, ErrorBounds(), training={"seed": 1}, max_suffix=9))
    return directory


def tamper(directory: Path, name: str, change) -> None:
    state = load_file(directory / WEIGHTS)
    state[name] = change(state[name])
    save_file(state, directory / WEIGHTS)


def edit(directory: Path, **changes) -> None:
    content = json.loads((directory / MANIFEST).read_text())
    content.update(changes)
    (directory / MANIFEST).write_text(json.dumps(content))


def test_a_checkpoint_comes_back_as_it_was(parts, frozen):
    # given
    embeddings = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    # when
    tokenizer = load(frozen)
    # then
    manifest = read_manifest(frozen)
    assert tokenizer.full_name == manifest.full_name == f"frozen@{manifest.fingerprint}"
    assert (manifest.training, manifest.max_suffix) == ({"seed": 1}, 9)
    expected = parts.quantizer.double().quantize(parts.network.double()(embeddings.double()))
    encoding = tokenizer.encode(embeddings)
    assert torch.equal(encoding.codes, expected.codes)
    rebuilt = parts.decoder.double()(parts.quantizer.decode(expected.codes))
    assert torch.allclose(tokenizer.decode(encoding.codes), rebuilt)


def test_loading_does_not_cluster_again(frozen):
    # given
    before = load_file(frozen / WEIGHTS)
    # when loaded and used on other data, twice
    for _ in range(2):
        tokenizer = load(frozen)
        tokenizer.encode(torch.randn(64, 12) * 50)
        # then
        assert bool(tokenizer._quantizer.initialised)
        for level, codebook in enumerate(tokenizer._quantizer.codebooks):
            assert torch.equal(codebook.float(), before[f"quantizer.codebooks.{level}"])


def test_the_same_parts_give_the_same_fingerprint_under_any_note(parts):
    first = freeze("a", parts, ErrorBounds())
    second = freeze("b", parts, ErrorBounds(text=1.0), report={"x": 1})
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 16


@pytest.mark.parametrize(
    ("tensor", "component"),
    [
        ("network.layers.0.weight", "network.sha256"),
        ("network.layers.2.bias", "network.sha256"),
        ("network.centre", "network.sha256"),
        ("quantizer.codebooks.1", "quantizer.sha256"),
    ],
)
def test_a_changed_weight_is_refused_naming_the_part(tensor, component, frozen):
    # given the last bit of one number
    tamper(frozen, tensor, lambda t: t.flatten().index_add(0, torch.tensor([0]), torch.tensor([1e-6])).view_as(t))
    # when, then
    with pytest.raises(CheckpointError, match=component):
        load(frozen)


def test_a_decoder_moves_no_code_and_is_not_in_the_fingerprint(frozen):
    tamper(frozen, "decoder.layers.0.bias", lambda t: t + 1)
    load(frozen)


def test_a_changed_template_is_refused_naming_it(frozen):
    template = json.loads((frozen / MANIFEST).read_text())["template"]
    edit(frozen, template={**template, "separator": "; "})
    with pytest.raises(CheckpointError, match=r"template.separator: frozen with '\. ', found '; '"):
        load(frozen)


def test_a_changed_fingerprint_is_refused(frozen):
    edit(frozen, fingerprint="0" * 16)
    with pytest.raises(CheckpointError, match="fingerprint"):
        load(frozen)


def test_weights_that_are_not_finite_are_refused(frozen):
    tamper(frozen, "quantizer.codebooks.0", lambda t: t.index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(CheckpointError, match=r"quantizer.codebooks.0 has numbers that are not finite"):
        load(frozen)


def test_a_truncated_file_is_refused(frozen):
    content = (frozen / WEIGHTS).read_bytes()
    (frozen / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(frozen)


def test_a_pickle_in_place_of_the_weights_is_refused_and_never_run(frozen, tmp_path):
    # given a pickle that would leave a trace
    trace = tmp_path / "trace"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (trace,))

    (frozen / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    # when
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(frozen)
    # then
    assert not trace.exists()


def test_a_missing_or_a_surplus_tensor_is_refused(frozen):
    state = load_file(frozen / WEIGHTS)
    save_file({**state, "extra.weight": torch.zeros(1)}, frozen / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        load(frozen)
    del state["quantizer.codebooks.2"]
    save_file(state, frozen / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"codebooks\.2"):
        load(frozen)


def test_a_codebook_of_another_shape_is_refused(frozen):
    edit(frozen, codebook_sizes=[32, 32, 33])
    with pytest.raises(CheckpointError, match=r"codebooks\.2"):
        load(frozen)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "format None"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1}', "no.* manifest"),
    ],
)
def test_a_faulty_manifest_is_refused(content, message, frozen):
    (frozen / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(frozen)


@pytest.mark.parametrize("value", [-1, True, 1.5, "x"])
def test_a_highest_suffix_that_is_none_is_refused(value, frozen):
    edit(frozen, max_suffix=value)
    with pytest.raises(CheckpointError, match="max_suffix"):
        read_manifest(frozen)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "nowhere")


def test_an_unknown_family_is_refused(frozen):
    edit(frozen, family="tree-of-wonders")
    with pytest.raises(CheckpointError, match="tree-of-wonders"):
        load(frozen)


@pytest.mark.parametrize(
    "bounds",
    [
        {},
        None,
        {"text": 1e-4},
        {"text": 1e-4, "embedding": 1e-9, "other": 1.0},
        {"text": -1.0, "embedding": 1e-9},
        {"text": 0, "embedding": 1e-9},
        {"text": float("nan"), "embedding": 1e-9},
        {"text": 1e-4, "embedding": float("inf")},
        {"text": "1e-4", "embedding": 1e-9},
        {"text": True, "embedding": 1e-9},
        {"text": 1e-4, "embedding": 1e-9, "embedding_float32": 0},
        {"text": 1e-4, "embedding": 1e-9, "text_bfloat16": float("nan")},
        {"text": 1e-4, "embedding": 1e-9, "text_float8": 1e-1},
    ],
)
def test_bounds_that_would_switch_the_canonical_path_off_are_refused(bounds, frozen):
    edit(frozen, bounds=bounds)
    with pytest.raises(CheckpointError, match="bounds"):
        load(frozen)


def test_a_checkpoint_s_files_can_be_read_by_all(frozen):
    assert {path.name: path.stat().st_mode & 0o777 for path in frozen.iterdir()} == {MANIFEST: 0o644, WEIGHTS: 0o644}


@pytest.fixture
def with_encoder(text_encoder, make_parts, tmp_path):
    """A checkpoint of texts, and a copy of its text encoder."""
    copy = tmp_path / "encoder"
    shutil.copytree(text_encoder._directory, copy)
    parts = make_parts((384, 8), text_encoder)
    save(tmp_path / "frozen", parts, freeze("frozen", parts, ErrorBounds()))
    return tmp_path / "frozen", copy


@pytest.mark.parametrize("setting", [{"do_lower_case": False}, {"strip_accents": False}, {"truncation_side": "left"}])
def test_another_setting_of_the_word_pieces_is_refused_naming_the_file(setting, with_encoder):
    directory, copy = with_encoder
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(CheckpointError, match=r"word_pieces.settings.tokenizer_config.json") as raised:
        load(directory, text_encoder=str(copy))
    assert "word_pieces.canary" in str(raised.value)


def test_a_setting_that_names_a_file_or_a_release_moves_no_code(with_encoder):
    directory, copy = with_encoder
    config = json.loads((copy / "tokenizer_config.json").read_text())
    others = {"name_or_path": "elsewhere", "transformers_version": "9.9", "tokenizer_class": "BertTokenizerFast"}
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, **others}))
    load(directory, text_encoder=str(copy))


def test_a_text_encoder_without_its_settings_is_refused(text_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoder, "_directory", tmp_path)
    monkeypatch.setattr("models.text_encoder.weight_files", lambda _: [tmp_path / "w"])
    (tmp_path / "w").touch()
    monkeypatch.delitem(text_encoder.__dict__, "components", raising=False)
    with pytest.raises(CheckpointError, match=r"config.json"):
        _ = text_encoder.components


def test_known_texts_with_other_latents_than_were_frozen_are_refused(with_encoder):
    directory, _ = with_encoder
    canary = json.loads((directory / MANIFEST).read_text())["canary"]
    canary["latents"][1][3] += 2e-4
    edit(directory, canary=canary)
    with pytest.raises(CheckpointError, match=r"known texts other latents.*were frozen"):
        load(directory)


@pytest.mark.parametrize("canary", [{}, {"latents": []}, {"latents": [["x"]]}, {"latents": [[float("nan")] * 8] * 2}])
def test_a_manifest_without_latents_of_known_texts_is_refused(canary, with_encoder):
    directory, _ = with_encoder
    edit(directory, canary=canary)
    with pytest.raises(CheckpointError, match="known texts"):
        load(directory)


def test_a_device_whose_fast_path_errs_beyond_the_bound_is_refused(with_encoder, monkeypatch):
    directory, _ = with_encoder
    embed = TextEncoder.embed
    monkeypatch.setattr(TextEncoder, "embed", lambda self, *rows: embed(self, *rows) + 1e-2)
    with pytest.raises(CheckpointError, match=r"known texts other latents on cpu.*canonical path"):
        load(directory)


def test_a_checkpoint_is_never_overwritten(parts, frozen):
    before = (frozen / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        save(frozen, parts, freeze("other", parts, ErrorBounds()))
    assert (frozen / WEIGHTS).read_bytes() == before


def test_a_failed_save_leaves_nothing(parts, tmp_path, monkeypatch):
    # given a disk that fills up
    def full(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("models.checkpoint.save_file", full)
    # when
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "new", parts, freeze("new", parts, ErrorBounds()))
    # then
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a b", "a@b", "a/b", "ä"])
def test_a_name_that_would_not_fit_into_an_address_is_refused(name, parts):
    with pytest.raises(ValueError, match="name has letters"):
        freeze(name, parts, ErrorBounds())


def test_a_tampered_text_encoder_is_refused_naming_it(text_encoder, make_parts, tmp_path):
    # given a checkpoint on a copy of the text encoder
    copy = tmp_path / "encoder"
    shutil.copytree(text_encoder._directory, copy)
    parts = make_parts((384, 8), text_encoder)
    save(tmp_path / "frozen", parts, freeze("frozen", parts, ErrorBounds()))
    load(tmp_path / "frozen", text_encoder=str(copy))
    # when one weight of the copy changes
    (weights,) = copy.rglob("*.safetensors")
    state = load_file(weights)
    first = next(name for name in state if name.endswith("LayerNorm.bias"))
    state[first] = state[first] + 1e-3
    save_file(state, weights, metadata={"format": "pt"})
    # then
    with pytest.raises(CheckpointError, match=r"text_encoder.weights.sha256"):
        load(tmp_path / "frozen", text_encoder=str(copy))


def test_another_template_makes_another_fingerprint(parts):
    other = replace(parts, template=TextTemplate(fields=("title",)))
    assert freeze("a", parts, ErrorBounds()).fingerprint != freeze("a", other, ErrorBounds()).fingerprint


def test_a_manifest_that_says_otherwise_than_its_family_what_a_prefix_means_is_refused(frozen):
    edit(frozen, prefix_is_coarse_to_fine=False)
    with pytest.raises(CheckpointError, match="prefix_is_coarse_to_fine: frozen with True, found False"):
        load(frozen)
