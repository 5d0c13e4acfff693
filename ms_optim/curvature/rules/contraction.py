r"""Contractions: per-sample gradients of one use of one parameter, squared and summed, never all formed.

For a sample n and a backpropagated column c of S, the gradient g_cn of ⟨S_c, o_n⟩ with respect to a parameter is one of
three contractions of the operation's input with δ, the column at the operation's output:

    outer   g_oi = Σ_v δ_ov U_vi     weights of linear maps; v runs over positions (1 for a plain linear layer)
    scale   g_k  = Σ_v δ_kv x̂_kv    weights of normalisers and of element-wise products
    shift   g_k  = Σ_v δ_kv          biases

A :class:`Contraction` knows one use; its accumulators take δ column by column while the backpropagation goes on:

* *trace*: Σ_c ‖g_cn‖² for every sample.  ‖Σ_v δ_v ⊗ U_v‖² is formed directly, V·I·O operations a column, or through
  the Gram matrices ⟨U Uᵀ, Σ_c δ_cᵀδ_c⟩, V²(I + C·O) for all C columns together, whichever is cheaper; with one position
  it is ‖U‖²‖δ‖².  Between columns whatever is smallest is kept: the Gram matrix (V²), U (V·I), or δ itself (C·O·V).
* *diagonal*: Σ_cn g_cn² entry by entry; there is no Gram route.

Index letters: c column, n sample, g group of channels, o output, i input, v position, k channel.

Source: arXiv 2106.12612, Prop. 1 and App. H; the Gram form and the accumulation are our own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..graph.layout import Layout
from ..graph.lift import Lift, Pooled
from ..graph.use import Use

# Temporaries of a contraction (unfolded inputs, products per sample) are made for as many samples as fit in this:
# about the second-level cache. On LeNet's middle layer 5 MB takes half the time of 80 MB, which would be gone besides.
_CHUNK_BYTES = 4 * 2**20


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better: squares of half-precision numbers under- and overflow."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Piece:
    """δ of some columns at the output of one operation, and what the uses there have in common.

    Args:
        delta: ``[c, …]``, the operation's output shape behind the columns; or what it is made of.

    Attributes:
        pooled: What it is made of; ``None``: it was there.
    """

    def __init__(self, delta: Tensor | Pooled) -> None:
        self.pooled = delta if isinstance(delta, Pooled) else None
        self._delta = None if isinstance(delta, Pooled) else delta

    @property
    def delta(self) -> Tensor:
        """δ itself."""
        if self._delta is None:
            assert self.pooled is not None
            self._delta = self.pooled.delta()
        return self._delta

    @cached_property
    def row_squares(self) -> Tensor:
        """Σ_c ‖δ_cm‖² over the last axis, ``[m]``: what a linear layer's weight and bias share."""
        return torch.linalg.vector_norm(wide(self.delta), dim=(0, -1)).square()


class Running:
    """A running sum, in float64 from its second term on: a thousand terms cost float32 three digits.

    The terms are not kept for a sum in the end: each small tensor would come to lie in the room that a large one has
    just left, so that the next large one needs new memory, column after column.

    Args:
        inplace: Whether the first term is nobody else's and may be added to, in its own type.
    """

    def __init__(self, inplace: bool = False) -> None:
        self._total: Tensor | None = None
        self._own = inplace

    def add(self, more: Tensor) -> None:
        """Add a term."""
        if self._total is None:
            self._total = more
        elif self._own:
            self._total.add_(more)
        else:
            self._total, self._own = self._total.double() + more, True

    @property
    def total(self) -> Tensor:
        """The sum of at least one term."""
        assert self._total is not None
        return self._total


class Accumulator(ABC):
    """A sum over columns that takes them as they come."""

    def prefers(self, lift: Lift) -> bool:
        """Whether δ by the winners of the windows above is better than δ itself."""
        return False

    @abstractmethod
    def add(self, piece: Piece) -> None:
        """Take the columns of one piece."""

    @abstractmethod
    def result(self) -> Tensor:
        """The sum, ``[N]`` for a trace and of the parameter's shape for a diagonal; to be asked for once."""


class Contraction(ABC):
    """The per-sample gradient of one use of one parameter, as a function of δ.

    Args:
        use: The use.
        layout: Where the samples are in the operation's output.
    """

    def __init__(self, use: Use, layout: Layout) -> None:
        self.use, self.layout = use, layout

    @property
    def samples(self) -> int:
        """N."""
        return self.layout.samples

    @abstractmethod
    def gradients(self, delta: Tensor) -> Tensor:
        """g_cn itself, ``[c, N, *parameter.shape]``, differentiable in δ."""

    def trace(self, columns: int) -> Accumulator:
        """An accumulator of Σ_c ‖g_cn‖² for ``columns`` columns in all: ``[N]``."""
        return _Squares(self)

    def diagonal(self, columns: int) -> Accumulator:
        """An accumulator of Σ_cn g_cn²: the parameter's shape."""
        return _SquaredEntries(self)

    def squared_norm(self, delta: Tensor) -> Tensor:
        """Σ_cn ‖g_cn‖² of some columns, a scalar that is differentiable in δ and in the input."""
        return square_sum(self.gradients(delta))

    def kept_bytes(self, columns: int, item: int) -> int:
        """Bytes per sample that the trace's accumulator keeps between columns, δ included where it keeps δ."""
        return 0

    def temporary_bytes(self, item: int) -> int:
        """Bytes per sample of the temporaries of one column."""
        return item * math.prod(self.use.shape)


class _Squares(Accumulator):
    """The trace by the gradients themselves, a slice of the columns at a time."""

    def __init__(self, rule: Contraction) -> None:
        self.rule = rule
        self.squares = Running()

    def add(self, piece: Piece) -> None:
        """See the base class."""
        for column in piece.delta.split(1):
            self.squares.add(row_squares(self.rule.gradients(column)[0]))

    def result(self) -> Tensor:
        """See the base class."""
        return self.squares.total


class _SquaredEntries(Accumulator):
    """The diagonal by the gradients themselves."""

    def __init__(self, rule: Contraction) -> None:
        self.rule = rule
        self.total: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        for column in piece.delta.split(1):
            g = self.rule.gradients(column)[0]
            squares = torch.linalg.vector_norm(g, dim=0).square()  # one pass, no temporary of the size of g
            self.total = squares if self.total is None else self.total.add_(squares)

    def result(self) -> Tensor:
        """See the base class."""
        assert self.total is not None
        return self.total


class RowNorms(Accumulator):
    """The trace where it is Σ_c ‖δ_cn‖² times a factor per sample.

    Args:
        factor: Gives ``[N]``; ``None`` for 1.
    """

    def __init__(self, factor: Callable[[], Tensor] | None = None) -> None:
        self.factor = factor
        self.squares = Running()

    def add(self, piece: Piece) -> None:
        """See the base class."""
        self.squares.add(piece.row_squares)

    def result(self) -> Tensor:
        """See the base class."""
        return self.squares.total if self.factor is None else self.squares.total * self.factor()


def slices(samples: int, bytes_per_sample: int) -> Iterator[slice]:
    """Consecutive slices of the samples whose temporaries fit in the chunk."""
    step = max(1, _CHUNK_BYTES // max(1, bytes_per_sample))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def row_squares(g: Tensor) -> Tensor:
    """Σ g² of each row, ``[n, …]`` → ``[n]``, in one pass and without a temporary."""
    return torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1).square()


def square_sum(tensor: Tensor) -> Tensor:
    """Σ x² in one pass, without a temporary."""
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat)
