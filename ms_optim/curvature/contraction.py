r"""Contractions: the squared norm of per-sample gradients, from an operation's input and the factor at its output.

For a sample n and a backpropagated column c of S, the gradient g_cn of ⟨S_c, o_n⟩ with respect to a parameter is one of
three contractions of the operation's input with δ, the column at the operation's output:

    outer   g_oi = Σ_v δ_ov U_iv     weights of linear maps; v runs over positions (1 for a plain linear layer)
    scale   g_k  = Σ_v δ_kv x̂_kv    weights of normalisers
    shift   g_k  = Σ_v δ_kv          biases

The trace needs Σ_cn ‖g_cn‖² only.  ‖Σ_v δ_v ⊗ U_v‖² is computed directly, V·I·O operations a column, or through the
Gram matrices ⟨UᵀU, Σ_c δ_cᵀδ_c⟩, V²(I + C·O) for all C columns together, whichever is cheaper; with one position it is
‖U‖²‖δ‖².  Nothing of the size of a gradient per sample is kept.

Index letters: c column, n sample, g group of channels, o output, i input, v position, k channel.

Source: arXiv 2106.12612, Prop. 1 and App. H; the Gram form and the chunking are our own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import CurvatureError
from .tape import Use

# Temporaries of a contraction (unfolded inputs, products per sample) are made for as many samples as fit in this:
# about the second-level cache. On LeNet's middle layer 5 MB takes half the time of 80 MB, which would be gone besides.
_CHUNK_BYTES = 4 * 2**20


class Columns:
    """δ at the output of one operation: C columns, in pieces as they were backpropagated.

    Args:
        pieces: Tensors ``[c, M, …]``, M = samples × whatever the operation folded into its first axis.
        norms_only: Whether ‖δ_cm‖ is all that will be asked for: δ itself is then let go piece by piece.
    """

    def __init__(self, pieces: Iterable[Tensor] = (), norms_only: bool = False) -> None:
        self.norms_only = norms_only
        self.pieces: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.count, self.element_size = 0, 0
        self.shape: tuple[int, ...] = (0,)
        for piece in pieces:
            self.add(piece)

    def add(self, piece: Tensor) -> None:
        """Take ``[c, M, …]``: c more columns."""
        self.count += piece.shape[0]
        self.shape, self.element_size = tuple(piece.shape[1:]), piece.element_size()
        if self.norms_only:
            self.norms.append(_row_norms(piece))
        else:
            self.pieces.append(piece)

    def part(self, rows: slice) -> Tensor:
        """All columns of some rows, ``[C, rows, …]``, in float32 or better."""
        if len(self.pieces) == 1:
            return wide(self.pieces[0][:, rows])
        return wide(torch.cat([piece[:, rows] for piece in self.pieces]))

    def rows_first(self, rows: slice) -> Tensor:
        """The same as ``[rows, C, …]``, in one copy at most."""
        parts = [piece[:, rows].transpose(0, 1) for piece in self.pieces]
        return wide(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    @cached_property
    def row_squares(self) -> Tensor:
        """Σ_c Σ_o δ_cmo², ``[M]``: what a linear layer's weight and bias have in common."""
        norms = self.norms or [_row_norms(piece) for piece in self.pieces]
        return torch.cat(norms).square().sum(0)


