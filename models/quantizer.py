"""The contract every family of quantizers keeps, and the nearest codeword they all search.

A quantizer turns latents into codes and codes back into latents. It knows nothing of texts, items or suffixes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

# A residual that lies nearer to the plane between two codewords than this, as a share of its distance to them, is as
# near to the one as to the other: the lowest index wins. float64 rounds at 1e-16, so contrived ties (symmetric
# codebooks) resolve alike on every processor.
TIE_TOLERANCE = 1e-12

# Numbers that a measurement of all codewords by differences holds at once.
DIFFERENCES = 2**24

# Codewords up to which the distances between all of them are held: 128 MiB of them.
SPANS_HELD = 4096

# Bytes of scores that a processor searches at once: every pass over them after the first finds them in its cache.
CACHED_BYTES = 2**19


class NearestCodeword(NamedTuple):
    """The nearest codeword of each residual.

    Attributes:
        code: (B,) int64.
        margin: (B,) float, the residual's distance to the nearest plane midway between the chosen codeword and
            another, `min over j of (d_j - d_1) / (2 |c_1 - c_j|)` with squared distances; that plane need not be the
            second-nearest codeword's. A latent error of norm e cannot change the code while the margin exceeds e.
            Codewords equal to the chosen one leave no doubt (the lowest index wins) and are not counted; infinite
            where there is no other.
    """

    code: Tensor
    margin: Tensor


class Ranking(NamedTuple):
    """The nearest codewords of each residual, in order.

    Attributes:
        codes: (B, n) int64, the nearest first; of equally near ones the lowest index first. A row that has fewer to
            choose from than others repeats its last one.
        margin: (B,) float, the residual's distance to the nearest plane midway between two codewords of which one
            follows the other, or between the last one and any that is left out; 0 where such two are equal. A latent
            error of norm e changes neither which these are nor their order while the margin exceeds e.
    """

    codes: Tensor
    margin: Tensor


class SearchTable(NamedTuple):
    """What the search needs of a codebook (K, d), whatever the residuals.

    Attributes:
        centre: (d,), the mean of the codewords.
        codewords: (K, d), less the centre.
        norms: (K,), squared; infinite for a codeword that equals one before it, so that it is never chosen.
        radius: (), the largest norm.
        inverse_spans: (K, K), of each two codewords the inverse of twice their distance; minus infinity on the
            diagonal, which leaves the chosen codeword out of its own margin. None of more than `SPANS_HELD` codewords:
            each residual's row is computed when it is wanted.
        places: (K,) int32, 0 to K - 1.
    """

    centre: Tensor
    codewords: Tensor
    norms: Tensor
    radius: Tensor
    inverse_spans: Tensor | None
    places: Tensor


class Quantization(NamedTuple):
    """What a quantizer makes of a batch of latents.

    Attributes:
        codes: (B, L) int64.
        margins: (B, L) float, see `NearestCodeword.margin`.
        residuals: (B, L + 1, d) float; `[:, l]` is what level l receives, `[:, L]` what no level took. The gradient
            reaches the latents through every level (codewords are subtracted detached).
    """

    codes: Tensor
    margins: Tensor
    residuals: Tensor


class Codes(NamedTuple):
    """What most callers want of a quantization.

    Attributes:
        codes: (B, L) int64.
        margin: (B,) float, the smallest over the levels.
        error: (B,) float, the squared norm of the residual that no level took.
    """

    codes: Tensor
    margin: Tensor
    error: Tensor

    @classmethod
    def of(cls, quantization: Quantization) -> Codes:
        """Those of a quantization."""
        codes, margins, residuals = quantization
        return cls(codes, margins.amin(dim=1), residuals[:, -1].square().sum(dim=1))


class Quantizer(nn.Module, ABC):
    """latents (B, d) -> codes (B, L) -> latents (B, d)."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l for each level, coarse to fine."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """d, the width of a latent."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Root mean square of the first level's codewords: the size of a usual latent."""

    @property
    def search(self) -> str:
        """What looks for the nearest codewords, in words for a person."""
        return "torch"

    @abstractmethod
    def prepare(self) -> None:
        """Compute once what the search needs of the codebooks; they must not change, nor move, from here on."""

    @abstractmethod
    def quantize(self, latents: Tensor, *, exact: bool = False) -> Quantization:
        """Codes of each latent.

        Args:
            latents: (B, d) float, finite.
            exact: Compute every distance by differences and settle ties by `TIE_TOLERANCE`; slower, the canonical
                path's choice.
        """

    def encode(self, latents: Tensor) -> Codes:
        """Codes of each latent, in brief; as `quantize` in its fast form.

        On a device a margin may be no number: that row is in doubt, and its codes are to be found by `quantize`.

        Args:
            latents: (B, d) float, finite.
        """
        return Codes.of(self.quantize(latents))

    def rank(self, quantization: Quantization, count: int, *, exact: bool = False) -> Ranking:  # noqa: ARG002
        """What the last level could say in place of its code, the nearest first: alternatives for a full group.

        Optional: a family that does not rank keeps this, which knows the chosen codes alone. One that does takes
        float64, as only then its margins can be held against a tokenizer's bounds.

        Args:
            quantization: Of B latents.
            count: n, how many codes at most, with the chosen one, which is the first.
            exact: As in `quantize`.
        """
        codes = quantization.codes[:, -1:]
        return Ranking(codes, torch.full_like(quantization.margins[:, -1], torch.inf))

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The quantized latent of codes (B, L) int64, shape (B, d).

        Raises:
            ValueError: The shape is wrong or a code is out of range.
        """

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes is (B, L) int64 within the codebooks."""
        sizes = torch.tensor(self.codebook_sizes, device=codes.device)
        if codes.ndim != 2 or codes.shape[1] != len(sizes):
            msg = f"codes have shape {tuple(codes.shape)}, expected (B, {len(sizes)})"
            raise ValueError(msg)
        if codes.dtype != torch.int64:
            msg = f"codes have dtype {codes.dtype}, expected torch.int64"
            raise ValueError(msg)
        if bool(((codes < 0) | (codes >= sizes)).any()):
            msg = f"a code is outside its codebook; codebook sizes are {self.codebook_sizes}"
            raise ValueError(msg)


