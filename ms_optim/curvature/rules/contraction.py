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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import NoRuleError
from ..graph.layout import Layout
from ..graph.tape import Use

# Temporaries of a contraction (unfolded inputs, products per sample) are made for as many samples as fit in this:
# about the second-level cache. On LeNet's middle layer 5 MB takes half the time of 80 MB, which would be gone besides.
_CHUNK_BYTES = 4 * 2**20


# With so many rows a product with a sample's U is efficient; to put columns together for more costs what it saves.
_ROWS = 128


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better: squares of half-precision numbers under- and overflow."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Piece:
    """δ of some columns at the output of one operation, and what the uses there have in common.

    Args:
        delta: ``[c, …]``, the operation's output shape behind the columns.
    """

    def __init__(self, delta: Tensor) -> None:
        self.delta = delta

    @cached_property
    def row_norms(self) -> Tensor:
        """‖δ_cm‖ over the last axis, ``[c, …]``: what a linear layer's weight and bias share."""
        return torch.linalg.vector_norm(wide(self.delta), dim=-1)


class Accumulator(ABC):
    """A sum over columns that takes them as they come."""

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
        self.sums: list[Tensor] = []

    def add(self, piece: Piece) -> None:
        """See the base class."""
        for column in piece.delta.split(1):
            self.sums.append(row_squares(self.rule.gradients(column)[0]))

    def result(self) -> Tensor:
        """See the base class."""
        return torch.stack(self.sums).sum(0)


class _SquaredEntries(Accumulator):
    """The diagonal by the gradients themselves."""

    def __init__(self, rule: Contraction) -> None:
        self.rule = rule
        self.total: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        for column in piece.delta.split(1):
            g = self.rule.gradients(column)[0]
            squares = torch.einsum("n...,n...->...", g, g)
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
        self.norms: list[Tensor] = []

    def add(self, piece: Piece) -> None:
        """See the base class."""
        self.norms.append(piece.row_norms)

    def result(self) -> Tensor:
        """See the base class."""
        squares = torch.cat(self.norms).square().sum(0)
        return squares if self.factor is None else squares * self.factor()