class Contraction(ABC):
    """The per-sample gradient of one use of one parameter, as a function of δ.

    Args:
        use: The use.
        samples: N.
    """

    def __init__(self, use: Use, samples: int) -> None:
        self.use, self.samples = use, samples

    @property
    def norms_suffice(self) -> bool:
        """Whether :meth:`squared_norm` looks at ``columns.row_squares`` only."""
        return False

    @abstractmethod
    def squared_norm(self, columns: Columns) -> Tensor:
        """Σ_cn ‖g_cn‖², a scalar in float32 or better, differentiable in δ and in the input."""

    @abstractmethod
    def gradients(self, columns: Columns) -> Tensor:
        """g_cn itself, ``[C, N, *parameter.shape]``: for parameters with several uses, whose gradients add."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better: squares of half-precision numbers under- and overflow."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def fold_check(rows: int, samples: int, use: Use) -> None:
    """Refuse a first axis that cannot hold the samples.

    Args:
        rows: The length M = N·T of the axis; the T rows of a sample are neighbours and count as positions.
        samples: N.
        use: Named if it fails.

    Raises:
        CurvatureError: If N does not divide the axis.
    """
    if rows % samples:
        raise CurvatureError(
            f"parameter {use.parameter} is used by {use.operation} on a first axis of {rows}, which is no multiple of "
            f"the batch's {samples} samples; the trace needs the samples on the first axis"
        )


def _slices(samples: int, bytes_per_sample: int) -> Iterator[slice]:
    """Consecutive slices of the samples whose temporaries fit in the chunk."""
    step = max(1, _CHUNK_BYTES // max(1, bytes_per_sample))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def _row_norms(piece: Tensor) -> Tensor:
    """‖δ_cm‖, ``[c, M]``."""
    return torch.linalg.vector_norm(wide(piece), dim=-1)


def _square_sum(tensor: Tensor) -> Tensor:
    """Σ x² in one pass, without a temporary."""
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat)


class PlainLinear(Contraction):
    """g_oi = δ_o x_i: one position, so that ‖g‖² = ‖δ‖² ‖x‖².

    Args:
        use: The use.
        x: The input ``[N, I]``.
    """

    def __init__(self, use: Use, x: Tensor) -> None:
        super().__init__(use, x.shape[0])
        self.x = x

    @cached_property
    def input_squares(self) -> Tensor:
        """‖x_n‖², ``[N]``."""
        return torch.linalg.vector_norm(wide(self.x), dim=-1).square()

    @property
    def norms_suffice(self) -> bool:
        """See the base class."""
        return True

    def squared_norm(self, columns: Columns) -> Tensor:
        """See the base class."""
        return torch.dot(columns.row_squares, self.input_squares)

    def gradients(self, columns: Columns) -> Tensor:
        """See the base class."""
        order = "cno,ni->cnoi" if self.use.transposed else "cno,ni->cnio"
        return torch.einsum(order, columns.part(slice(None)), wide(self.x))


class Outer(Contraction):
    """g_goi = Σ_v δ_gov U_giv.

    Args:
        use: The use.
        source: What U is made of, ``[N, …]``.
        unfold: Gives U as ``[n, G, I, V]`` for some samples of the source.
        arrange: Gives δ as ``[n, G, C·O, V]`` for the columns ``[(n …), C, …]`` of the same samples.
        sizes: (G, O, I, V).
    """

    def __init__(
        self,
        use: Use,
        source: Tensor,
        unfold: Callable[[Tensor], Tensor],
        arrange: Callable[[Tensor], Tensor],
        sizes: tuple[int, int, int, int],
    ) -> None:
        super().__init__(use, source.shape[0])
        self.source, self.unfold, self.arrange, self.sizes = source, unfold, arrange, sizes

    def squared_norm(self, columns: Columns) -> Tensor:
        """See the base class."""
        if torch.is_grad_enabled() and len(columns.pieces) == 1:
            norm: Tensor = _OuterNorm.apply(self.source, columns.pieces[0], self)
            return norm
        terms = [self.term(self.source[part], columns.rows_first(rows)) for part, rows in self.parts(columns)]
        return torch.stack(terms).sum()

    def term(self, source: Tensor, delta: Tensor) -> Tensor:
        """Σ_cn ‖g_cn‖² for some samples.

        Args:
            source: Those samples of the source.
            delta: Their columns, ``[(n …), C, …]``.

        Returns:
            A scalar.
        """
        u, d = wide(self.unfold(source)), self.arrange(delta)
        if self._direct(delta.shape[1]):
            return _square_sum(d @ u.transpose(-1, -2))
        return torch.dot((u.transpose(-1, -2) @ u).reshape(-1), (d.transpose(-1, -2) @ d).reshape(-1))

    def parts(self, columns: Columns) -> Iterator[tuple[slice, slice]]:
        """Slices of the samples whose temporaries fit in the chunk, and the rows of δ that belong to them."""
        groups, o, i, v = self.sizes
        co, times = columns.count * o, columns.shape[0] // self.samples
        floats = groups * (v * (i + co) + (co * i if self._direct(columns.count) else 2 * v * v))
        for part in _slices(self.samples, floats * columns.element_size):
            yield part, slice(part.start * times, part.stop * times)

    def gradients(self, columns: Columns) -> Tensor:
        """See the base class."""
        d = self.arrange(columns.rows_first(slice(None))).unflatten(2, (columns.count, -1))  # n g c o v
        g = torch.einsum("ngcov,ngiv->cngoi", d, wide(self.unfold(self.source)))
        if self.use.operation in ("Addmm", "Mm") and not self.use.transposed:
            g = g.transpose(-1, -2)
        return g.reshape(columns.count, self.samples, *self.use.shape)

    def _direct(self, count: int) -> bool:
        """Whether the direct product takes fewer operations than the Gram matrices."""
        _, o, i, v = self.sizes
        return v * i * o * count <= v * v * (i + o * count)


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
        columns = Columns([delta])
        return torch.stack(
            [outer.term(source[part], columns.rows_first(rows)) for part, rows in outer.parts(columns)]
        ).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Make each part again and differentiate it."""
        source, delta = ctx.saved_tensors
        by_source, by_delta = torch.empty_like(source), torch.empty_like(delta)
        for part, rows in ctx.outer.parts(Columns([delta])):
            with torch.enable_grad():
                inputs = source[part].detach().requires_grad_(), delta[:, rows].detach().requires_grad_()
                term = ctx.outer.term(inputs[0], wide(inputs[1].transpose(0, 1)))
            by_source[part], by_delta[:, rows] = torch.autograd.grad(term, inputs, grad.to(term.dtype))
        return by_source, by_delta, None