def search_table(codebook: Tensor) -> SearchTable:
    """The table of a codebook (K, d)."""
    centre = codebook.mean(dim=0)
    codewords = codebook - centre
    norms = codewords.square().sum(dim=1)
    places = torch.arange(len(codebook), device=codebook.device, dtype=torch.int32)
    inverse_spans = _inverse_spans(codewords, places.long()) if len(codebook) <= SPANS_HELD else None
    _, group = codebook.unique(dim=0, return_inverse=True)
    first = places.new_full((len(codebook),), len(codebook)).scatter_reduce(0, group, places, "amin")
    searched = norms.masked_fill(first[group] < places, torch.inf)
    return SearchTable(centre, codewords, searched, norms.amax().sqrt(), inverse_spans, places)


def _inverse_spans(codewords: Tensor, chosen: Tensor) -> Tensor:
    """Rows (n, K) of `SearchTable.inverse_spans`, of the chosen (n,) among codewords (K, d)."""
    spans = 2 * torch.cdist(codewords[chosen], codewords, compute_mode="donot_use_mm_for_euclid_dist")
    return spans.reciprocal_().scatter_(1, chosen[:, None], -torch.inf)


def nearest_codeword(
    residuals: Tensor, codebook: Tensor, *, exact: bool = False, table: SearchTable | None = None
) -> NearestCodeword:
    """The nearest codeword by Euclidean distance; ties go to the lowest index.

    The fast form expands the square around the codebook's mean (uncentred, `|x|^2 + |c|^2 - 2xc` loses its digits to
    the offset). What it may round off is taken from every margin, and a row that is left with none is computed in the
    exact form.

    Args:
        residuals: (B, d) float.
        codebook: (K, d), same dtype and device.
        exact: Measure all K codewords by differences.
        table: `search_table(codebook)`, where it is at hand.

    Raises:
        ValueError: The shapes do not fit.
    """
    if residuals.ndim != 2 or codebook.ndim != 2 or residuals.shape[1] != codebook.shape[1]:
        msg = f"residuals {tuple(residuals.shape)} do not fit the codebook {tuple(codebook.shape)}"
        raise ValueError(msg)
    if exact:
        return _by_differences(residuals, codebook)
    code, margin = _by_expansion_in_parts(residuals, table or search_table(codebook))
    doubtful = (~(margin > 0)).nonzero().flatten()
    if len(doubtful):
        code[doubtful], margin[doubtful] = _by_differences(residuals[doubtful], codebook)
    return NearestCodeword(code, margin)


