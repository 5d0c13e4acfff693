r"""One rule per operation: how a parameter's per-sample gradient is made of the operation's input and the factor.

For a sample n and a backpropagated column c of S, every rule here writes the gradient g_cn of ⟨S_c, o_n⟩ with respect
to a parameter as one of three contractions of the operation's input with δ, the column at the operation's output:

    outer   g_oi = Σ_v δ_ov U_iv     weights of linear maps; v runs over positions (1 for a plain linear layer)
    scale   g_k  = Σ_v δ_kv x̂_kv    weights of normalisers
    shift   g_k  = Σ_v δ_kv          biases

The trace needs Σ_cn ‖g_cn‖² only.  ‖Σ_v δ_v ⊗ U_v‖² is computed directly, V·I·O operations a column, or through the
Gram matrices ⟨UᵀU, Σ_c δ_cᵀδ_c⟩, V²(I + C·O) for all C columns together, whichever is cheaper; with one position it is
‖U‖²‖δ‖².  Nothing of the size of a gradient per sample is kept.

Index letters: c column, n sample, g group of channels, o output, i input, v position, k channel.

A rule is a function from (use, samples) to a :class:`Contraction`, entered in the table by :func:`curvature_rule` under
the operation and the input slot that the parameter takes.

Source: arXiv 2106.12612, Prop. 1 and App. H (linear and convolution layers, by unfolding); the rest derived.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CurvatureError
from .tape import Node, Use

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
        self.count, self.shape, self.element_size = 0, (0,), 0
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


Rule = Callable[[Use, int], Contraction]
_RULES: dict[tuple[str, int], Rule] = {}


def curvature_rule(*places: tuple[str, int]) -> Callable[[Rule], Rule]:
    """Enter a rule for parameters that stand in the given (operation, input slot) places of autograd's graph.

    Args:
        *places: Operation as in :func:`ms_optim.curvature.tape.operation`, and slot.

    Returns:
        The decorator; it returns the rule unchanged.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(places, rule))
        return rule

    return register


