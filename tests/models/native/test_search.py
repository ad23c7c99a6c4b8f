"""The compiled search beside the one in torch, which is its oracle; compiled afresh, as an installation does it."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from models.errors import CheckpointError
from models.exactness import self_test
from models.ladder import ErrorBounds
from models.native.libraries import open_library
from models.native.niceness import send_behind
from models.native.search import ANY_PROCESSOR, FASTEST, INTERFACE, CompiledSearch
from models.quantizer import Codes, Quantization, search_table
from models.residual import ResidualQuantizer
from models.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
KINDS = range(ANY_PROCESSOR, FASTEST + 1)

pytest.importorskip("setuptools")
if shutil.which("cc") is None:
    pytest.skip("there is no C compiler", allow_module_level=True)


def build(target: Path, **environment: str) -> list[Path]:
    """What an installation compiles, from a copy of the sources."""
    shutil.copytree(ROOT / "models", target / "models", ignore=shutil.ignore_patterns("checkpoints", "*.so", "__py*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    (target / "service").mkdir()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=target, env={"PATH": "/usr/bin:/bin", **environment}, check=True, capture_output=True)
    return list((target / "models" / "native").glob("_residual_argmin*.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    (path,) = build(tmp_path_factory.mktemp("compiled"))
    return open_library(path, INTERFACE)


@pytest.fixture
def searching(library):
    """A quantizer with its codebooks drawn anew, that searches by the library."""

    def make(sizes, dimension, *, kind=FASTEST, dtype=torch.float64, scale=1.0, seed=1) -> ResidualQuantizer:
        source = torch.Generator().manual_seed(seed)
        quantizer = ResidualQuantizer(sizes, dimension).to(dtype).requires_grad_(requires_grad=False)
        for level, codebook in enumerate(quantizer.codebooks):
            codebook.copy_(scale * torch.randn(codebook.shape, generator=source, dtype=dtype) / 2**level)
        return search_by(quantizer, library, kind)

    return make


def search_by(quantizer, library, kind=FASTEST) -> ResidualQuantizer:
    quantizer.prepare()
    exact = [codebook.double() for codebook in quantizer.codebooks]
    quantizer._search = CompiledSearch(
        library, exact, [search_table(one) for one in exact], quantizer.codebooks[0].dtype, kind
    )
    return quantizer


def reference(quantizer, latents) -> Quantization:
    """All distances by differences, in float64."""
    double = ResidualQuantizer(quantizer.codebook_sizes, quantizer.dimension).double()
    double.load_state_dict(quantizer.state_dict())
    return double.quantize(latents.double(), exact=True)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_margins_and_residuals_are_those_of_float64_by_differences(searching, kind, dtype, generator):
    # given shapes that fill no vector, no tile and no block, and some that do
    draw = torch.Generator().manual_seed(kind)
    shapes = [torch.randint(low, high, (14,), generator=draw).tolist() for low, high in ((1, 130), (1, 301), (1, 9))]
    shapes = [*zip(*shapes, torch.randint(0, 71, (14,), generator=draw).tolist(), strict=True), (32, 256, 3, 200)]
    for dimension, size, levels, rows in shapes:
        sizes = [max(1, size - 7 * level) for level in range(levels)]
        quantizer = searching(sizes, dimension, kind=kind, dtype=dtype)
        latents = torch.randn(rows, dimension, generator=generator, dtype=dtype)
        # when
        found = quantizer._search(latents)
        # then
        exact = reference(quantizer, latents)
        assert not len(found.doubtful)
        assert torch.equal(found.codes, exact.codes)
        assert torch.allclose(found.margins.double(), exact.margins, rtol=1e-6, atol=1e-12)
        assert torch.allclose(found.residuals.double(), exact.residuals, rtol=1e-6, atol=1e-6)
        error = exact.residuals[:, -1].square().sum(dim=1)
        assert torch.allclose(found.error.double(), error, rtol=1e-9 if dtype == torch.float64 else 1e-6)
        assert {part.dtype for part in found[1:3] + found[4:]} == {dtype}


def test_a_row_comes_to_the_same_bits_alone_in_any_batch_on_any_threads_and_any_processor(searching, generator):
    # given
    quantizer = searching((256, 100, 37), 45)
    latents = torch.randn(6000, 45, generator=generator, dtype=torch.float64)

    # when
    def search(latents, by=quantizer) -> list[torch.Tensor]:
        found = by._search(latents)
        assert not len(found.doubtful)
        return [found.codes, found.margin, found.error, found.margins, found.residuals]

    whole = search(latents)
    alone = [torch.cat(part) for part in zip(*map(search, latents[:50].split(1)), strict=True)]
    # then
    assert equal(alone, [part[:50] for part in whole])
    assert equal([part.flip(0) for part in search(latents.flip(0))], whole)
    for kind in KINDS:
        assert equal(search(latents, searching((256, 100, 37), 45, kind=kind)), whole)
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert equal(search(latents), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_in_brief_are_those_of_the_whole_quantization(searching, dtype, generator):
    # given a latent that is a tie, and one that is no number
    quantizer = searching((64, 30), 7, dtype=dtype)
    latents = torch.randn(50, 7, generator=generator, dtype=dtype)
    latents[3], latents[9, 0] = quantizer.codebooks[0][:2].mean(dim=0), torch.nan
    # when
    brief, whole = quantizer.encode(latents), Codes.of(quantizer.quantize(latents))
    # then
    assert torch.equal(brief.codes, whole.codes)
    assert torch.equal(brief.margin.nan_to_num(-1), whole.margin.nan_to_num(-1))
    assert torch.allclose(brief.error, whole.error, rtol=1e-5 if dtype == torch.float32 else 1e-12, equal_nan=True)
    assert brief.margin.dtype == brief.error.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_ties_and_equal_codewords_go_to_the_lowest_index(library, kind):
    # given the corners of a cube, some of them twice, and latents on planes, axes, corners and in the middle
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    quantizer = ResidualQuantizer((12, 12), 3).double().requires_grad_(requires_grad=False)
    for level, codebook in enumerate(quantizer.codebooks):
        codebook.copy_(torch.cat([corners[5:6], corners, corners[2:5]]) / 3**level)
    search_by(quantizer, library, kind)
    latents = torch.cartesian_prod(*[torch.linspace(-2, 2, 9, dtype=torch.float64)] * 3)
    # when
    quantization = quantizer.quantize(latents)
    # then; most were left in doubt, and each is settled as the exact form does it
    exact = quantizer.quantize(latents, exact=True)
    assert len(quantizer._search(latents).doubtful) > len(latents) // 2
    assert torch.equal(quantization.codes, exact.codes)
    assert torch.allclose(quantization.margins, exact.margins, atol=1e-12)


def test_a_hair_from_a_plane_the_code_is_that_of_float64(searching, generator):
    # given latents nearer to a plane than float32 can tell
    quantizer = searching((256, 64), 32)
    codebook = quantizer.codebooks[0]
    first = torch.randint(256, (400,), generator=generator)
    second = torch.cdist(codebook, codebook).topk(2, largest=False).indices[first, 1]
    latents = (codebook[first] + codebook[second]) / 2
    latents += (codebook[second] - codebook[first]) * torch.logspace(-14, -5, 400, dtype=torch.float64)[:, None]
    # when
    found, exact = quantizer.quantize(latents), quantizer.quantize(latents, exact=True)
    # then
    assert torch.equal(found.codes, exact.codes)
    assert torch.allclose(found.margins, exact.margins, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_are_not_finite_or_too_large_end_as_in_torch_and_spare_their_neighbours(
    searching, dtype, generator
):
    # given
    quantizer = searching((64, 64), 5, dtype=dtype)
    latents = torch.randn(40, 5, generator=generator, dtype=dtype)
    clean = quantizer.quantize(latents)
    spoilt = latents.clone()
    spoilt[7, 2], spoilt[8, 0], spoilt[20, 4] = torch.nan, torch.inf, 1e30
    # when
    found, by_torch = quantizer.quantize(spoilt), quantizer._quantize(spoilt)
    # then
    for rows in ([7], [8], [20]):
        for part, other in zip(found, by_torch, strict=True):
            assert torch.allclose(part[rows].double(), other[rows].double(), equal_nan=True)
    others = [row for row in range(40) if row not in {7, 8, 20}]
    assert equal([part[others] for part in found], [part[others] for part in clean])


@pytest.mark.parametrize("scale", [1e-60, 1e-25, 1e-12, 1e15])
def test_codewords_of_any_size_are_searched(searching, scale, generator):
    quantizer = searching((40, 20), 6, scale=scale)
    latents = scale * torch.randn(60, 6, generator=generator, dtype=torch.float64)
    found, exact = quantizer.quantize(latents), quantizer.quantize(latents, exact=True)
    assert torch.equal(found.codes, exact.codes)
    assert torch.allclose(found.margins, exact.margins, rtol=1e-6, atol=0)


def test_latents_of_any_strides_are_searched(searching, generator):
    quantizer = searching((50, 50), 9)
    wide = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    assert equal(quantizer.quantize(wide.T[::2]), quantizer.quantize(wide.T[::2].contiguous()))


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("codewords", torch.zeros(11, 5, dtype=torch.float64)),
        ("centre", torch.zeros(6, dtype=torch.float64)),
        ("norms", torch.zeros(12, dtype=torch.float32)),
        ("inverse_spans", torch.zeros(12, 11, dtype=torch.float64)),
        ("inverse_spans", None),
    ],
)
def test_tables_that_are_not_the_codebooks_are_refused(library, part, wrong, generator):
    codebook = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    table = search_table(codebook)
    CompiledSearch(library, [codebook], [table])
    with pytest.raises(ValueError, match=r"codebook's table|spans"):
        CompiledSearch(library, [codebook], [table._replace(**{part: wrong})])


@pytest.mark.parametrize("latents", [torch.zeros(3, 6).double(), torch.zeros(5).double(), torch.zeros(3, 5)])
def test_latents_that_the_library_would_read_beyond_are_refused(searching, latents):
    search = searching((12,), 5)._search
    with pytest.raises(ValueError, match="do not fit this search"):
        search(latents)


def test_a_gradient_that_is_asked_for_comes_from_torch(searching, generator):
    quantizer = searching((16, 16), 4, dtype=torch.float32)
    latents = torch.randn(10, 4, generator=generator, requires_grad=True)
    quantizer.quantize(latents).residuals[:, -1].square().sum().backward()
    assert latents.grad is not None
    with torch.no_grad():
        assert not quantizer.quantize(latents).residuals.requires_grad


def test_an_installation_without_a_compiler_works(tmp_path, searching, generator):
    # given
    quantizer = searching((30, 20), 7)
    latents = torch.randn(25, 7, generator=generator, dtype=torch.float64)
    torch.save({"state": quantizer.state_dict(), "latents": latents}, tmp_path / "given")
    (tmp_path / "tree").mkdir()
    # when
    assert not build(tmp_path / "tree", CC="false")
    script = (
        "import torch; from models.residual import ResidualQuantizer;"
        "given = torch.load('../given', weights_only=True); quantizer = ResidualQuantizer((30, 20), 7).double();"
        "quantizer.load_state_dict(given['state']); quantizer.prepare(); assert quantizer._search is None;"
        "print(quantizer.quantize(given['latents']).codes.tolist())"
    )
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path / "tree", text=True)
    # then
    assert printed.strip() == str(quantizer.quantize(latents).codes.tolist())


def test_a_search_that_errs_on_this_machine_is_refused_at_the_start(library, make_parts):
    # given
    tokenizer = Tokenizer("some", make_parts(), ErrorBounds())
    search_by(tokenizer._quantizer, library)
    self_test(tokenizer)
    # when its tables are those of other codebooks
    others = [codebook.flip(0) for codebook in tokenizer._quantizer.codebooks]
    tokenizer._quantizer._search = CompiledSearch(library, others, [search_table(one) for one in others])
    # then
    with pytest.raises(CheckpointError, match=r"compiled.* errs on this machine"):
        self_test(tokenizer)


def test_threads_that_search_at_once_find_what_each_finds_alone(searching, generator):
    # given
    quantizer = searching((256, 128), 40)
    latents = [torch.randn(3000, 40, generator=generator, dtype=torch.float64) for _ in range(6)]
    alone = [quantizer._search(some).residuals for some in latents]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    # when
    behind = itertools.cycle([0, 5])
    try:
        with ThreadPoolExecutor(6, initializer=lambda: send_behind(next(behind))) as pool:
            for _ in range(5):
                together = [found.residuals for found in pool.map(quantizer._search, latents)]
                # then
                assert equal(together, alone)
    finally:
        torch.set_num_threads(before)


A_SEARCH = """
import sys
from pathlib import Path
import torch
from models.native.libraries import open_library
from models.native.search import INTERFACE, CompiledSearch
from models.quantizer import search_table

codebooks = [torch.randn(256, 48, dtype=torch.float64) for _ in range(6)]
search = CompiledSearch(open_library(Path(sys.argv[1]), INTERFACE), codebooks, [search_table(one) for one in codebooks])
"""

FORKING = """
import os
from models.native.niceness import send_behind
send_behind(int(sys.argv[2]))
latents = torch.randn(6000, 48, dtype=torch.float64)
torch.set_num_threads(3)
found = search(latents)
child = os.fork()
again = search(latents)
assert (again.margin.numpy() == found.margin.numpy()).all()  # torch's own threads do not come along
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""

ENDING = """
import threading, time
latents = torch.randn(300_000, 48, dtype=torch.float64)
torch.set_num_threads(1)
threading.Thread(target=search, args=(latents,), daemon=True).start()
time.sleep(0.2)
"""


@pytest.mark.parametrize(("what", "behind"), [(FORKING, 0), (FORKING, 5), (ENDING, 0)])
def test_a_process_may_fork_after_a_search_and_end_within_one(library, what, behind) -> None:
    command = [sys.executable, "-c", A_SEARCH + what, library._name, str(behind)]
    ended = subprocess.run(command, cwd=ROOT, check=False, timeout=60)

    assert ended.returncode == 0
