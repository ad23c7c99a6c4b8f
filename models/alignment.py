"""A tokenizer's codewords numbered so that most items keep the codes that another tokenizer gave them.

At each level the new codewords are matched one to one with the old numbers so that the number of items whose codes are
equal is as large as it can be: an assignment problem over the counts of items with both codes (Kuhn, 1955), of which
only those that occur are held (Jonker and Volgenant, Computing 1987, for sparse graphs). No codeword moves, so what a
code stands for, every residual and every distance stay what they were: the codes are the same ones under other numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor, nn

from models.product import ProductQuantizer
from models.residual import ResidualQuantizer
from models.tokenizer import FAMILIES, TokenizerParts
from models.tree import TreeQuantizer


class Aligned(NamedTuple):
    """A tokenizer under other numbers.

    Attributes:
        parts: The same tensors, the quantizer's in another order.
        codes: (N, L) int64, what it gives the items on which it was aligned.
    """

    parts: TokenizerParts
    codes: Tensor


def aligned(parts: TokenizerParts, new: Tensor, old: Tensor) -> Aligned:
    """The parts of a tokenizer, numbered like another one.

    Levels that the other one does not have keep their numbers.

    Args:
        parts: Of the tokenizer; left as they are.
        new: (N, L) int64, the codes that it gives N items, at least one.
        old: (N, L') int64, those that the other one gives them.

    Raises:
        ValueError: The codes are not of the same items, or not of this tokenizer.
    """
    if len(new) != len(old) or not len(new) or new.shape[1] != len(parts.quantizer.codebook_sizes):
        msg = f"codes (N, L) of the same items by both are needed, got {tuple(new.shape)} and {tuple(old.shape)}"
        raise ValueError(msg)
    new, old = new.to("cpu", torch.int64), old.to("cpu", torch.int64)
    quantizer = FAMILIES[parts.family](parts.quantizer.codebook_sizes, parts.quantizer.dimension)
    quantizer.load_state_dict(parts.quantizer.state_dict())
    if isinstance(quantizer, TreeQuantizer):
        codes = _number_tree(quantizer, new, old)
    else:
        assert isinstance(quantizer, ResidualQuantizer | ProductQuantizer)
        codes = _number_codebooks(quantizer.codebooks, new, old)
    return Aligned(replace(parts, quantizer=quantizer), codes)


def numbering(new: Tensor, old: Tensor, codewords: Tensor) -> Tensor:
    """The number (K,) int64 of each codeword with which most codes are equal.

    Equal codewords keep their order, as ties go to the lowest index: the one that is chosen stays the one.

    Args:
        new: (N,) int64, codes below K.
        old: (N,) int64, the codes to come near to; those from K on cannot be had.
        codewords: (K, d).
    """
    within = old < len(codewords)
    return _in_order(_matched(new[within], old[within], len(codewords)), _alike(codewords))


def _matched(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """The column (M,) int64 of each row, one to one, with which most of N pairs are of a row and its column.

    What is matched are the pairs that occur, so memory is that of N and M, not of M x M. Rows of no matched pair get
    the columns that are left, in order.

    Args:
        rows: (N,) int64 below M.
        columns: (N,) int64 below M.
        size: M.
    """
    pairs, counts = (rows * size + columns).unique(return_counts=True)
    places = np.arange(size)
    # Each row has a column of its own beside the real ones, so that a full matching exists; as each row has just one
    # column in any of them, one more for every pair changes nothing but that no weight is 0, which would be no edge.
    weights = np.concatenate([counts.numpy() + 1.0, np.ones(size)])
    edges = np.concatenate([pairs.numpy() // size, places]), np.concatenate([pairs.numpy() % size, size + places])
    graph = csr_array((weights, edges), shape=(size, 2 * size))
    found = min_weight_full_bipartite_matching(graph, maximize=True)[1].astype(np.int64)
    left = found >= size
    found[left] = np.setdiff1d(places, found[~left])
    return torch.from_numpy(found)


def _alike(codewords: Tensor) -> Tensor:
    """A number (K,) int64 for each codeword (K, d), the same for equal ones."""
    numbers: Tensor = codewords.detach().unique(dim=0, return_inverse=True)[1]
    return numbers


def _in_order(numbers: Tensor, alike: Tensor) -> Tensor:
    """The numbers (K,), those of alike codewords (K,) among themselves in the codewords' order."""
    ascending = numbers.argsort()
    ordered = torch.empty_like(numbers)
    ordered[alike.argsort(stable=True)] = numbers[ascending[alike[ascending].argsort(stable=True)]]
    return ordered


def _number_codebooks(codebooks: nn.ParameterList, new: Tensor, old: Tensor) -> Tensor:
    """Order the codebooks in place; the codes (N, L) that they give then."""
    codes = new.clone()
    for level in range(min(new.shape[1], old.shape[1])):
        codebook = codebooks[level].detach()
        numbers = numbering(new[:, level], old[:, level], codebook)
        codebook.copy_(codebook[numbers.argsort()])
        codes[:, level] = numbers[new[:, level]]
    return codes


def _number_tree(tree: TreeQuantizer, new: Tensor, old: Tensor) -> Tensor:
    """Order the children of each node in place; the codes (N, L) that the tree gives then.

    A code counts among the siblings of its node alone, so a node's children are matched on the items that have the
    node's own prefix under both; no pair is of two nodes, so all nodes of a depth are matched at once. A node with n
    children numbers them from 0 to n - 1, whatever it is given.
    """
    codes = new.clone()
    before = [(tree.centres(level), tree.offsets(level)) for level in range(new.shape[1])]
    node = torch.zeros_like(new[:, 0])  # of each item, as the tree was
    same = torch.ones_like(node, dtype=torch.bool)  # the prefix so far
    order = torch.zeros(1, dtype=torch.int64)  # which of the nodes of this depth stands where
    for level in range(new.shape[1]):
        centres, offsets = before[level]
        children = offsets.diff()
        parents = torch.arange(len(children)).repeat_interleave(children)
        places = torch.arange(len(centres))
        if level < old.shape[1]:
            within = same & (old[:, level] < children[node])
            first = offsets[node[within]]
            places = _matched(first + new[within, level], first + old[within, level], len(centres))
            places = _in_order(places, _alike(torch.stack([parents, _alike(centres)], 1)))
        numbers = places - offsets[parents]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        node = offsets[node] + new[:, level]
        codes[:, level] = numbers[node]
        following = (place[parents] * tree.codebook_sizes[level] + numbers).argsort()
        tree.grow(level, centres[following], children[order])
        order = following
        if level < old.shape[1]:
            same &= codes[:, level] == old[:, level]
    return codes
