"""One contract for every family of tokenizers, on small checkpoints that were trained and frozen as users' are."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import CheckpointError, Tokenizer, load, read_manifest
from models.checkpoint import freeze, load_parts, save
from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig
from models.quantizer import Quantizer
from models.text_encoder import TextEncoder
from models.tokenizer import FAMILIES, ErrorBounds, TokenizerParts
from models.training.train import train_checkpoint
from models.tree import TreeQuantizer
from tests.families import CODEBOOK_SIZES, DIMENSION, rows_of_families, small_config

LEVELS, SIZE = len(CODEBOOK_SIZES), CODEBOOK_SIZES[-1]
PREFIX_IS_NOT_COARSER = {"pq", "opq"}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, families: dict[str, Path]) -> Path:
    """The checkpoint of each family."""
    return families[request.param]


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load(directory)


@pytest.fixture(scope="module")
def parts(directory: Path) -> TokenizerParts:
    """What is frozen, in float32 as it lies on disk."""
    return load_parts(directory, read_manifest(directory))


@pytest.fixture(scope="module")
def quantizer(parts: TokenizerParts) -> Quantizer:
    """In float64, as it works in a tokenizer."""
    return copy.deepcopy(parts.quantizer).double()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return rows_of_families()


@pytest.fixture(scope="module")
def latents(parts: TokenizerParts, rows: Tensor) -> Tensor:
    """Canonical latents (3000, d) float64 of the rows."""
    with torch.no_grad():
        canonical: Tensor = copy.deepcopy(parts.network).double()(rows.double())
    return canonical


def codewords(quantizer: Quantizer, level: int) -> Tensor:
    """The codewords (K, d_l) that a level's first choice is among: of a tree the children of its first node."""
    if isinstance(quantizer, TreeQuantizer):
        return quantizer.centres(level)[: quantizer.offsets(level)[1]]
    return quantizer.codebooks[level].data


# Codes


def test_an_explanation_is_what_the_canonical_path_makes_of_a_row(
    tokenizer: Tokenizer, quantizer: Quantizer, rows: Tensor, latents: Tensor
) -> None:
    quantization = quantizer.quantize(latents[:8], exact=True)
    encoding = tokenizer.encode(rows[:8])

    explained = [tokenizer.explain(row) for row in rows[:8]]

    assert torch.equal(torch.stack([one.codes for one in explained]), encoding.codes)
    torch.testing.assert_close(torch.stack([one.margins for one in explained]), quantization.margins)
    torch.testing.assert_close(
        torch.stack([one.residual_norms for one in explained]), quantization.residuals.norm(dim=2)
    )


def test_codes_have_a_shape_a_type_and_a_range(tokenizer: Tokenizer, rows: Tensor) -> None:
    encoding = tokenizer.encode(rows)
    assert encoding.codes.shape == (3_000, LEVELS)
    assert encoding.codes.dtype == torch.int64
    assert tokenizer.codebook_sizes == CODEBOOK_SIZES
    assert bool(((encoding.codes >= 0) & (encoding.codes < SIZE)).all())
    assert encoding.margin.shape == encoding.quantization_error.shape == encoding.recomputed.shape == (3_000,)
    assert encoding.margin.dtype == encoding.quantization_error.dtype == torch.float64
    assert bool((encoding.margin >= 0).all())
    assert bool((encoding.quantization_error >= 0).all())
    assert tokenizer.encode(rows[:0]).codes.shape == (0, LEVELS)


def test_every_codeword_of_the_first_level_is_somebody_s(tokenizer: Tokenizer, rows: Tensor) -> None:
    assert len(tokenizer.encode(rows).codes[:, 0].unique()) == SIZE


def test_codes_are_the_same_alone_in_any_order_among_any_neighbours_and_with_any_threads(
    tokenizer: Tokenizer, rows: Tensor
) -> None:
    # given
    together = tokenizer.encode(rows).codes
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    far = 1e3 * rows[50:60]
    # when
    alone = torch.cat([tokenizer.encode(row[None]).codes for row in rows[:40]])
    by_sevens = torch.cat([tokenizer.encode(some).codes for some in rows[:100].split(7)])
    crowded = tokenizer.encode(torch.cat([rows[:50], far, rows[:1].expand(40, -1), rows[50:100]])).codes
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_another_order = tokenizer.encode(rows[order]).codes
    finally:
        torch.set_num_threads(threads)
    # then
    assert torch.equal(alone, together[:40])
    assert torch.equal(by_sevens, together[:100])
    assert torch.equal(crowded[:50], together[:50])
    assert torch.equal(crowded[50:60], tokenizer.encode(far).codes)
    assert torch.equal(crowded[60:], torch.cat([together[[0] * 40], together[50:100]]))
    assert torch.equal(in_another_order, together[order])