def nearest_candidate(residuals: Tensor, candidates: Tensor, absent: Tensor | None = None) -> NearestCodeword:
    """The nearest of each residual's own candidates, all distances and planes by differences; ties to the lowest index.

    Args:
        residuals: (B, d) float.
        candidates: (B, K, d), same dtype and device.
        absent: (B, K) bool, candidates that fill up a row and cannot be chosen; never all of a row. None: all count.
    """
    row = torch.arange(len(residuals), device=residuals.device)

    def present(values: Tensor) -> Tensor:
        return values if absent is None else values.masked_fill(absent, torch.inf)

    nearest = present((residuals[:, None] - candidates).square().sum(dim=2)).argmin(dim=1)
    # Of a residual much longer than the codewords the squares swallow what parts them; this does not.
    nearest = present(_distance_differences(residuals, candidates[row, nearest], candidates)).argmin(dim=1)
    chosen = candidates[row, nearest]
    offsets = present(_plane_distances(residuals, chosen, candidates))
    equal = (chosen[:, None] == candidates).all(dim=2)
    equal = equal if absent is None else equal & ~absent
    distance = (residuals - chosen).norm(dim=1, keepdim=True)
    first = (equal | (offsets <= TIE_TOLERANCE * distance)).int().argmax(dim=1)
    planes = present(_plane_distances(residuals, candidates[row, first], candidates))
    return NearestCodeword(first, planes.amin(dim=1).clamp_min(0))


