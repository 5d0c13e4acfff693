r"""Tables: embeddings, and other rows of a parameter that are chosen by an index.

Row j of the parameter has the gradient g_j = Σ_{v: i_v = j} δ_v, over the positions of the sample that take it; the sum
comes before the square, and the rows that no position takes are 0.  A table of rows [N, vocabulary, width] is never
formed: the positions of all samples are sorted into groups of one sample and one index, of which there are at most
N·V, and a group's sum is what is squared.

Whether gradients are sparse does not matter; that a training loop divides them by the frequency of an index in the
batch does not either, for this is the derivative itself.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from ..graph.layout import Layout
from ..graph.registry import curvature_rule, on_axis
from ..graph.use import Use
from .contraction import Accumulator, Contraction, Piece, wide


class Lookup(Contraction):
    """g_j = Σ_{v: i_v = j} δ_v.

    Args:
        use: The use.
        layout: Of the operation's output, ``[*indices.shape, *row.shape]``.
        indices: Which row each position takes.
        silent: The row that is never learned; ``None``: there is none.
    """

    def __init__(self, use: Use, layout: Layout, indices: Tensor, silent: int | None = None) -> None:
        super().__init__(use, layout)
        self.indices, self.silent = indices, silent

    def rows(self, delta: Tensor) -> Tensor:
        """δ at the positions, ``[c, N, V, width]``, 0 where the silent row was taken."""
        d = wide(self.layout.front(delta, lead=1))
        d = d.reshape(*d.shape[:2], -1, math.prod(self.use.shape[1:]))
        return d if self.silent is None else d.masked_fill((self.taken == self.silent)[..., None], 0.0)

    @cached_property
    def taken(self) -> Tensor:
        """The indices, ``[N, V]``, none negative."""
        front = self.layout.front(self.indices).flatten(1)
        return torch.where(front < 0, front + self.use.shape[0], front)

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """The group of every position ``[N·V]``, and the sample and the index of every group ``[M]``."""
        size = self.use.shape[0]
        samples = torch.arange(self.samples, device=self.taken.device)
        keys, group = torch.unique(samples[:, None] * size + self.taken, return_inverse=True)
        return group.flatten(), keys // size, keys % size

    def group_squares(self, delta: Tensor) -> Tensor:
        """(Σ_v δ_v)² of every group, ``[M, width]``, of one column."""
        rows = self.rows(delta).flatten(0, 2)
        group, samples, _ = self.groups
        return rows.new_zeros(len(samples), rows.shape[1]).index_add(0, group, rows).square()

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        rows = self.rows(delta)  # c n v width
        table = rows.new_zeros(*rows.shape[:2], self.use.shape[0], rows.shape[3])
        where = self.taken[None, :, :, None].expand(rows.shape)
        return table.scatter_add(2, where, rows).reshape(*rows.shape[:2], *self.use.shape)

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        return _LookupSquares(self, entries=False)

    def diagonal(self, columns: int) -> Accumulator:
        """See the base class."""
        return _LookupSquares(self, entries=True)

    def squared_norm(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return torch.stack([self.group_squares(column).sum() for column in delta.split(1)]).sum()

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        return 2 * max(4, item) * (math.prod(self.use.output_shape) // self.samples)


class _LookupSquares(Accumulator):
    """Sums over the groups of a sample, or over those of an index."""

    def __init__(self, rule: Lookup, entries: bool) -> None:
        self.rule, self.entries = rule, entries
        self.total: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        _, samples, indices = self.rule.groups
        for column in piece.delta.split(1):
            squares = self.rule.group_squares(column)
            if self.total is None:
                shape = self.rule.use.shape
                size = (shape[0], squares.shape[1]) if self.entries else (self.rule.samples,)
                self.total = squares.new_zeros(size)
            if self.entries:
                self.total.index_add_(0, indices, squares)
            else:
                self.total.index_add_(0, samples, squares.sum(1))

    def result(self) -> Tensor:
        """See the base class."""
        assert self.total is not None
        return self.total.reshape(self.rule.use.shape) if self.entries else self.total


@curvature_rule(("Embedding", 0), covers=on_axis)
def embedding(use: Use, layout: Layout) -> Contraction:
    """``nn.Embedding``; the row at ``padding_idx`` has no gradient."""
    silent = use.node._saved_padding_idx
    return Lookup(use, layout, use.node._saved_indices, silent if silent < use.shape[0] else None)


def _rows_by_one_index(use: Use) -> bool:
    """The rows of the parameter, which has nothing behind them in the way, are chosen by one tensor of indices."""
    if use.operation == "IndexSelect":
        # Autograd saves axes as unsigned numbers, -1 as 2⁶⁴ − 1.
        return use.node._saved_dim in (0, 2**64 - len(use.shape)) and on_axis(use)
    indices = use.node._saved_indices
    return len(indices) == 1 and indices[0].dtype in (torch.int32, torch.int64) and indices[0].ndim > 0 and on_axis(use)


@curvature_rule(("Index", 0), ("IndexSelect", 0), covers=_rows_by_one_index)
def indexed(use: Use, layout: Layout) -> Contraction:
    """``table[indices]``."""
    node = use.node
    return Lookup(use, layout, node._saved_index if use.operation == "IndexSelect" else node._saved_indices[0])
