"""Hierarchical quantization: a code's codebook is that of the prefix before it, a path from the root to a leaf.

Each node has a codebook of its own, its children's centres; level l takes the child of the node reached so far that is
nearest to the latent itself (hierarchical k-means: Nister and Stewenius, vocabulary trees, CVPR 2006). A node whose
items are few has few children, so nodes are held flat, level by level, in compressed sparse rows: no child exists that
no item was in, and none of those can be chosen.

Why codes are exact: every level looks at the latent, not at a residual, so a latent error of norm e moves it by e in
front of every codebook. The margin of a level is the latent's distance to the nearest plane midway between the child
chosen and a sibling. While e is below the smallest margin on the path, the first choice stands, hence the second is
made among the same siblings and stands too, and so on to the leaf: planes of codebooks off the path do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.quantizer import (
    DIFFERENCES,
    NearestCodeword,
    Quantization,
    Quantizer,
    Ranking,
    SearchTable,
    nearest_candidate,
    nearest_codeword,
    rank_codewords,
    search_table,
)

# Rows of one node that are measured together in the fast form; more are several tiles.
TILE_ROWS = 64

# Numbers that the fast form holds of tiles at once: few enough to stay in the processor's cache.
TILE_NUMBERS = 2**20


class Tiles(NamedTuple):
    """Rows of n nodes, at most R of each, filled up to R and to K children.

    Attributes:
        rows: (n, R) int64, which rows; anything where absent.
        absent_rows: (n, R) bool.
        nodes: (n,) int64, of which node they are to find the nearest child.
        children: (n, K) int64, places of its children among the centres; anything where absent.
        absent_children: (n, K) bool.
    """

    rows: Tensor
    absent_rows: Tensor
    nodes: Tensor
    children: Tensor
    absent_children: Tensor


class TreeQuantizer(Quantizer):
    """L levels of nodes; the nodes of depth l are numbered level by level, siblings side by side.

    State, for each level l: `centres_l` (C_l, d) float, the centre of each node of depth l + 1, and `offsets_l`
    (C_{l-1} + 1,) int64: the children of node n of depth l are nodes `offsets_l[n]` up to `offsets_l[n + 1]` of the
    next depth, in the order of their codes; C_{-1} is 1, the root. A new tree is
    one path of zeros, until `grow` or a load.

    Args:
        codebook_sizes: K_l for each level: so many children a node has at most.
        dimension: d, the width of a latent.
    """

    def __init__(self, codebook_sizes: Sequence[int], dimension: int) -> None:
        super().__init__()
        if not codebook_sizes or min(codebook_sizes) < 1 or dimension < 1:
            msg = f"a quantizer needs levels with codewords; got sizes {tuple(codebook_sizes)} of dimension {dimension}"
            raise ValueError(msg)
        self._sizes = tuple(codebook_sizes)
        for level in range(len(self._sizes)):
            self.register_buffer(f"centres_{level}", torch.zeros(1, dimension))
            self.register_buffer(f"offsets_{level}", torch.tensor([0, 1]))
        self._table: SearchTable | None = None

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l for each level."""
        return self._sizes

    @property
    def dimension(self) -> int:
        """The width d of a latent."""
        return int(self.centres(0).shape[1])

    @property
    def scale(self) -> float:
        """See `Quantizer.scale`."""
        return float(self.centres(0).square().sum(dim=1).mean().sqrt())

    def centres(self, level: int) -> Tensor:
        """The centres (C_l, d) of the nodes that a level leads to."""
        return self.get_buffer(f"centres_{level}")

    def offsets(self, level: int) -> Tensor:
        """Where the children (C_{l-1} + 1,) of each node in front of a level begin."""
        return self.get_buffer(f"offsets_{level}")

    def grow(self, level: int, centres: Tensor, children: Tensor) -> None:
        """Give each node in front of a level its children.

        Args:
            level: From 0; levels are grown in order.
            centres: (C_l, d) float, siblings side by side.
            children: (C_{l-1},) int64, how many each node has; at least 1.

        Raises:
            ValueError: They do not fit the tree.
        """
        offsets = torch.cat([children.new_zeros(1), children.cumsum(0)])
        self._check_level(level, centres, offsets, len(self.centres(level - 1)) if level else 1)
        self._set_level(level, centres, offsets)

    def prepare(self) -> None:
        """See `Quantizer.prepare`."""
        self._table = search_table(self.centres(0))

    def quantize(self, latents: Tensor, *, exact: bool = False) -> Quantization:
        """See `Quantizer.quantize`; what a level receives is the latent less the centre of the node reached so far."""
        points = latents.detach()
        codes, margins, residuals = [], [], [latents]
        node = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        for level in range(len(self._sizes)):
            if level:
                nearest = self._nearest_child(points, level, node, exact=exact)
            else:  # everybody's codebook
                nearest = nearest_codeword(points, self.centres(0), exact=exact, table=self._table)
            codes.append(nearest.code)
            margins.append(nearest.margin)
            node = self.offsets(level)[node] + nearest.code
            residuals.append(latents - self.centres(level)[node])
        return Quantization(torch.stack(codes, 1), torch.stack(margins, 1), torch.stack(residuals, 1))

    def rank(self, quantization: Quantization, count: int, *, exact: bool = False) -> Ranking:
        """The leaves beside the one chosen, children of the same node, by their distance; see `Quantizer.rank`.

        A node has as many children as it has: a row with fewer than n = min(count, K_L) repeats its last one.
        """
        points, codes = quantization.residuals[:, 0].detach(), quantization.codes
        last = len(self._sizes) - 1
        offsets, node = self.offsets(last), self._node(codes[:, :-1])
        ranked = codes[:, -1:].repeat(1, min(count, self._sizes[last]))
        margin = torch.full_like(quantization.margins[:, -1], torch.inf)
        for parent in node.unique().tolist():
            rows = (node == parent).nonzero().flatten()
            leaves = self.centres(last)[offsets[parent] : offsets[parent + 1]]
            ranking = rank_codewords(points[rows], leaves, count, codes[rows, -1], exact=exact)
            places = torch.arange(ranked.shape[1], device=codes.device).clamp_max(ranking.codes.shape[1] - 1)
            ranked[rows], margin[rows] = ranking.codes[:, places], ranking.margin
        return Ranking(ranked, margin)

    def decode(self, codes: Tensor) -> Tensor:
        """The centres (B, d) of the leaves that paths (B, L) lead to.

        Raises:
            ValueError: The shape is wrong, a code is out of range, or a node has no such child.
        """
        self.check_codes(codes)
        return self.centres(len(self._sizes) - 1)[self._node(codes)]

    def _node(self, codes: Tensor) -> Tensor:
        """The node (B,) that paths (B, l) lead to, among those of depth l; the root where l is 0."""
        node = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        for level in range(codes.shape[1]):
            offsets = self.offsets(level)
            following = offsets[node] + codes[:, level]
            missing = following >= offsets[node + 1]
            if bool(missing.any()):
                path = codes[missing][0].tolist()
                msg = f"the codes {path} lead nowhere: there is no child {path[level]} at level {level + 1}"
                raise ValueError(msg)
            node = following
        return node

    def _nearest_child(self, points: Tensor, level: int, node: Tensor, *, exact: bool) -> NearestCodeword:
        """The nearest child of each point's (B, d) own node (B,); ties go to the lowest index.

        The fast form measures the rows of a node together and expands the square around the node's own centre, as
        `nearest_codeword` does around the mean of the codewords; what that may round off is taken from the margins. A
        row that is left with none is measured by differences, as all are in the exact form.
        """
        if exact or not len(points):
            return self._by_differences(points, level, node)
        code, margin = torch.zeros_like(node), torch.full_like(points[:, 0], torch.inf)
        for tiles in self._tiles(level, node):
            nearest = self._by_expansion(points, level, tiles)
            present = ~tiles.absent_rows
            rows = tiles.rows[present]
            code[rows], margin[rows] = nearest.code[present], nearest.margin[present]
        doubtful = (~(margin > 0)).nonzero().flatten()
        if len(doubtful):
            code[doubtful], margin[doubtful] = self._by_differences(points[doubtful], level, node[doubtful])
        return NearestCodeword(code, margin)

    def _tiles(self, level: int, node: Tensor) -> Iterator[Tiles]:
        """Every row whose node (B,) has a choice of children, with rows of that node, alike many tiles at a time."""
        offsets = self.offsets(level)
        rows = (offsets.diff()[node] > 1).nonzero().flatten()
        rows = rows[node[rows].argsort(stable=True)]
        sizes = node[rows].unique_consecutive(return_counts=True)[1]
        place = torch.arange(len(rows), device=node.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        begins = (place % TILE_ROWS == 0).nonzero().flatten()
        lengths = torch.cat([begins, begins.new_tensor([len(rows)])]).diff()
        nodes = node[rows[begins]]
        counts = offsets.diff()[nodes]
        # Alike to a power of two, so that no more than half of a side is filled up.
        alike = 64 * counts.double().log2().ceil() + lengths.double().log2().ceil()
        for kind in alike.unique():
            same = (alike == kind).nonzero().flatten()
            width, height = int(counts[same].max()), int(lengths[same].max())
            numbers = (width + 2 * height) * self.dimension + 4 * width * height
            for some in same.split(max(1, TILE_NUMBERS // numbers)):
                across = torch.arange(height, device=node.device)
                absent_rows = across >= lengths[some, None]
                along = torch.arange(width, device=node.device)
                absent_children = along >= counts[some, None]
                yield Tiles(
                    rows[(begins[some, None] + across).masked_fill(absent_rows, 0)],
                    absent_rows,
                    nodes[some],
                    (offsets[nodes[some], None] + along).masked_fill(absent_children, 0),
                    absent_children,
                )

    def _by_expansion(self, points: Tensor, level: int, tiles: Tiles) -> NearestCodeword:
        """The nearest child (n, R) by the expanded square; a margin of 0 or less: rounding leaves it in doubt."""
        middle = self.centres(level - 1)[tiles.nodes, None]
        received, children = points[tiles.rows] - middle, self.centres(level)[tiles.children] - middle
        norms = children.square().sum(dim=2)[:, None].masked_fill(tiles.absent_children[:, None], 0)
        # Squared distances less the term all children of a node share.
        free = norms.masked_fill(tiles.absent_children[:, None], torch.inf)
        scores = torch.baddbmm(free, received, children.mT, alpha=-2)
        smallest, first = scores.min(dim=2, keepdim=True)
        chosen = children.gather(1, first.expand(-1, -1, self.dimension))
        # Rounding of one score or span: a sum of d products, and what surrounds it.
        rounding = 2 * (self.dimension + 8) * torch.finfo(scores.dtype).eps
        radius = norms.amax(dim=2, keepdim=True).sqrt()
        reach = received.norm(dim=2, keepdim=True) + radius
        scores.sub_(smallest + rounding * reach.square()).scatter_(2, first, torch.inf)
        spans = torch.baddbmm(norms + norms.gather(2, first.mT).mT, chosen, children.mT, alpha=-2)
        spans = spans.clamp_min_(0).add_(rounding * (2 * radius).square()).sqrt_()
        return NearestCodeword(first[..., 0], scores.div_(spans).amin(dim=2) / 2)

    def _by_differences(self, points: Tensor, level: int, node: Tensor) -> NearestCodeword:
        """The nearest child of each point's (B, d) own node (B,), by differences, some rows at a time."""
        centres, offsets = self.centres(level), self.offsets(level)
        first, count = offsets[node], offsets[node + 1] - offsets[node]
        if not len(points):
            return NearestCodeword(node, points[:, 0])
        codes, margins = [], []
        at_once = max(1, DIFFERENCES // (int(count.max()) * self.dimension))
        for rows in torch.arange(len(points), device=points.device).split(at_once):
            places = torch.arange(int(count[rows].max()), device=points.device)
            absent = places >= count[rows, None]
            siblings = centres[(first[rows, None] + places).masked_fill(absent, 0)]
            nearest = nearest_candidate(points[rows], siblings, absent)
            codes.append(nearest.code)
            margins.append(nearest.margin)
        return NearestCodeword(torch.cat(codes), torch.cat(margins))

    def _set_level(self, level: int, centres: Tensor, offsets: Tensor) -> None:
        self.register_buffer(f"centres_{level}", centres.detach().clone())
        self.register_buffer(f"offsets_{level}", offsets.detach().clone())

    def _check_level(self, level: int, centres: Tensor, offsets: Tensor, nodes: int) -> None:
        """Raise ValueError unless each of the nodes in front of the level has children within the centres."""
        counts = offsets.diff() if offsets.ndim == 1 and offsets.dtype == torch.int64 else offsets.new_zeros(0)
        if (
            centres.ndim != 2
            or centres.shape[1] != self.dimension
            or len(counts) != nodes
            or int(offsets[0]) != 0
            or int(offsets[-1]) != len(centres)
            or int(counts.min()) < 1
            or int(counts.max()) > self._sizes[level]
        ):
            msg = (
                f"level {level + 1} of the tree does not fit: centres {tuple(centres.shape)}, offsets "
                f"{tuple(offsets.shape)} for {nodes} nodes of up to {self._sizes[level]} children"
            )
            raise ValueError(msg)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take each level's size from what is loaded; a tree that is none is refused."""
        nodes = 1
        for level in range(len(self._sizes)):
            centres = state_dict.get(f"{prefix}centres_{level}")
            offsets = state_dict.get(f"{prefix}offsets_{level}")
            if centres is None or offsets is None:
                break  # the missing one is named below
            self._check_level(level, centres, offsets, nodes)
            self._set_level(level, centres.to(self.centres(level)), offsets.to(self.offsets(level)))
            nodes = len(centres)
        super()._load_from_state_dict(state_dict, prefix, *rest)