def test_codes_of_texts_do_not_depend_on_their_padding(
    parts: TokenizerParts, text_encoder: TextEncoder, texts: list[str]
) -> None:
    # given the family's codebooks behind a text encoder, and texts of which one is much longer
    torch.manual_seed(1)
    config = NetworkConfig((text_encoder.dimension, parts.quantizer.dimension))
    behind = replace(parts, text_encoder=text_encoder, network=EncoderNetwork(config), decoder=DecoderNetwork(config))
    torch.nn.init.normal_(behind.network.layers[0].weight)
    tokenizer = Tokenizer("t", behind, ErrorBounds())
    pieces = tokenizer.split([texts[0], texts[2], texts[6], texts[9]])
    # when
    together = tokenizer.encode_texts(pieces).codes
    # then
    assert torch.equal(together, torch.cat([tokenizer.encode_texts([row]).codes for row in pieces]))
    assert len(together.unique(dim=0)) == 4


def test_the_fast_path_gives_the_canonical_codes_of_thousands_of_rows(
    tokenizer: Tokenizer, quantizer: Quantizer, rows: Tensor, latents: Tensor
) -> None:
    canonical = quantizer.quantize(latents, exact=True)
    fast = quantizer.quantize(latents)
    encoding = tokenizer.encode(rows)
    assert torch.equal(encoding.codes, canonical.codes)
    assert torch.equal(fast.codes, canonical.codes)
    assert torch.allclose(fast.margins, canonical.margins, rtol=1e-6, atol=1e-9)
    # its last digits are those of the path that the row was final on
    assert torch.allclose(encoding.margin, canonical.margins.amin(dim=1), rtol=0, atol=1e-5 * quantizer.scale)


def test_codes_in_float32_are_the_canonical_ones_wherever_their_margin_exceeds_their_error(
    parts: TokenizerParts, quantizer: Quantizer, rows: Tensor, latents: Tensor
) -> None:
    # given
    canonical = quantizer.quantize(latents, exact=True)
    with torch.no_grad():
        rounded = parts.network(rows)
    # when
    found = parts.quantizer.quantize(rounded)
    # then; a residual is off by what the latent is, and by rounding of each level
    error = (rounded.double() - latents).norm(dim=1) + 1e-5 * latents.norm(dim=1)
    certain = found.margins.amin(dim=1) > error
    assert torch.equal(found.codes[certain], canonical.codes[certain])
    assert certain.float().mean() > 0.98


def test_a_latent_moved_by_less_than_the_margin_keeps_its_codes(quantizer: Quantizer, latents: Tensor) -> None:
    # given
    quantization = quantizer.quantize(latents[:500])
    margin = quantization.margins.amin(dim=1, keepdim=True)
    source = torch.Generator().manual_seed(4)
    changed = 0
    for _ in range(20):
        push = torch.randn((500, latents.shape[1]), generator=source, dtype=torch.float64)
        push /= push.norm(dim=1, keepdim=True)
        # then
        below = quantizer.quantize(latents[:500] + 0.999 * margin * push)
        assert torch.equal(below.codes, quantization.codes)
        beyond = quantizer.quantize(latents[:500] + 30 * margin * push)
        changed += int((beyond.codes != quantization.codes).any(dim=1).sum())
    assert changed > 100


def test_rows_near_a_tie_are_computed_again(tokenizer: Tokenizer, rows: Tensor) -> None:
    # given two rows of other first codes, and where the one code becomes another between them
    codes = tokenizer.encode(rows).codes[:, 0]
    low, high = rows[0].double(), rows[codes != codes[0]][0].double()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tokenizer.encode(middle[None]).codes[0, 0] == codes[0] else (low, middle)
    # when
    encoding = tokenizer.encode(torch.cat([middle[None], rows[:1].double()]))
    # then
    assert encoding.recomputed.tolist() == [True, False]
    assert torch.equal(encoding.codes[:1], tokenizer.encode(middle[None]).codes)