def rank_codewords(
    residuals: Tensor, codebook: Tensor, count: int, nearest: Tensor | None = None, *, exact: bool = False
) -> Ranking:
    """The nearest codewords in order of their Euclidean distance; ties go to the lowest index.

    Args:
        residuals: (B, d) float64.
        codebook: (K, d), same dtype and device.
        count: How many at most.
        nearest: (B,) int64, the nearest of each, where it is at hand.
        exact: Find each as the nearest of those that are left, as `nearest_codeword` does in its exact form.
    """
    count = min(count, len(codebook))
    ranked = []
    nearest = nearest_codeword(residuals, codebook).code if nearest is None else nearest
    at_once = max(1, DIFFERENCES // codebook.numel())
    for rows, chosen in zip(residuals.split(at_once), nearest.split(at_once), strict=True):
        if exact:
            codes = torch.stack([_rank_exactly(row, codebook, count) for row in rows.split(1)])
        else:
            codes = _distance_differences(rows, codebook[chosen], codebook).argsort(dim=1, stable=True)[:, :count]
        ranked.append(Ranking(codes, _order_margin(rows, codebook, codes)))
    return Ranking(torch.cat([part.codes for part in ranked]), torch.cat([part.margin for part in ranked]))


def _rank_exactly(residual: Tensor, codebook: Tensor, count: int) -> Tensor:
    """The nearest codewords (count,) of one residual (1, d), one after the other."""
    left = torch.arange(len(codebook), device=codebook.device)
    codes = []
    for _ in range(count):
        nearest = _by_differences(residual, codebook[left]).code
        codes.append(left[nearest])
        left = torch.cat([left[: int(nearest)], left[int(nearest) + 1 :]])
    return torch.cat(codes)


def _order_margin(residuals: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """The margin (B,) of ranked codes (B, n), see `Ranking.margin`."""
    before, after = codebook[codes[:, :-1]], codebook[codes[:, 1:]]
    offsets = (residuals[:, None] - before) + (residuals[:, None] - after)
    gaps = (before - after).norm(dim=2)
    following = (((before - after) * offsets).sum(dim=2) / gaps / 2).masked_fill(gaps == 0, 0)
    last = codebook[codes[:, -1]]
    left_out = _plane_distances(residuals, last, codebook)
    left_out = left_out.masked_fill((last[:, None] == codebook).all(dim=2), 0).scatter(1, codes, torch.inf)
    return torch.cat([following, left_out], dim=1).amin(dim=1).clamp_min(0)


def _by_expansion_in_parts(residuals: Tensor, table: SearchTable) -> NearestCodeword:
    """`_by_expansion`, on a processor in parts that its cache holds."""
    rows = max(1, CACHED_BYTES // (len(table.codewords) * residuals.element_size()))
    if residuals.device.type != "cpu" or len(residuals) <= rows:
        return _by_expansion(residuals, table)
    parts = [_by_expansion(part, table) for part in residuals.split(rows)]
    return NearestCodeword(torch.cat([part.code for part in parts]), torch.cat([part.margin for part in parts]))


def _by_expansion(residuals: Tensor, table: SearchTable) -> NearestCodeword:
    """The nearest codeword by the expanded square; a margin of 0 or less says that rounding leaves it in doubt."""
    points = residuals - table.centre
    # Squared distances less the term every codeword shares.
    scores = torch.addmm(table.norms, points, table.codewords.T, alpha=-2)
    gaps = scores.sub_(scores.amin(dim=1, keepdim=True))
    # The place of the smallest, several times as fast as argmin: the bits of 0.0 are 0, those of any gap that could
    # matter a large integer. What is no number at all is in doubt by its margin.
    keys = gaps.float().view(torch.int32) | table.places
    code = keys.amin(dim=1).clamp_(0, len(table.places) - 1).long()
    # Rounding of two scores: each is a sum of d products and of what surrounds it.
    reach = points.norm(dim=1, keepdim=True) + table.radius
    slack = 2 * (points.shape[1] + 8) * torch.finfo(scores.dtype).eps * reach.square()
    held = table.inverse_spans
    inverse_spans = _inverse_spans(table.codewords, code) if held is None else held.index_select(0, code)
    margins = gaps.sub_(slack).mul_(inverse_spans)
    return NearestCodeword(code, margins.amin(dim=1))


def _by_differences(residuals: Tensor, codebook: Tensor) -> NearestCodeword:
    """All K distances and planes by differences, some rows at a time."""
    parts = [
        nearest_candidate(rows, codebook.expand(len(rows), -1, -1))
        for rows in residuals.split(max(1, DIFFERENCES // codebook.numel()))
    ]
    return NearestCodeword(torch.cat([part.code for part in parts]), torch.cat([part.margin for part in parts]))


def _distance_differences(residuals: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """d_j - d_1 (B, K), squared distances of residuals (B, d) to the others less those to the chosen (B, d).

    The others are codewords (K, d), or each row's own (B, K, d).

    As (c_1 - c_j)(2x - c_1 - c_j), which keeps its digits however close the codewords are.
    """
    offsets = (residuals - chosen)[:, None] + (residuals[:, None] - others)
    differences: Tensor = ((chosen[:, None] - others) * offsets).sum(dim=2)
    return differences


def _plane_distances(residuals: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """Signed distances (B, K) of residuals (B, d) to the planes between the chosen codewords (B, d) and all (K, d)."""
    gaps = (chosen[:, None] - others).norm(dim=2)
    distances: Tensor = _distance_differences(residuals, chosen, others) / gaps / 2
    return distances.masked_fill(gaps == 0, torch.inf)