def contraction(use: Use, samples: int) -> Contraction:
    """The contraction for one use of a parameter in a batch of ``samples``.

    Args:
        use: Where the parameter was used.
        samples: N.

    Returns:
        Its contraction.

    Raises:
        CurvatureError: If there is no rule for this use.
    """
    rule = _RULES.get((use.operation, use.slot))
    if rule is None:
        path = f"transpose -> {use.operation}" if use.transposed else use.operation
        raise CurvatureError(
            f"parameter {use.parameter} {use.shape} is used by {path} (input {use.slot}); no curvature rule covers "
            "it. Register one with ms_optim.curvature.layers.curvature_rule, or freeze the parameter "
            "(requires_grad_(False)) to leave it out"
        )
    return rule(use, samples)


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
        samples: N.
        unfold: Gives U as ``[n, G, I, V]`` for a slice of the samples.
        arrange: Gives δ as ``[n, G, C·O, V]`` for the columns ``[(n …), C, …]`` of that slice.
        sizes: (G, O, I, V).
    """

    def __init__(
        self,
        use: Use,
        samples: int,
        unfold: Callable[[slice], Tensor],
        arrange: Callable[[Tensor], Tensor],
        sizes: tuple[int, int, int, int],
    ) -> None:
        super().__init__(use, samples)
        self.unfold, self.arrange, self.sizes = unfold, arrange, sizes

    def squared_norm(self, columns: Columns) -> Tensor:
        """See the base class."""
        groups, o, i, v = self.sizes
        co = columns.count * o
        direct, gram = v * i * co, v * v * (i + co)
        floats = groups * (v * (i + co) + (co * i if direct <= gram else 2 * v * v))
        total: Tensor | None = None
        for part in _slices(self.samples, floats * columns.element_size):
            u, d = wide(self.unfold(part)), self.arrange(columns.rows_first(self._rows(part, columns)))
            if direct <= gram:
                term = _square_sum(d @ u.transpose(-1, -2))
            else:
                term = torch.dot((u.transpose(-1, -2) @ u).reshape(-1), (d.transpose(-1, -2) @ d).reshape(-1))
            total = term if total is None else total + term
        assert total is not None  # a batch has at least one sample
        return total

    def gradients(self, columns: Columns) -> Tensor:
        """See the base class."""
        everything = slice(0, self.samples)
        d = self.arrange(columns.rows_first(slice(None))).unflatten(2, (columns.count, -1))  # n g c o v
        g = torch.einsum("ngcov,ngiv->cngoi", d, wide(self.unfold(everything)))
        if self.use.operation in ("Addmm", "Mm") and not self.use.transposed:
            g = g.transpose(-1, -2)
        return g.reshape(columns.count, self.samples, *self.use.shape)

    def _rows(self, part: slice, columns: Columns) -> slice:
        """The rows of δ that belong to a slice of the samples."""
        times = columns.shape[0] // self.samples
        return slice(part.start * times, part.stop * times)


class Reduced(Contraction):
    """g = δ ⊙ x̂, or δ alone, summed over every axis that the parameter does not have.

    Args:
        use: The use.
        samples: N.
        axes: For each axis of the parameter, the axis of the operation's output it lies along.
        normalised: x̂ with the shape of the output; ``None`` for a shift.
    """

    def __init__(self, use: Use, samples: int, axes: tuple[int, ...], normalised: Tensor | None = None) -> None:
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
            for part in _slices(self.samples, floats * piece.shape[0] * piece.element_size())
        ]
        return torch.stack(terms).sum()

    def _gradients(self, piece: Tensor, part: slice) -> Tensor:
        """g of some columns ``[c, M, …]`` for a slice of the samples: ``[c, n, parameter's axes…]``."""
        fold_check(piece.shape[1], self.samples, self.use)
        times = piece.shape[1] // self.samples
        rows = slice(part.start * times, part.stop * times)
        d = wide(piece[:, rows])
        if self.normalised is not None:
            d = d * self.normalised[rows]
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


@curvature_rule(("Addmm", 2), ("Mm", 1))
def linear_weight(use: Use, samples: int) -> Contraction:
    """X W or X Wᵀ: positions are the rows of X that belong to one sample."""
    node = use.node
    x = node._saved_mat1 if use.operation == "Addmm" else node._saved_self
    _require_unit_scale(use, node)
    fold_check(x.shape[0], samples, use)
    if x.shape[0] == samples:
        return PlainLinear(use, x)
    u = x.unflatten(0, (samples, -1))  # n v i
    outputs = use.shape[0] if use.transposed else use.shape[1]

    def unfold(part: slice) -> Tensor:
        return u[part].transpose(1, 2)[:, None]

    def arrange(d: Tensor) -> Tensor:
        return d.flatten(1).unflatten(0, (-1, u.shape[1])).transpose(1, 2)[:, None]

    return Outer(use, samples, unfold, arrange, sizes=(1, outputs, x.shape[1], u.shape[1]))


@curvature_rule(("Addmm", 0))
def linear_bias(use: Use, samples: int) -> Contraction:
    """The bias of X Wᵀ + b; one number for several outputs is broadcast along them too."""
    _require_unit_scale(use, use.node)
    outputs = use.node._input_metadata[0].shape[1]
    return Reduced(use, samples, axes=(1,)) if use.shape == (outputs,) else Broadcast(use, samples)


@curvature_rule(("Add", 0), ("Add", 1))
def added(use: Use, samples: int) -> Contraction:
    """A parameter added by broadcasting along the batch: biases outside a linear map, positional embeddings."""
    if use.slot == 1 and use.node._saved_alpha != 1:
        raise CurvatureError(
            f"parameter {use.parameter} {use.shape} is added with alpha={use.node._saved_alpha}; no curvature rule "
            "covers it. Freeze the parameter (requires_grad_(False)) to leave it out"
        )
    if not use.node._input_metadata[0].shape:
        raise CurvatureError(
            f"parameter {use.parameter} {use.shape} is added to a number, before there is a batch; no curvature rule "
            "covers it. Freeze the parameter (requires_grad_(False)) to leave it out"
        )
    return Broadcast(use, samples)


@curvature_rule(("Expand", 0))
def expanded(use: Use, samples: int) -> Contraction:
    """A parameter repeated for every sample, such as a class token."""
    return Broadcast(use, samples)


@curvature_rule(("Convolution", 1))
def convolution_weight(use: Use, samples: int) -> Contraction:
    """A convolution is a linear map of unfolded patches, one position per output pixel."""
    node = use.node
    if node._saved_transposed:
        raise CurvatureError(
            f"parameter {use.parameter} is the weight of a transposed convolution; no curvature rule covers it. "
            "Freeze the parameter (requires_grad_(False)) to leave it out"
        )
    x = node._saved_input
    kernel = use.shape[2:]
    groups = node._saved_groups
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    spatial = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    outputs = use.shape[0] // groups
    inputs = use.shape[1] * math.prod(kernel)
    fold_check(x.shape[0], samples, use)
    x = x.unflatten(0, (samples, -1))  # n t channels *spatial
    times = x.shape[1]

    def unfold(part: slice) -> Tensor:
        patches = _patches(x[part].flatten(0, 1), kernel, stride, padding, dilation)  # (n t) (g i) v
        patches = patches.unflatten(1, (groups, inputs))
        return patches if times == 1 else patches.unflatten(0, (-1, times)).movedim(1, 3).flatten(3, 4)

    def arrange(d: Tensor) -> Tensor:
        d = d.flatten(3).unflatten(2, (groups, outputs)).unflatten(0, (-1, times))  # n t c g o v
        return d.permute(0, 3, 2, 4, 1, 5).flatten(4, 5).flatten(2, 3)

    return Outer(use, samples, unfold, arrange, sizes=(groups, outputs, inputs, times * math.prod(spatial)))


@curvature_rule(("Convolution", 2))
def convolution_bias(use: Use, samples: int) -> Contraction:
    """One bias per output channel, at every position."""
    return Reduced(use, samples, axes=(1,))


@curvature_rule(("NativeBatchNorm", 1), ("CudnnBatchNorm", 1), ("MiopenBatchNorm", 1))
def batch_norm_weight(use: Use, samples: int) -> Contraction:
    """x̂ = (x − m) / √(v + ε) with constant statistics."""
    node = use.node
    x = wide(node._saved_input)
    view = (1, -1, *([1] * (x.ndim - 2)))
    eps = node._saved_eps if use.operation == "NativeBatchNorm" else node._saved_epsilon
    mean, variance = node._saved_running_mean, node._saved_running_var
    normalised = (x - mean.to(x.dtype).view(view)) * (variance.to(x.dtype) + eps).rsqrt().view(view)
    return Reduced(use, samples, axes=(1,), normalised=normalised)


@curvature_rule(("NativeBatchNorm", 2), ("CudnnBatchNorm", 2), ("MiopenBatchNorm", 2), ("NativeGroupNorm", 2))
def channel_bias(use: Use, samples: int) -> Contraction:
    """One bias per channel."""
    return Reduced(use, samples, axes=(1,))


@curvature_rule(("NativeLayerNorm", 1), ("NativeLayerNorm", 2))
def layer_norm_affine(use: Use, samples: int) -> Contraction:
    """x̂ over the trailing axes, whose shape is the parameter's."""
    x = wide(use.node._saved_input)
    axes = tuple(range(x.ndim - len(use.shape), x.ndim))
    if axes[0] == 0:
        raise CurvatureError(
            f"parameter {use.parameter} {use.shape} belongs to a layer norm over all axes of its input, the batch "
            "among them, so samples influence each other; no curvature rule covers it"
        )
    if use.slot == 2:
        return Reduced(use, samples, axes)
    return Reduced(use, samples, axes, _standardised(x, axes, use.node._saved_result2))


@curvature_rule(("NativeGroupNorm", 1))
def group_norm_weight(use: Use, samples: int) -> Contraction:
    """x̂ over the channels and positions of a group, one weight per channel."""
    node = use.node
    x = wide(node._saved_input)
    grouped = x.reshape(x.shape[0], node._saved_group, -1)
    normalised = _standardised(grouped, (2,), node._saved_result2.reshape(x.shape[0], -1, 1))
    return Reduced(use, samples, axes=(1,), normalised=normalised.reshape(x.shape))


def _standardised(x: Tensor, axes: tuple[int, ...], rstd: Tensor) -> Tensor:
    """(x − mean) / √(variance + ε), differentiable; autograd's saved 1/√(variance + ε) is not, and ε is not saved."""
    deviation = x - x.mean(axes, keepdim=True)
    variance = deviation.square().mean(axes, keepdim=True)
    eps = (rstd.detach().to(x.dtype).reshape(variance.shape).pow(-2) - variance.detach()).clamp_min(0.0)
    return deviation * (variance + eps).rsqrt()


def _require_unit_scale(use: Use, node: Node) -> None:
    """Refuse addmm with factors of its own: β input + α X W."""
    if use.operation == "Addmm" and (node._saved_alpha != 1 or node._saved_beta != 1):
        raise CurvatureError(
            f"parameter {use.parameter} is used by addmm with alpha={node._saved_alpha}, beta={node._saved_beta}; no "
            "curvature rule covers it. Freeze the parameter (requires_grad_(False)) to leave it out"
        )


def _patches(
    x: Tensor, kernel: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The patches that a convolution sees: ``[n, channels·Πkernel, v]``; 1, 2 or 3 spatial axes.

    A copy of overlapping windows takes a fifth of the time of ``F.unfold`` on CPU, and knows any number of axes.
    """
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in (0, 1)])
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, spread * (size - 1) + 1, step)[..., ::spread]  # n channels *places *kernel
    axes = len(kernel)
    windows = x.movedim(tuple(range(2 + axes, 2 + 2 * axes)), tuple(range(2, 2 + axes)))
    return windows.flatten(2 + axes).flatten(1, 1 + axes)
