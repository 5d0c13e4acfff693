r"""Pullback: the contraction of a parameter that enters an operation by way of another tensor.

The operation takes D = f(θ); its own contraction speaks of g_D, and g_θ = (∂f/∂θ)ᵀ g_D.  A rearrangement keeps sums of
squares, and takes the squared entries to their places.  For the rest g_D is formed for a slice of the samples at a time
and pulled back through the recorded chain, all of the slice in one batched vector-Jacobian product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..graph.use import Derivation, Use
from .contraction import Accumulator, Contraction, Piece, row_squares, slices, square_sum, wide
from .outer import Outer, PlainLinear


class Pulled(Contraction):
    """g_θ from the contraction of what was derived from θ.

    Args:
        use: The use, with a derivation.
        inner: The contraction of the derived tensor at the operation.
    """

    def __init__(self, use: Use, inner: Contraction) -> None:
        super().__init__(use, inner.layout)
        assert use.derivation is not None
        self.inner, self.derivation = inner, use.derivation

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        return self.inner.trace(columns) if self.use.rearranged else _PulledSquares(self, entries=False)

    def diagonal(self, columns: int) -> Accumulator:
        """See the base class."""
        # Squares go the same way as gradients, up to signs; in half precision they would overflow on it.
        if self.use.rearranged and self.derivation.leaf.dtype in (torch.float32, torch.float64):
            return _Rearranged(self.inner.diagonal(columns), self.derivation)
        return _PulledSquares(self, entries=True)

    def squared_norm(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return self.inner.squared_norm(delta) if self.use.rearranged else square_sum(self.gradients(delta))

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        g = self.inner.gradients(delta)
        return wide(self.derivation.pull(g.flatten(0, 1))).unflatten(0, g.shape[:2])

    def kept_bytes(self, columns: int, item: int) -> int:
        """See the base class."""
        return self.inner.kept_bytes(columns, item) if self.use.rearranged else 0

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        own = 0 if self.use.rearranged else max(4, item) * self.floats()
        return self.inner.temporary_bytes(item) + own

    def floats(self) -> int:
        """Numbers per sample while g_D is pulled back: it, what it becomes on its way, and g_θ."""
        return 2 * math.prod(self.use.shape) + self.derivation.leaf.numel()


class _Rearranged(Accumulator):
    """Squared entries of the derived tensor, put where the parameter has them."""

    def __init__(self, inner: Accumulator, derivation: Derivation) -> None:
        self.inner, self.derivation = inner, derivation

    def add(self, piece: Piece) -> None:
        """See the base class."""
        self.inner.add(piece)

    def result(self) -> Tensor:
        """See the base class."""
        return self.derivation.pull(self.inner.result()[None])[0].abs()  # the chain may change signs


class _PulledSquares(Accumulator):
    """The trace or the diagonal by the gradients, a column and a slice of the samples at a time."""

    def __init__(self, rule: Pulled, entries: bool) -> None:
        self.rule, self.entries = rule, entries
        self.total: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        rule = self.rule
        for column in piece.delta.split(1):
            found = []
            for g in _slices_of_gradients(rule.inner, column, rule.floats()):
                pulled = wide(rule.derivation.pull(g))
                found.append(torch.einsum("n...,n...->...", pulled, pulled) if self.entries else row_squares(pulled))
            squares = torch.stack(found).sum(0) if self.entries else torch.cat(found)
            self.total = squares if self.total is None else self.total.add_(squares)

    def result(self) -> Tensor:
        """See the base class."""
        assert self.total is not None
        return self.total


def _slices_of_gradients(rule: Contraction, delta: Tensor, floats: int) -> Iterator[Tensor]:
    """g of one column ``[1, …]``, ``[n, *shape]`` for consecutive slices of the samples.

    Matrices are formed slice by slice; what else there is is hardly larger than δ.
    """
    parts = list(slices(rule.samples, floats * max(4, delta.element_size())))
    if isinstance(rule, PlainLinear):
        for part in parts:
            yield torch.einsum("no,ni->nio", wide(delta[0, part]), wide(rule.x[part]))
    elif isinstance(rule, Outer):
        column = rule.layout.front(delta, lead=1)
        for part in parts:
            d, u = rule.arrange(column[:, part]), wide(rule.unfold(rule.source[part]))
            yield rule.shape(d @ u)
    else:
        g = rule.gradients(delta)[0]
        for part in parts:
            yield g[part]
