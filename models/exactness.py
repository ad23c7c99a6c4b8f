"""Calibration of the fast paths: by how much their latents differ from canonical ones, and the bounds drawn from it.

A row whose margin is within a path's bound goes on to a more exact one (P4). Two kinds of bound:

- float32 and float64 err so little that a bound far on the safe side costs nothing: the largest norm of an error that
  was seen, times a safety factor that leaves room for other processors, batch shapes and texts. A latent error cannot
  change a code while its norm is below the margin, whatever its direction.
- bfloat16 errs ten thousand times as much, int16 a thousand times, and a bound by the norm would leave most rows in
  doubt. But an error moves a margin only by its part along the one direction to the plane, about the norm over the root
  of d. That part is what is measured: by how much each level's margin differs between the paths. The bound is eight
  times its root mean square, or twice the largest seen, whichever is more. What was seen is many thousand roundings
  added up, but not quite normal: some texts (long ones, soups of words, scripts the encoder hardly knows) err half as
  much again as most, so that of ten thousand texts one is seven times the root mean square off.

Manifests hold the bounds of the machine that froze; `self_test` measures on the machine that serves.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.errors import CheckpointError
from models.ladder import ErrorBounds
from models.precision import require_full_precision
from models.text_encoder import CANARY_TEXTS, WordPieces
from models.tokenizer import Tokenizer, TokenizerParts

SAFETY_FACTOR = 32.0
SAMPLE_TEXTS = 96

# Of the part of bfloat16's error that moves a margin: standard deviations, and the share of the largest one seen.
DEVIATIONS = 8.0
LARGEST = 2.0

# Batch size and order of the texts: mixed lengths differ much, sorted ones little.
PASSES = ((1, "mixed"), (3, "mixed"), (7, "sorted"), (32, "mixed"), (96, "mixed"), (96, "sorted"))

# No bound falls below this share of the latents' root mean square, whatever was seen here.
TEXT_FLOOR = 1e-5
EMBEDDING_FLOOR = 1e-10
EMBEDDING_FLOAT32_FLOOR = 1e-6

# bfloat16 costs four fifths to five sixths of the compiled float32, measured on one thread: with more rows to compute
# again than this it saves next to nothing.
PAYING_SHARE = 0.15

# float16 on a GPU is expected to cost an eighth of float32 without TF32; not measured yet.
FLOAT16_PAYING_SHARE = 0.5

# int16 costs six tenths of the compiled float32. It is the first path wherever it can be, and errs so little that its
# bound may be half as much again.
INT16_PAYING_SHARE = 0.25
INT16_ROOM = 1.5

# Of the self-test: lengths of its texts in words (float64 alone is slow), and how many it has where bfloat16 is tested.
TEST_LENGTHS = (1, 3, 6, 10, 16, 25, 40, 80)
TEST_PASSES = ((1, "mixed"), (3, "sorted"), (10, "mixed"))
BFLOAT16_TEST_TEXTS = 64  # of words, and half as many of letters
TEST_EMBEDDINGS = 32
TEST_DISTANCES = (1 / 8, 1.0, 8.0, 64.0)  # of embeddings from the network's centre, a quarter of them at each
TEST_BATCHES = (1, 7, 512)  # of embeddings: few rows, an odd number and many take kernels of their own
_WORDS = """
stainless steel kettle cordless 1.7 l kitchen > appliances wireless mouse 2.4 GHz black anti-dandruff shampoo with tea
tree oil, 12 oz (pack of 2) men's running shoes size 10.5 red vintage nitrile gloves powder-free medium 100/box
Crème brûlée torch USB-C cable for iPhone garden hose 50 ft. paperback the history of jazz ceramic mug dishwasher safe
""".split()  # noqa: SIM905 - so that it reads
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "0123456789.-/",
    "!#$%&()*+,:;<=>?@[]^_{|}~",
    "абвгдежзийклмнопрстуфхцчшщыьэюя",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "あいうえおかきくけこさしすせそ無線電子楽器食品",
    "🎧🎁👟💄📚",
)


class Calibration(NamedTuple):
    """Bounds, and how they came about (for the manifest)."""

    bounds: ErrorBounds
    notes: dict[str, Any]


class MovedMargins(NamedTuple):
    """By how much half precision moves the margins of texts.

    Attributes:
        root_mean_square: Over texts and levels.
        largest: Of any text at any level.
        margins: (B,) float64, each text's smallest margin in float32.
    """

    root_mean_square: float
    largest: float
    margins: Tensor

    @property
    def bound(self) -> float:
        """What it may move a margin by."""
        return max(DEVIATIONS * self.root_mean_square, LARGEST * self.largest)


def calibrate(parts: TokenizerParts, embeddings: Tensor, texts: Sequence[str]) -> Calibration:
    """Measure the fast paths of a tokenizer that is to be frozen.

    Args:
        parts: What is to be frozen.
        embeddings: (N, D) float32, a sample of the catalogue.
        texts: A sample of the catalogue's texts; empty where the tokenizer takes embeddings only.
    """
    tokenizer = Tokenizer("calibration", parts, ErrorBounds())
    scale = _latent_scale(tokenizer, embeddings)
    single_error, double_error = _embedding_errors(tokenizer, embeddings[:1024])
    notes: dict[str, Any] = {
        "safety_factor": SAFETY_FACTOR,
        "latent_root_mean_square": scale,
        "largest_error": {"text": 0.0, "embedding": double_error, "embedding_float32": single_error},
        "texts": len(texts[:SAMPLE_TEXTS]),
        "embeddings": len(embeddings),
        "canonical_below_float64": _below_float64(parts, texts),
        "torch": torch.__version__,
    }
    bounds = ErrorBounds(
        text=TEXT_FLOOR * scale,
        embedding=max(SAFETY_FACTOR * double_error, EMBEDDING_FLOOR * scale),
        embedding_float32=max(SAFETY_FACTOR * single_error, EMBEDDING_FLOAT32_FLOOR * scale),
    )
    margins, sizes = tokenizer.encode(embeddings).margin, tokenizer.sizes(embeddings)
    shares = {
        "embedding": _share(margins, bounds.embedding * sizes),
        "embedding_float32": _share(margins, (bounds.embedding_float32 or 0.0) * sizes),
    }
    if parts.text_encoder is not None and texts:
        pieces = parts.text_encoder.split(texts[:SAMPLE_TEXTS])
        # Once for all passes: the canonical path is slow.
        errors = _text_errors(tokenizer, pieces, tokenizer.canonical_latents(pieces), PASSES)
        moved = _moved_margins(tokenizer, pieces)
        bounds = replace(bounds, text=max(SAFETY_FACTOR * max(errors.values()), bounds.text))
        # Nothing moves where there is one codeword, and a bound is above 0.
        bounds = replace(bounds, text_bfloat16=max(moved.bound, bounds.text))
        shares["text_bfloat16"] = _share(margins, bounds.text_bfloat16 or 0.0)
        notes["largest_error"]["text"] = max(errors.values())
        notes["text_errors_by_batch"] = errors
        notes["bfloat16_moves_margins_by"] = {"root_mean_square": moved.root_mean_square, "largest": moved.largest}
    shares["text"] = _share(margins, bounds.text)
    return Calibration(bounds, {**notes, "recomputed_share": shares})


def self_test(
    tokenizer: Tokenizer,
    *,
    bfloat16: bool = False,
    float16_share: float | None = None,
    int16_share: float | None = None,
) -> ErrorBounds:
    """The bounds that the fast paths need on this machine, with these libraries and this number of threads.

    Made-up texts of many lengths run alone and in batches, with one thread and with all.

    Args:
        tokenizer: On the device it is to work on.
        bfloat16: Whether that path is tested too.
        float16_share: Whether the path of texts in float16 is: it is taken where at most this share of the test's texts
            would be computed again.
        int16_share: The same of texts with products in int16, where the text encoder has them.

    Returns:
        At least the tokenizer's own bounds; a path that these do not have is bounded by what was seen.

    Raises:
        CheckpointError: Float32 arithmetic is lowered for the whole process, or the search finds other codewords than
            distances by differences do.
    """
    require_full_precision()
    bounds = tokenizer.bounds
    floor = EMBEDDING_FLOAT32_FLOOR * tokenizer.scale
    embeddings = _test_embeddings(tokenizer)
    _check_search(tokenizer, tokenizer.latents(embeddings))
    single_error, double_error = _embedding_errors(tokenizer, embeddings)
    widened = replace(
        bounds,
        embedding=max(bounds.embedding, SAFETY_FACTOR * double_error),
        embedding_float32=max(bounds.embedding_float32 or floor, SAFETY_FACTOR * single_error),
        text_bfloat16=None,
        text_float16=None,
        text_int16=None,
        text_float64=None,
    )
    if not tokenizer.takes_text:
        return widened
    pieces = tokenizer.split([*CANARY_TEXTS, *_test_texts(TEST_LENGTHS)])
    with _threads(1):
        canonical = tokenizer.canonical_latents(pieces)
        errors = [*_text_errors(tokenizer, pieces, canonical, TEST_PASSES).values()]
    if torch.get_num_threads() > 1:
        errors += _text_errors(tokenizer, pieces, canonical, TEST_PASSES).values()
    widened = replace(widened, text=max(bounds.text, SAFETY_FACTOR * max(errors)))
    if tokenizer.text_encoder is not None and tokenizer.text_encoder.has_float64:
        double = _text_errors(tokenizer, pieces, canonical, TEST_PASSES, torch.float64)
        floor = EMBEDDING_FLOOR * tokenizer.scale
        widened = replace(widened, text_float64=max(floor, SAFETY_FACTOR * max(double.values())))
    if tokenizer.text_encoder is None or not tokenizer.text_encoder.has_int16:
        int16_share = None
    if not bfloat16 and float16_share is None and int16_share is None:
        return widened
    texts = tokenizer.split(_test_texts(TEST_LENGTHS * (BFLOAT16_TEST_TEXTS // 8)) + _strange_texts(TEST_LENGTHS[::2]))
    if bfloat16:
        moved = _moved_margins(tokenizer, texts)
        widened = replace(widened, text_bfloat16=max(bounds.text_bfloat16 or 0.0, moved.bound))
    if float16_share is not None:
        # On a GPU small batches take a way of their own.
        sizes = (32,) if tokenizer.device.type == "cpu" else (32, 4, 1)
        widened = replace(
            widened, text_float16=_paying_bound(tokenizer, texts, torch.float16, float16_share, sizes=sizes)
        )
    if int16_share is not None:
        bound = _paying_bound(tokenizer, texts, torch.int16, int16_share, room=INT16_ROOM)
        widened = replace(widened, text_int16=bound)
    return widened


def _paying_bound(
    tokenizer: Tokenizer,
    texts: Sequence[WordPieces],
    dtype: torch.dtype,
    share: float,
    *,
    sizes: Sequence[int] = (32,),
    room: float = 1.0,
) -> float | None:
    """The bound of a path, with room; None where it leaves more than this share of the texts to be computed again.

    What overflows has no bound: the path is not taken.
    """
    batches = [_moved_margins(tokenizer, texts, dtype, size) for size in sizes]
    if not all(math.isfinite(moved.bound) for moved in batches):
        return None
    bound = max(tokenizer.bounds.text, *(room * moved.bound for moved in batches))
    return bound if _share(batches[0].margins, bound) <= share else None


def _check_search(tokenizer: Tokenizer, latents: Tensor) -> None:
    """Raise CheckpointError if the search, compiled or not, finds other codes of latents (B, d) than the exact form."""
    found, exact = tokenizer.quantize(latents), tokenizer.quantize(latents, exact=True)
    certain = exact.margins.amin(dim=1) > EMBEDDING_FLOOR * (tokenizer.scale + latents.norm(dim=1))
    if not torch.equal(found.codes[certain], exact.codes[certain]):
        msg = f"the search for the nearest codewords ({tokenizer.search}) errs on this machine"
        raise CheckpointError(msg)


def _share(margins: Tensor, bound: Tensor | float) -> float:
    """The share of rows with a margin within a bound."""
    return float((margins <= bound).double().mean())


def _below_float64(parts: TokenizerParts, texts: Sequence[str]) -> list[str]:
    """Operations of the text encoder's canonical path that are not float64; none, for most."""
    if parts.text_encoder is None or not texts:
        return []
    (pieces,) = parts.text_encoder.split(texts[:1])
    return parts.text_encoder.operations_below_float64(pieces)


