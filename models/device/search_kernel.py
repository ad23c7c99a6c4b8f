"""The kernel of `models.device.search`, in Triton: all levels of a residual quantizer's search in one launch.

A program takes ROWS latents through all levels; what a level leaves over never leaves the program. Each level goes over
its codewords twice: for the nearest one, then for the planes between that one and the others.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores_of(points, codewords, norms, places, columns, WIDTH: tl.constexpr):
    """Squared distances (ROWS, BLOCK) of points to the codewords at these places, less the term that all share."""
    block = tl.load(codewords + places[None, :] * WIDTH + columns[:, None])
    return tl.load(norms + places)[None, :] - 2 * tl.dot(points, block, input_precision="ieee", out_dtype=tl.float64)


# A launch of another number of rows is no other kernel.
@triton.jit(do_not_specialize=["count"])
def search_all_levels(
    latents,  # (count, DIMENSION) float32 or float64
    codebooks,  # (LEVELS, SIZE, WIDTH) float64, as are all tables that follow
    codewords,  # (LEVELS, SIZE, WIDTH), less their level's centre
    centres,  # (LEVELS, WIDTH)
    norms,  # (LEVELS, SIZE), squared; infinite for what is never to be chosen
    radii,  # (LEVELS,)
    inverse_spans,  # (LEVELS, SIZE, SIZE)
    codes,  # (count, LEVELS) int64, to be written
    margins,  # (count, LEVELS) float64, to be written
    margin,  # (count,) float64, to be written: the smallest, NaN where a row is in doubt
    error,  # (count,) float64, to be written
    count,
    LEVELS: tl.constexpr,
    SIZE: tl.constexpr,  # a multiple of BLOCK
    DIMENSION: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two
    SLACK: tl.constexpr,  # what two scores may be off by, as a share of the squared reach
    LARGEST_REACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes and margins of latents at every level, and the squared norm of what no level took."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    present = rows < count
    given = present[:, None] & (columns < DIMENSION)[None, :]
    residuals = tl.load(latents + rows[:, None] * DIMENSION + columns[None, :], mask=given, other=0).to(tl.float64)
    smallest = tl.full([ROWS], float("inf"), tl.float64)
    for level in range(LEVELS):
        points = residuals - tl.load(centres + level * WIDTH + columns)[None, :]
        reach = tl.sqrt(tl.sum(points * points, axis=1)) + tl.load(radii + level)
        # No number compares as true: a row that is none, or too large to be searched, is searched as if it were zero.
        searched = reach < LARGEST_REACH
        points, reach = tl.where(searched[:, None], points, 0), tl.where(searched, reach, 0)
        lowest = tl.full([ROWS], float("inf"), tl.float64)
        chosen = tl.zeros([ROWS], tl.int32)
        for start in range(0, SIZE, BLOCK):
            places = level * SIZE + start + tl.arange(0, BLOCK)
            scores = scores_of(points, codewords, norms, places, columns, WIDTH)
            least, place = tl.min(scores, axis=1, return_indices=True)
            chosen = tl.where(least < lowest, start + place, chosen)
            lowest = tl.minimum(lowest, least)
        nearest = level * SIZE + chosen
        # What both scores may be rounded by is taken from what parts them.
        lowest += SLACK * reach * reach
        nearest_plane = tl.full([ROWS], float("inf"), tl.float64)
        for start in range(0, SIZE, BLOCK):
            places = level * SIZE + start + tl.arange(0, BLOCK)
            scores = scores_of(points, codewords, norms, places, columns, WIDTH)
            spans = tl.load(
                inverse_spans + nearest.to(tl.int64)[:, None] * SIZE + (start + tl.arange(0, BLOCK))[None, :]
            )
            planes = (scores - lowest[:, None]) * spans
            planes = tl.where(places[None, :] == nearest[:, None], float("inf"), planes)
            nearest_plane = tl.minimum(nearest_plane, tl.min(planes, axis=1))
        nearest_plane = tl.where(searched, nearest_plane, -1)
        smallest = tl.minimum(smallest, nearest_plane)
        tl.store(codes + rows * LEVELS + level, chosen.to(tl.int64), mask=present)
        tl.store(margins + rows * LEVELS + level, nearest_plane, mask=present)
        residuals -= tl.load(codebooks + nearest[:, None] * WIDTH + columns[None, :])
    tl.store(margin + rows, tl.where(smallest > 0, smallest, float("nan")), mask=present)
    tl.store(error + rows, tl.sum(residuals * residuals, axis=1), mask=present)