class PlainLinear(Contraction):
    """g_oi = δ_o x_i: one position, so that ‖g‖² = ‖δ‖² ‖x‖².

    Args:
        use: The use.
        layout: Of the rows.
        x: The input ``[N, I]``.
    """

    def __init__(self, use: Use, layout: Layout, x: Tensor) -> None:
        super().__init__(use, layout)
        self.x = x

    def input_squares(self) -> Tensor:
        """‖x_n‖², ``[N]``."""
        return torch.linalg.vector_norm(wide(self.x), dim=-1).square()

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        return RowNorms(self.input_squares)

    def diagonal(self, columns: int) -> Accumulator:
        """See the base class."""
        return _PlainLinearDiagonal(self)

    def squared_norm(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return torch.dot(torch.linalg.vector_norm(wide(delta), dim=-1).square().sum(0), self.input_squares())

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        order = "cno,ni->cnoi" if self.use.transposed else "cno,ni->cnio"
        return torch.einsum(order, wide(delta), wide(self.x))

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        return 0


class _PlainLinearDiagonal(Accumulator):
    """Σ_n (Σ_c δ_cno²) x_ni²: one matrix product in the end."""

    def __init__(self, rule: PlainLinear) -> None:
        self.rule = rule
        self.total: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        squares = wide(piece.delta).square().sum(0)
        self.total = squares if self.total is None else self.total.add_(squares)

    def result(self) -> Tensor:
        """See the base class."""
        assert self.total is not None
        squares = self.total.t() @ wide(self.rule.x).square()
        return squares if self.rule.use.transposed else squares.t()


class Outer(Contraction):
    """g_goi = Σ_v δ_gov U_gvi.

    Args:
        use: The use.
        layout: Of the operation's output.
        source: What U is made of, ``[N, …]``.
        unfold: Gives U as ``[n, G, V, I]`` for some samples of the source.
        arrange: Gives δ as ``[n, G, c·O, V]`` for the columns ``[c, n, T, …]`` of the same samples, in float32 or
            better.
        sizes: (G, O, I, V).
        shape: Gives g of the parameter's shape from ``[…, G, O, I]``, for a parameter laid out in another way.
    """

    def __init__(
        self,
        use: Use,
        layout: Layout,
        source: Tensor,
        unfold: Callable[[Tensor], Tensor],
        arrange: Callable[[Tensor], Tensor],
        sizes: tuple[int, int, int, int],
        shape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(use, layout)
        self.source, self.unfold, self.arrange, self.sizes = source, unfold, arrange, sizes
        self.shape = shape or (lambda g: g.reshape(*g.shape[:-3], *use.shape))

    def prefers_gram(self, columns: int) -> bool:
        """Whether the Gram matrices take fewer operations than the direct product."""
        _, o, i, v = self.sizes
        return v * (i + o * columns) < i * o * columns

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        return _GramTrace(self) if self.prefers_gram(columns) else _OuterDirect(self, columns, entries=False)

    def diagonal(self, columns: int) -> Accumulator:
        """See the base class."""
        return _OuterDirect(self, columns, entries=True)

    def squared_norm(self, delta: Tensor) -> Tensor:
        """See the base class."""
        norm: Tensor = _OuterNorm.apply(self.source, delta, self)
        return norm

    def norm_of(self, source: Tensor, delta: Tensor) -> Tensor:
        """Σ_cn ‖g_cn‖² of some samples, in one go.

        Args:
            source: Those samples of the source.
            delta: Their columns, ``[c, n, T, …]``.

        Returns:
            A scalar.
        """
        u, d = wide(self.unfold(source)), self.arrange(delta)
        if not self.prefers_gram(delta.shape[0]):
            return square_sum(d @ u)
        return torch.dot((u @ u.transpose(-1, -2)).reshape(-1), (d.transpose(-1, -2) @ d).reshape(-1))

    def parts(self, columns: int) -> Iterator[slice]:
        """Slices of the samples whose temporaries fit in the chunk."""
        groups, o, i, v = self.sizes
        floats = groups * (v * i + columns * o * (v + i))
        return slices(self.samples, floats * max(4, self.source.element_size()))

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        d = self.arrange(self.layout.front(delta, lead=1)).unflatten(2, (delta.shape[0], -1))  # n g c o v
        return self.shape(torch.einsum("ngcov,ngvi->cngoi", d, wide(self.unfold(self.source))))

    def keeps_input(self, columns: int) -> bool:
        """Whether U is no larger than δ of all columns, so that it is U that the direct route keeps."""
        _, o, i, _ = self.sizes
        return i <= columns * o

    def kept_bytes(self, columns: int, item: int) -> int:
        """See the base class."""
        groups, o, i, v = self.sizes
        return groups * v * max(4, item) * (v if self.prefers_gram(columns) else min(i, columns * o))

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        groups, o, i, v = self.sizes
        return groups * max(4, item) * (v * i + o * v + o * i)


class _GramTrace(Accumulator):
    """⟨U Uᵀ, Σ_c δ_cᵀδ_c⟩: one V×V matrix per sample and group between the columns."""

    def __init__(self, rule: Outer) -> None:
        self.rule = rule
        self.gram: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        rule = self.rule
        columns = rule.layout.front(piece.delta, lead=1)
        if self.gram is None:
            d = rule.arrange(columns[:, :1])
            self.gram = d.new_zeros(rule.samples, d.shape[1], d.shape[3], d.shape[3])
        for part in rule.parts(piece.delta.shape[0]):
            d = rule.arrange(columns[:, part]).flatten(0, 1)
            self.gram[part].flatten(0, 1).baddbmm_(d.transpose(-1, -2), d)

    def result(self) -> Tensor:
        """See the base class."""
        assert self.gram is not None
        found = []
        for part in self.rule.parts(1):
            u = wide(self.rule.unfold(self.rule.source[part]))
            found.append(torch.linalg.vecdot((u @ u.transpose(-1, -2)).flatten(1), self.gram[part].flatten(1)))
        return torch.cat(found)


class _OuterDirect(Accumulator):
    """g itself for a slice of the samples at a time; keeps U or δ between the columns, whichever is smaller."""

    def __init__(self, rule: Outer, columns: int, entries: bool) -> None:
        self.rule, self.entries = rule, entries
        self.inputs: list[tuple[slice, Tensor]] | None = None
        self.keeps_input = rule.keeps_input(columns)
        self.deltas: list[Tensor] = []
        self.sums: list[Tensor] = []

    def add(self, piece: Piece) -> None:
        """See the base class."""
        columns = self.rule.layout.front(piece.delta, lead=1)
        if not self.keeps_input:
            self.deltas.append(columns)
            return
        if self.inputs is None:
            self.inputs = list(self._inputs(len(columns)))
        self._contract([columns], self.inputs)

    def result(self) -> Tensor:
        """See the base class."""
        if self.deltas:
            self._contract(self.deltas, self._inputs(sum(len(delta) for delta in self.deltas)))
        total = self.sums[0] if len(self.sums) == 1 else torch.stack(self.sums).sum(0)
        return self.rule.shape(total) if self.entries else total

    def _inputs(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """U, slice by slice."""
        for part in self.rule.parts(columns):
            yield part, wide(self.rule.unfold(self.rule.source[part]))

    def _contract(self, columns: Sequence[Tensor], inputs: Iterable[tuple[slice, Tensor]]) -> None:
        """Add Σ g² of columns ``[c, N, T, …]``, per sample ``[n]`` or per entry ``[G, O, I]``."""
        outputs, found = self.rule.sizes[1], []
        for part, u in inputs:
            squares = []
            for some in _with_rows(columns, -(-_ROWS // outputs)):
                each = [self.rule.arrange(piece[:, part]) for piece in some]
                d = torch.cat(each, dim=2) if len(each) > 1 else each[0]
                # The product with the longer side first, which is up to a third faster.
                wide_input = not self.entries and u.shape[-1] > d.shape[-2]
                g = (u.transpose(-1, -2) @ d.transpose(-1, -2)).transpose(-1, -2) if wide_input else d @ u
                if self.entries:
                    g = g.unflatten(2, (-1, outputs))
                    squares.append(torch.einsum("ngcoi,ngcoi->goi", g, g))
                elif wide_input:
                    squares.append(row_squares(g.transpose(-1, -2)))
                else:
                    squares.append(row_squares(g))
            found.append(torch.stack(squares).sum(0) if len(squares) > 1 else squares[0])
        if self.entries:
            self.sums = [torch.stack([*self.sums, *found]).sum(0)]
        else:
            self.sums.append(torch.cat(found) if len(found) > 1 else found[0])


def _with_rows(columns: Sequence[Tensor], enough: int) -> Iterator[list[Tensor]]:
    """Pieces of columns put together until there are ``enough`` columns for an efficient matrix product."""
    some: list[Tensor] = []
    for piece in columns:
        some.append(piece)
        if sum(map(len, some)) >= enough:
            yield some
            some = []
    if some:
        yield some


class _OuterNorm(torch.autograd.Function):
    """Σ_cn ‖g_cn‖² with a derivative that goes through the samples in the same small parts.

    Left to autograd, every part's unfolded input would be kept, and every slice of the source would cost a gradient of
    the size of the whole: time quadratic in the batch.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, delta: Tensor, outer: Outer) -> Tensor:
        """Keep the input and δ only."""
        ctx.save_for_backward(source, delta)
        ctx.outer = outer
        columns = outer.layout.front(delta, lead=1)
        parts = outer.parts(delta.shape[0])
        return torch.stack([outer.norm_of(source[part], columns[:, part]) for part in parts]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Make each part again and differentiate it."""
        source, delta = ctx.saved_tensors
        outer = ctx.outer
        by_source, by_delta = torch.empty_like(source), torch.empty_like(delta)
        columns, by_columns = outer.layout.front(delta, lead=1), outer.layout.front(by_delta, lead=1)
        for part in outer.parts(delta.shape[0]):
            with torch.enable_grad():
                inputs = source[part].detach().requires_grad_(), columns[:, part].detach().requires_grad_()
                term = outer.norm_of(*inputs)
            by_source[part], by_columns[:, part] = torch.autograd.grad(term, inputs, grad.to(term.dtype))
        return by_source, by_delta, None


class Reduced(Contraction):
    """g = δ ⊙ x̂, or δ alone, summed over every axis that the parameter does not have.

    Args:
        use: The use.
        layout: Of the operation's output.
        axes: For each axis of the parameter, the axis of the operation's output it lies along.
        factor: x̂ in the operation's output shape, or what gives it for ``[n, T, …]`` slices of the samples; ``None``
            for a shift.
    """

    def __init__(
        self,
        use: Use,
        layout: Layout,
        axes: tuple[int, ...],
        factor: Tensor | Callable[[slice], Tensor] | None = None,
    ) -> None:
        super().__init__(use, layout)
        self.axes = axes
        self.factor = layout.front(factor) if isinstance(factor, Tensor) else factor

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        shape = self.use.output_shape
        if self.factor is None and len(shape) == 2 and shape[0] == self.samples and self.axes == (1,):
            return RowNorms()
        return _ReducedSquares(self)

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        g = self.part_gradients(self.layout.front(delta, lead=1), slice(0, self.samples))
        return g.reshape(*g.shape[:2], *self.use.shape)

    def part_gradients(self, columns: Tensor, part: slice) -> Tensor:
        """g of ``[c, N, T, …]`` for a slice of the samples: ``[c, n, parameter's axes…]``."""
        d = wide(columns[:, part])
        if self.factor is not None:
            d = d * (self.factor[part] if isinstance(self.factor, Tensor) else self.factor(part))
        keep = {self.layout.axis(axis) + 1 for axis in self.axes}  # behind c
        summed = [axis for axis in range(2, d.ndim) if axis not in keep]
        return d.sum(summed) if summed else d

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        return 2 * max(4, item) * math.prod(self.use.output_shape) // self.samples


class _ReducedSquares(Accumulator):
    """The trace by the gradients, a slice of the samples at a time."""

    def __init__(self, rule: Reduced) -> None:
        self.rule = rule
        self.sums: list[Tensor] = []

    def add(self, piece: Piece) -> None:
        """See the base class."""
        rule, delta = self.rule, piece.delta
        columns = rule.layout.front(delta, lead=1)
        size = 2 * delta[0].numel() // rule.samples * delta.shape[0] * max(4, delta.element_size())
        found = [
            torch.linalg.vector_norm(rule.part_gradients(columns, part).flatten(2), dim=-1).square().sum(0)
            for part in slices(rule.samples, size)
        ]
        self.sums.append(torch.cat(found) if len(found) > 1 else found[0])

    def result(self) -> Tensor:
        """See the base class."""
        return torch.stack(self.sums).sum(0)


class Broadcast(Contraction):
    """g = δ summed over the axes along which the parameter was broadcast, the batch among them.

    Args:
        use: The use.
        layout: Of the operation's output.

    Raises:
        NoRuleError: If the parameter has an axis along the samples.
    """

    def __init__(self, use: Use, layout: Layout) -> None:
        super().__init__(use, layout)
        self.summed = broadcast_axes(use, layout)

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        d = wide(self.layout.front(delta, lead=1))  # c n t *rest
        d = d.sum(self.summed) if self.summed else d
        return d.reshape(*d.shape[:2], *self.use.shape)


def broadcast_axes(use: Use, layout: Layout) -> list[int]:
    """The axes of ``[c, n, T, …]`` along which a parameter was broadcast to the operation's output.

    Args:
        use: The use.
        layout: Of the operation's output.

    Returns:
        The axes to sum over.

    Raises:
        NoRuleError: If the parameter has an axis along the samples.
    """
    output = use.output_shape
    shape = (1,) * (len(output) - len(use.shape)) + use.shape
    sample_axis = 1 if layout.order == "sequence-first" else 0
    if len(shape) <= sample_axis or shape[sample_axis] != 1:
        raise NoRuleError(
            f"parameter {use.parameter} {use.shape} meets a tensor {output} along the axis of the samples, or before "
            "there is one; no curvature rule covers it. Freeze the parameter (requires_grad_(False)) to leave it out"
        )
    summed = [] if layout.order == "sequence-first" else [2]
    return summed + [layout.axis(k) + 1 for k in range(len(output)) if k != sample_axis and shape[k] == 1]


class Shared:
    """Σ over several uses of one parameter of g_cn, squared when all uses have been met.

    Args:
        entries: Whether the diagonal is wanted, rather than the trace.
    """

    def __init__(self, entries: bool) -> None:
        self.entries = entries
        self.pending: Tensor | None = None
        self.total: Tensor | None = None

    def part(self, rule: Contraction) -> Accumulator:
        """What takes δ of one of the uses."""
        return _SharedPart(rule, self)

    def flush(self) -> None:
        """All uses have had the present columns."""
        if self.pending is None:
            return
        g, self.pending = self.pending, None
        if self.entries:
            squares = torch.einsum("cn...,cn...->...", g, g)
        else:
            squares = torch.linalg.vector_norm(g.reshape(*g.shape[:2], -1), dim=-1).square().sum(0)
        self.total = squares if self.total is None else self.total.add_(squares)

    def result(self) -> Tensor:
        """As :meth:`Accumulator.result`."""
        assert self.total is not None
        return self.total


class _SharedPart(Accumulator):
    """One use of a parameter with several."""

    def __init__(self, rule: Contraction, shared: Shared) -> None:
        self.rule, self.shared = rule, shared

    def add(self, piece: Piece) -> None:
        """See the base class."""
        g = self.rule.gradients(piece.delta)
        self.shared.pending = g if self.shared.pending is None else self.shared.pending + g

    def result(self) -> Tensor:
        """The sum belongs to all uses together."""
        return self.shared.result()


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
