"""One launch for all levels finds what torch finds: on a GPU, or in Triton's interpreter where Triton is installed.

    TRITON_INTERPRET=1 python -m pytest tests/models/device/test_search.py

runs the kernel's own lines without a GPU, and one test here does so by itself.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from models.device.search import BLOCK, ROWS, STAGES, WARPS, _check, fused_search
from models.native.search import Found
from models.quantizer import Codes, search_table
from models.residual import ResidualQuantizer

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

needs_kernel = pytest.mark.skipif(
    not TRITON or (DEVICE.type == "cpu" and not INTERPRETED),
    reason="there is no CUDA device, and no interpreter asked for",
)

# As numpy says in the interpreter of what was meant, and no GPU would.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def quantizer_of(*codebooks: Tensor) -> ResidualQuantizer:
    """Prepared, on the device; searched by the kernel wherever that is."""
    quantizer = ResidualQuantizer([len(codebook) for codebook in codebooks], codebooks[0].shape[1])
    quantizer = quantizer.to(DEVICE, codebooks[0].dtype).requires_grad_(requires_grad=False)
    for own, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        own.copy_(codebook)
    quantizer.prepare()
    exact = [codebook.detach().double() for codebook in quantizer.codebooks]
    quantizer._search = fused_search(exact, [search_table(codebook) for codebook in exact], codebooks[0].dtype)
    assert quantizer._search is not None
    return quantizer


def codebooks_of(sizes, dimension, generator, dtype=torch.float64) -> list[Tensor]:
    """Each finer than the one before it, and off the origin."""
    return [
        torch.randn(size, dimension, generator=generator, dtype=dtype) / 1.6**level + 3
        for level, size in enumerate(sizes)
    ]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "dimension", "rows"),
    [
        ((256,) * 3, 48, 100),
        ((256, 100, 37), 45, 70),
        ((5,), 3, 1),
        ((1, 1), 1, 33),
        ((33, 7), 128, 65),
        ((1000,), 8, 31),
        ((64, 64), 20, 0),
    ],
)
def test_on_a_gpu_codes_margins_and_errors_are_torchs(sizes, dimension, rows, dtype, generator):
    # given
    codebooks = codebooks_of(sizes, dimension, generator, dtype)
    quantizer = quantizer_of(*codebooks)
    latents = torch.randn(rows, dimension, generator=generator, dtype=dtype).to(DEVICE) + 3 * len(sizes)
    exact = quantizer_of(*(codebook.double() for codebook in codebooks))._quantize(latents.double())
    atol = 1e-10 if dtype == torch.float64 else 1e-5
    # when
    found, brief = quantizer.quantize(latents), quantizer.encode(latents)
    # then
    assert torch.equal(found.codes, exact.codes)
    assert torch.allclose(found.margins.double(), exact.margins, rtol=0, atol=atol)
    assert torch.allclose(found.residuals.double(), exact.residuals, rtol=0, atol=atol)
    assert torch.equal(brief.codes, exact.codes)
    assert torch.allclose(brief.margin.double(), exact.margins.amin(dim=1), rtol=0, atol=atol)
    assert torch.allclose(brief.error.double(), exact.residuals[:, -1].square().sum(dim=1), rtol=1e-5, atol=atol)
    assert found.margins.dtype == found.residuals.dtype == brief.margin.dtype == brief.error.dtype == dtype


@needs_kernel
def test_on_a_gpu_a_row_comes_to_the_same_codes_alone_and_in_any_batch(generator):
    quantizer = quantizer_of(*codebooks_of((100, 100), 24, generator))
    latents = torch.randn(70, 24, generator=generator, dtype=torch.float64).to(DEVICE) + 6
    whole = quantizer.encode(latents)
    for rows in (*latents.split(1)[:5], latents[3:], latents.flip(0)):
        place = (rows[:, None] == latents).all(dim=2).int().argmax(dim=1)
        assert torch.equal(quantizer.encode(rows).codes, whole.codes[place])
        assert torch.allclose(quantizer.encode(rows).margin, whole.margin[place], rtol=0, atol=1e-12)


@needs_kernel
def test_on_a_gpu_ties_and_equal_codewords_go_to_the_lowest_index(generator):
    # given the corners of a cube, some of them twice, and latents on planes, axes, corners and in the middle
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    codebook = torch.cat([corners[5:6], corners, corners[2:5]])
    quantizer = quantizer_of(codebook, codebook / 3)
    latents = torch.cartesian_prod(*[torch.linspace(-2, 2, 5, dtype=torch.float64)] * 3).to(DEVICE)
    # when
    found, brief = quantizer.quantize(latents), quantizer.encode(latents)
    # then most are told to be in doubt, and settled as the exact form does it; the others are right
    exact = quantizer.quantize(latents, exact=True)
    in_doubt = brief.margin.isnan()
    assert in_doubt.sum() > len(latents) / 2
    assert not in_doubt.all()
    assert torch.equal(found.codes, exact.codes)
    assert torch.allclose(found.margins, exact.margins, rtol=0, atol=1e-12)
    assert torch.equal(brief.codes[~in_doubt], exact.codes[~in_doubt])


@needs_kernel
def test_on_a_gpu_a_hair_from_a_plane_the_code_is_that_of_differences_or_in_doubt(generator):
    # given
    (codebook,) = codebooks_of((256,), 32, generator)
    quantizer = quantizer_of(codebook)
    first = torch.randint(256, (200,), generator=generator)
    second = torch.cdist(codebook, codebook).topk(2, largest=False).indices[first, 1]
    latents = (codebook[first] + codebook[second]) / 2
    latents += (codebook[second] - codebook[first]) * torch.logspace(-16, -8, 200, dtype=torch.float64)[:, None]
    latents = latents.to(DEVICE)
    # when
    brief, exact = quantizer.encode(latents), quantizer.quantize(latents, exact=True)
    # then
    assert brief.margin.isnan().any()
    # the exact form calls nearer ones a tie
    sure = brief.margin > 1e-11
    assert 50 < sure.sum() < 190
    assert torch.equal(brief.codes[sure], exact.codes[sure])
    assert (brief.margin[sure] <= exact.margins[sure, 0] + 1e-15).all()


@needs_kernel
def test_on_a_gpu_numbers_that_are_not_finite_or_too_large_are_in_doubt_and_spare_their_neighbours(generator):
    # given
    quantizer = quantizer_of(*codebooks_of((64, 64), 5, generator))
    latents = torch.randn(40, 5, generator=generator, dtype=torch.float64).to(DEVICE)
    clean = quantizer.encode(latents)
    spoilt = latents.clone()
    spoilt[7, 2], spoilt[8, 0], spoilt[20, 4], spoilt[21, 1] = torch.nan, torch.inf, 1e200, -torch.inf
    # when
    found = quantizer.encode(spoilt)
    # then
    others = [row for row in range(40) if row not in {7, 8, 20, 21}]
    assert found.margin[[7, 8, 20, 21]].isnan().all()
    assert all(torch.equal(part[others], other[others]) for part, other in zip(found, clean, strict=True))
    assert torch.equal(quantizer.quantize(spoilt).codes, quantizer._quantize(spoilt).codes)


@needs_kernel
def test_on_a_gpu_latents_of_any_strides_are_searched_and_others_refused(generator):
    quantizer = quantizer_of(*codebooks_of((64,), 6, generator))
    latents = torch.randn(20, 12, generator=generator, dtype=torch.float64).to(DEVICE)
    assert torch.equal(quantizer.encode(latents[::2, ::2]).codes, quantizer.encode(latents[::2, ::2].clone()).codes)
    for wrong in (latents, latents[:, :6].float(), latents[0, :6]):
        with pytest.raises(ValueError, match="do not fit"):
            quantizer._search(wrong)


@pytest.mark.skipif(not TRITON or INTERPRETED, reason="Triton is not installed, or the interpreter runs already")
def test_the_kernel_in_tritons_interpreter_is_torch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "on_a_gpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.skipif(not TRITON or INTERPRETED, reason="Triton is not installed, or its interpreter takes the kernel")
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_kernel_compiles_without_a_gpu_and_fits_into_the_shared_memory_of_small_ones(capability):
    # given the widest latents that it takes
    import triton
    from triton.backends.compiler import GPUTarget

    from models.device.search_kernel import search_all_levels

    sizes = {"LEVELS": 6, "SIZE": 256, "DIMENSION": 128, "WIDTH": 128, "ROWS": ROWS, "BLOCK": BLOCK}
    constants = {**sizes, "SLACK": 1e-14, "LARGEST_REACH": 1e150}
    types = {"codes": "*i64", "count": "i32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "*fp64") for name in search_all_levels.arg_names}
    # when
    compiled = triton.compile(
        triton.compiler.ASTSource(search_all_levels, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS, "num_stages": STAGES},
    )
    # then
    assert compiled.metadata.shared <= 99 * 1024
    assert ".f64" in compiled.asm["ptx"]
    assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="the kernel runs")
def test_where_the_kernel_cannot_run_torch_searches_and_the_log_says_why(generator, caplog):
    # given codebooks on a processor, for which there is no kernel
    codebooks = codebooks_of((8, 8), 3, generator)
    with caplog.at_level(logging.WARNING):
        # when
        assert fused_search(codebooks, [search_table(codebook) for codebook in codebooks], torch.float64) is None
    # then
    assert "torch searches the codebooks on cpu" in caplog.text


@pytest.mark.parametrize(("size", "dimension"), [(4097, 2), (8, 129)])
def test_codebooks_too_large_for_the_kernel_are_left_to_torch(size, dimension, generator, caplog):
    codebooks = codebooks_of((size,), dimension, generator)
    with caplog.at_level(logging.WARNING):
        assert fused_search(codebooks, [search_table(codebook) for codebook in codebooks], torch.float64) is None
    assert "up to 4096 codewords of 128 numbers" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_search_that_errs_is_left_out(dtype, generator):
    # given torch's own search in place of the kernel
    codebooks = codebooks_of((64, 30), 7, generator)
    quantizer = ResidualQuantizer((64, 30), 7).to(dtype).requires_grad_(requires_grad=False)
    for own, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        own.copy_(codebook)

    def search(latents: Tensor) -> Found:
        codes, margins, residuals = quantizer._quantize(latents)
        margin = margins.amin(dim=1).double()
        error = residuals[:, -1].square().sum(dim=1).double()
        return Found(codes, margin, error, margin.isnan().nonzero().flatten(), margins, residuals)

    # then it is taken
    _check(search, codebooks, dtype)
    # and not with a code too high, a margin too wide, everything in doubt, or nothing, not even what is no number
    errs = {
        "other codewords": lambda found: found._replace(codes=(found.codes + 1) % 30),
        "larger margins": lambda found: found._replace(margins=found.margins * 1.1),
        "in doubt": lambda found: found._replace(doubtful=torch.arange(len(found.codes))),
        "in doubt of": lambda found: found._replace(doubtful=found.doubtful[:0]),
    }
    for why, err in errs.items():
        with pytest.raises(ValueError, match=why):
            _check(lambda latents, err=err: err(search(latents)), codebooks, dtype)


def test_codes_in_brief_with_a_margin_that_is_no_number_are_found_by_the_canonical_path(generator):
    # given a search on a device: doubtful rows are told by their margin alone, and have some other code
    from models import DEFAULT_CHECKPOINT, Precision, load

    tokenizer = load(DEFAULT_CHECKPOINT)
    embeddings = torch.randn(6, 384, generator=generator)
    expected = tokenizer.encode(embeddings)
    encode = tokenizer._quantizer.encode
    in_doubt = torch.tensor([False, True, False, False, False, True])

    def doubting(latents: Tensor) -> Codes:
        codes, margin, error = encode(latents)
        rows = in_doubt if len(latents) == 6 else torch.ones(len(latents), dtype=torch.bool)
        return Codes(codes.where(~rows[:, None], 0), margin.where(~rows, torch.nan), error)

    tokenizer._quantizer.encode = doubting
    # when
    encoding = tokenizer.encode(embeddings)
    # then
    assert torch.equal(encoding.codes, expected.codes)
    assert (encoding.precision[in_doubt] == Precision.CANONICAL).all()
    assert torch.allclose(encoding.margin, expected.margin, atol=1e-6)