# Ties


@pytest.mark.parametrize("exact", [False, True])
def test_a_latent_midway_between_two_codewords_takes_the_lower(quantizer: Quantizer, *, exact: bool) -> None:
    # given the two codewords of the first level that are closest to each other: nothing is nearer to their middle
    book = codewords(quantizer, 0)
    apart = torch.cdist(book, book, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    one, other = divmod(int(apart.argmin()), len(book))
    latent = torch.zeros(1, quantizer.dimension, dtype=torch.float64)
    latent[0, : book.shape[1]] = (book[one] + book[other]) / 2
    # when
    quantization = quantizer.quantize(latent, exact=exact)
    # then
    assert quantization.codes[0, 0] == min(one, other)
    assert quantization.margins[0, 0] < 1e-12


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("level", range(LEVELS))
def test_of_equal_codewords_the_lower_is_taken_at_every_level(
    quantizer: Quantizer, latents: Tensor, level: int, *, exact: bool
) -> None:
    # given a codeword that others chose, made equal to one before it
    twice = copy.deepcopy(quantizer)
    book = codewords(twice, level)
    assert len(book) > 1
    before = quantizer.quantize(latents).codes
    # when
    book[-1] = book[0]
    after = twice.quantize(latents, exact=exact).codes
    # then, of a tree at its first node
    if isinstance(quantizer, TreeQuantizer):
        inside = (before[:, :level] == 0).all(dim=1)
        before, after = before[inside], after[inside]
    assert (before[:, level] == len(book) - 1).any()
    assert not (after[:, level] == len(book) - 1).any()


# What codes stand for


def test_codes_stand_for_embeddings_nearer_than_the_mean(tokenizer: Tokenizer, rows: Tensor) -> None:
    encoding = tokenizer.encode(rows)
    decoded = tokenizer.decode(encoding.codes)
    assert decoded.shape == rows.shape
    assert decoded.dtype == torch.float64
    error = (rows.double() - decoded).square().sum(dim=1).mean()
    assert error < 0.6 * (rows.double() - rows.double().mean(dim=0)).square().sum(dim=1).mean()


def test_what_no_level_took_is_what_decoding_misses(
    tokenizer: Tokenizer, quantizer: Quantizer, rows: Tensor, latents: Tensor
) -> None:
    encoding = tokenizer.encode(rows)
    with torch.no_grad():
        missed = latents - quantizer.decode(encoding.codes)
    assert torch.allclose(encoding.quantization_error, missed.square().sum(dim=1))
    quantization = quantizer.quantize(latents)
    assert torch.equal(quantization.residuals[:, 0], latents)
    assert torch.allclose(quantization.residuals[:, -1], missed)


def test_no_other_last_code_stands_for_something_nearer(quantizer: Quantizer, latents: Tensor) -> None:
    # given
    some = latents[:60]
    codes = quantizer.quantize(some).codes
    chosen = (some - quantizer.decode(codes)).norm(dim=1)
    tried = 0
    for latent, path, distance in zip(some, codes, chosen, strict=True):
        for code in range(SIZE):
            # when
            try:
                quantized = quantizer.decode(torch.cat([path[:-1], torch.tensor([code])])[None])[0]
            except ValueError:
                assert isinstance(quantizer, TreeQuantizer)  # a node has as many children as it has
                continue
            # then
            assert (latent - quantized).norm() >= distance - 1e-12
            tried += 1
    assert tried > 2 * len(some)


def test_what_is_no_code_or_no_embedding_is_refused(tokenizer: Tokenizer) -> None:
    fitting = torch.zeros(1, LEVELS, dtype=torch.int64)
    for codes in (fitting[:, 1:], fitting[0], fitting + SIZE, fitting - 1, fitting.float()):
        with pytest.raises(ValueError, match="code"):
            tokenizer.decode(codes)
    row = torch.zeros(1, DIMENSION)
    for embeddings in (row[:, 1:], row[0], row / 0, row + torch.inf):
        with pytest.raises(ValueError, match="embedding"):
            tokenizer.encode(embeddings)


# What a prefix means


def test_the_manifest_says_whether_a_prefix_is_a_coarser_description_and_it_is(
    directory: Path, quantizer: Quantizer, latents: Tensor
) -> None:
    # given latents of which only the last numbers move
    moved = latents.clone()
    width = latents.shape[1] // LEVELS
    moved[:, -width:] += 10 * latents.std()
    # when
    before, after = quantizer.quantize(latents).codes, quantizer.quantize(moved).codes
    # then the first code tells of them where it describes the whole
    told = bool((before[:, 0] != after[:, 0]).float().mean() > 0.5)
    manifest = read_manifest(directory)
    assert manifest.prefix_is_coarse_to_fine is told
    assert told is (manifest.family not in PREFIX_IS_NOT_COARSER)


# Alternatives


def test_alternatives_begin_with_the_chosen_code_go_by_distance_and_are_the_same_in_any_batch(
    tokenizer: Tokenizer, quantizer: Quantizer, rows: Tensor, latents: Tensor
) -> None:
    # when
    encoding = tokenizer.encode(rows[:200], alternatives=5)
    # then
    assert encoding.alternatives.shape == (200, 5)
    assert torch.equal(encoding.alternatives[:, 0], encoding.codes[:, -1])
    assert torch.equal(encoding.codes, tokenizer.encode(rows[:200]).codes)
    alone = torch.cat([tokenizer.encode(row[None], alternatives=5).alternatives for row in rows[:40]])
    assert torch.equal(encoding.alternatives[:40], alone)
    distances = []
    for place in range(5):
        codes = torch.cat([encoding.codes[:, :-1], encoding.alternatives[:, place : place + 1]], dim=1)
        distances.append((latents[:200] - quantizer.decode(codes)).norm(dim=1))
    assert (torch.stack(distances, dim=1).diff(dim=1) >= -1e-12).all()
    assert (encoding.alternatives[:, 1] != encoding.codes[:, -1]).float().mean() > 0.5


# Checkpoints


def test_what_is_saved_again_has_the_same_fingerprint_and_codes(
    directory: Path, tokenizer: Tokenizer, parts: TokenizerParts, rows: Tensor, tmp_path: Path
) -> None:
    manifest = read_manifest(directory)
    save(tmp_path / "again", parts, freeze(manifest.name, parts, ErrorBounds(**manifest.bounds)))
    again = load(tmp_path / "again")
    assert again.full_name == tokenizer.full_name == manifest.full_name
    assert again.family == manifest.family
    assert torch.equal(again.encode(rows).codes, tokenizer.encode(rows).codes)


def test_whatever_moves_a_code_is_refused_once_it_is_changed(directory: Path, tmp_path: Path) -> None:
    for name, tensor in load_file(directory / "model.safetensors").items():
        component = name.partition(".")[0]
        if component == "decoder" or not tensor.is_floating_point():
            continue
        changed = shutil.copytree(directory, tmp_path / name)
        state = load_file(changed / "model.safetensors")
        state[name].view(-1)[-1] += 1e-3
        save_file(state, changed / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{component}\.sha256: frozen with '\w+', found '\w+'"):
            load(changed)


def test_the_same_seed_gives_the_same_fingerprint_and_another_seed_another(
    directory: Path, rows: Tensor, tmp_path: Path
) -> None:
    family = read_manifest(directory).family
    np.save(tmp_path / "rows.npy", rows[:500].numpy())

    def fingerprint(seed: int, out: str) -> str:
        config = small_config(family, codebook_sizes=(8, 8), epochs=1, seed=seed)
        return train_checkpoint([tmp_path / "rows.npy"], tmp_path / out, config, say=lambda _: None).fingerprint

    assert fingerprint(3, "once") == fingerprint(3, "again") != fingerprint(4, "otherwise")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_gpu_gives_the_codes_of_the_cpu(directory: Path, tokenizer: Tokenizer, rows: Tensor) -> None:
    twin = load(directory, device="cuda")
    ours, theirs = tokenizer.encode(rows, alternatives=5), twin.encode(rows, alternatives=5)
    assert torch.equal(theirs.codes, ours.codes)
    assert torch.equal(theirs.alternatives, ours.alternatives)
    assert torch.allclose(twin.decode(ours.codes), tokenizer.decode(ours.codes))