class Reduced(Contraction):
    """g = δ ⊙ x̂, or δ alone, summed over every axis that the parameter does not have.

    Args:
        use: The use.
        samples: N.
        axes: For each axis of the parameter, the axis of the operation's output it lies along.
        normalised: x̂ with the shape of the output, or what gives some of its rows; ``None`` for a shift.
    """

    def __init__(
        self,
        use: Use,
        samples: int,
        axes: tuple[int, ...],
        normalised: Tensor | Callable[[slice], Tensor] | None = None,
    ) -> None:
        super().__init__(use, samples)
        self.axes, self.normalised = axes, normalised

    def gradients(self, columns: Columns) -> Tensor:
        """See the base class."""
        everything = slice(0, self.samples)
        g = torch.cat([self._gradients(piece, everything) for piece in columns.pieces])
        return g.reshape(columns.count, self.samples, *self.use.shape)

    @property
    def norms_suffice(self) -> bool:
        """See the base class."""
        shape = self.use.node._input_metadata[0].shape
        return self.normalised is None and len(shape) == 2 and shape[0] == self.samples

    def squared_norm(self, columns: Columns) -> Tensor:
        """See the base class."""
        if self.norms_suffice:
            return columns.row_squares.sum()
        floats = 2 * math.prod(columns.shape) // self.samples
        terms = [
            _square_sum(self._gradients(piece, part))
            for piece in columns.pieces
            for part in self._parts(floats * piece.shape[0] * piece.element_size())
        ]
        return torch.stack(terms).sum()

    def _parts(self, bytes_per_sample: int) -> Iterable[slice]:
        """As :func:`_slices`; all at once under autograd, where a slice costs a gradient of the size of the whole."""
        return [slice(0, self.samples)] if torch.is_grad_enabled() else _slices(self.samples, bytes_per_sample)

    def _gradients(self, piece: Tensor, part: slice) -> Tensor:
        """g of some columns ``[c, M, …]`` for a slice of the samples: ``[c, n, parameter's axes…]``."""
        fold_check(piece.shape[1], self.samples, self.use)
        times = piece.shape[1] // self.samples
        rows = slice(part.start * times, part.stop * times)
        d = wide(piece[:, rows])
        if self.normalised is not None:
            d = d * (self.normalised[rows] if isinstance(self.normalised, Tensor) else self.normalised(rows))
        d = d.unflatten(1, (part.stop - part.start, times))
        keep = {axis + 2 for axis in self.axes}  # behind c, and with n split into n and t
        return d.sum([axis for axis in range(2, d.ndim) if axis not in keep])


class Broadcast(Contraction):
    """g = δ summed over the axes along which the parameter was broadcast, the batch among them.

    Args:
        use: The use.
        samples: N.
    """

    def gradients(self, columns: Columns) -> Tensor:
        """See the base class."""
        fold_check(columns.shape[0], self.samples, self.use)
        d = columns.part(slice(None)).unflatten(1, (self.samples, -1)).sum(2)  # c n *rest
        rest = d.shape[2:]
        shape = (1,) * (len(rest) + 1 - len(self.use.shape)) + self.use.shape
        if shape[0] != 1:
            raise CurvatureError(
                f"parameter {self.use.parameter} {self.use.shape} is added to a tensor of the same first axis, which "
                "is not the batch; no curvature rule covers it. Freeze the parameter to leave it out"
            )
        summed = [axis + 2 for axis, size in enumerate(shape[1:]) if size != rest[axis]]
        d = d.sum(summed) if summed else d
        return d.reshape(columns.count, self.samples, *self.use.shape)

    def squared_norm(self, columns: Columns) -> Tensor:
        """See the base class."""
        return _square_sum(self.gradients(columns))