def _text_errors(
    tokenizer: Tokenizer,
    mixed: Sequence[WordPieces],
    canonical: Tensor,
    passes: Sequence[tuple[int, str]],
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Largest latent error in a precision of each pass over texts, a batch size and an order."""
    orders = {"mixed": list(range(len(mixed))), "sorted": sorted(range(len(mixed)), key=lambda row: len(mixed[row]))}
    errors: dict[str, float] = {}
    for size, order in passes:
        largest = 0.0
        for start in range(0, len(mixed), size):
            rows = orders[order][start : start + size]
            latents = tokenizer.text_latents([mixed[row] for row in rows], dtype)
            largest = max(largest, float((latents - canonical[rows]).norm(dim=1).max()))
        errors[f"{size} {order}"] = largest
    return errors


def _moved_margins(
    tokenizer: Tokenizer, pieces: Sequence[WordPieces], dtype: torch.dtype = torch.bfloat16, size: int = 32
) -> MovedMargins:
    """What half precision does to the margins of texts, held against float32, whose own error is nothing beside it."""
    moved, margins = [], []
    for start in range(0, len(pieces), size):
        batch = pieces[start : start + size]
        exact = tokenizer.quantize(tokenizer.text_latents(batch))
        fast = tokenizer.quantize(tokenizer.text_latents(batch, dtype))
        stays = (exact.codes == fast.codes).cumprod(dim=1).bool()
        # Where a code flips the latent passed the plane: both distances count. Levels behind it see other residuals.
        first_flip = ~stays & (~stays).cumsum(dim=1).eq(1)
        moved.append((exact.margins - fast.margins).abs()[stays & fast.margins.isfinite()])
        moved.append((exact.margins + fast.margins)[first_flip])
        margins.append(exact.margins.amin(dim=1))
    parts = torch.cat([*moved, torch.zeros(1)])  # there are no margins where there is one codeword
    return MovedMargins(float(parts.square().mean().sqrt()), float(parts.max()), torch.cat(margins))


def _embedding_errors(tokenizer: Tokenizer, embeddings: Tensor) -> tuple[float, float]:
    """Largest latent errors against float64 alone, as shares of an embedding's size: in float32, in a float64 batch."""
    canonical = torch.cat([tokenizer.latents(row[None], exact=True) for row in embeddings])
    sizes = tokenizer.sizes(embeddings)
    double = (tokenizer.latents(embeddings) - canonical).norm(dim=1) / sizes
    every = torch.arange(len(embeddings))
    some = every[:TEST_EMBEDDINGS].repeat(-(-max(TEST_BATCHES) // min(len(every), TEST_EMBEDDINGS)))
    batches = [
        every,
        *(some[start : start + size] for size in TEST_BATCHES for start in range(0, TEST_EMBEDDINGS, size)),
    ]
    single = [
        (tokenizer.fast_latents(embeddings[rows]) - canonical[rows]).norm(dim=1) / sizes[rows] for rows in batches
    ]
    return float(torch.cat(single).max()), float(double.max())


def _latent_scale(tokenizer: Tokenizer, embeddings: Tensor) -> float:
    latents = tokenizer.latents(embeddings)
    return float((latents - latents.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def _test_texts(lengths: Sequence[int]) -> list[str]:
    """Made-up texts of so many words, always the same."""
    draw = random.Random(1)  # noqa: S311 - no secret
    return [" ".join(draw.choices(_WORDS, k=length)) for length in lengths]


def _strange_texts(lengths: Sequence[int]) -> list[str]:
    """Texts of so many made-up words in each of several scripts, always the same."""
    draw = random.Random(2)  # noqa: S311 - no secret
    return [
        " ".join("".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(length))
        for letters in _ALPHABETS
        for length in lengths
    ]


def _test_embeddings(tokenizer: Tokenizer) -> Tensor:
    """Embeddings (N, D) float32 around the network's centre, at several distances from it."""
    source = torch.Generator().manual_seed(1)
    directions = functional.normalize(torch.randn(TEST_EMBEDDINGS, tokenizer.dimension, generator=source))
    distances = torch.tensor(TEST_DISTANCES).repeat(TEST_EMBEDDINGS // len(TEST_DISTANCES))
    return tokenizer.centre.float() + distances[:, None] * directions


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
