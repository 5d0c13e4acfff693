r"""Convolutions in one to three dimensions, and their transposes, as linear maps of patches.

A convolution multiplies the patches U of its input, one position v per output pixel: g_oi = Σ_v δ_ov U_vi.  Its
transpose is that map turned round, x in the place of δ and the patches of δ in the place of U, one position per *input*
pixel:

    g_(i,ok) = Σ_v x_iv · patches(δ)_v(ok) .

Padding other than with zeros, and by different amounts on two sides, is an operation of its own in autograd's graph.

Source: arXiv 2106.12612, App. H, for convolutions; the transposed ones derived.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.layout import Layout
from ..graph.registry import curvature_rule, on_rows, require_rows
from ..graph.use import Use
from .contraction import Contraction, wide
from .outer import Outer
from .reduction import Reduced


@curvature_rule(("Convolution", 1), covers=on_rows)
def convolution_weight(use: Use, layout: Layout) -> Contraction:
    """A kernel ``[channels out, channels in / groups, *kernel]``; transposed ones have in and out exchanged."""
    require_rows(use, layout)
    return _transposed(use, layout) if use.node._saved_transposed else _direct(use, layout)


@curvature_rule(("Convolution", 2), covers=on_rows)
def convolution_bias(use: Use, layout: Layout) -> Contraction:
    """One bias per output channel, at every position."""
    require_rows(use, layout)
    return Reduced(use, layout, axes=(1,))


def _direct(use: Use, layout: Layout) -> Outer:
    """U is the unfolded input."""
    node = use.node
    x = node._saved_input
    kernel = use.shape[2:]
    groups = node._saved_groups
    stride, padding, dilation = _steps(use)
    spatial = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    outputs = use.shape[0] // groups
    inputs = use.shape[1] * math.prod(kernel)
    x = layout.front(x)  # n t channels *spatial
    times = x.shape[1]

    def unfold(source: Tensor) -> Tensor:
        patches = _patches(source.flatten(0, 1), kernel, stride, padding, dilation, groups)  # (n t) g v i
        return patches if times == 1 else patches.unflatten(0, (-1, times)).movedim(1, 2).flatten(2, 3)

    def arrange(d: Tensor) -> Tensor:
        d = wide(d).flatten(4).unflatten(3, (groups, outputs))  # c n t g o v
        return d.permute(1, 3, 0, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    sizes = (groups, outputs, inputs, times * math.prod(spatial))
    return Outer(use, layout, x, unfold, arrange, sizes, plane=times == 1 and len(spatial) == 2)


def _transposed(use: Use, layout: Layout) -> Outer:
    """δ is unfolded, and the input stays as it is."""
    node = use.node
    x = layout.front(node._saved_input)  # n t channels *spatial
    times, spatial = x.shape[1], x.shape[3:]
    kernel, groups = use.shape[2:], node._saved_groups
    stride, padding, dilation = _steps(use)
    inputs = use.shape[0] // groups
    outputs = use.shape[1] * math.prod(kernel)

    def unfold(source: Tensor) -> Tensor:
        u = source.flatten(3).unflatten(2, (groups, inputs))  # n t g i v
        return u.permute(0, 2, 1, 4, 3).flatten(2, 3)

    def arrange(d: Tensor) -> Tensor:
        columns, samples = d.shape[:2]
        # Output padding may leave room for a patch more than there are input pixels.
        patches = _patches(wide(d).flatten(0, 2), kernel, stride, padding, dilation, groups, spatial)  # (c n t) g v o
        patches = patches.unflatten(0, (columns, samples, times))  # c n t g v o
        return patches.permute(1, 3, 0, 5, 2, 4).flatten(4, 5).flatten(2, 3)

    def shape(g: Tensor) -> Tensor:
        return g.transpose(-1, -2).reshape(*g.shape[:-3], *use.shape)

    positions = times * math.prod(spatial)
    return Outer(use, layout, x, unfold, arrange, sizes=(groups, outputs, inputs, positions), shape=shape)


def _steps(use: Use) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation along each axis; one number for all axes is how ``padding="valid"`` is saved."""
    axes, node = len(use.shape) - 2, use.node
    saved = (list(steps) for steps in (node._saved_stride, node._saved_padding, node._saved_dilation))
    stride, padding, dilation = (steps * axes if len(steps) == 1 else steps for steps in saved)
    return stride, padding, dilation


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    places: Sequence[int] | None = None,
) -> Tensor:
    """The patches that a convolution sees: ``[n, groups, v, channels/groups·Πkernel]``; 1, 2 or 3 spatial axes.

    A copy of overlapping windows takes a fifth of the time of ``F.unfold`` on CPU, and knows any number of axes; of
    the backward passes that of ``F.unfold`` is the faster.  In memory the positions lie innermost, whose long runs are
    copied four to eight times as fast as the short ones of a kernel.

    Args:
        x: ``[n, channels, *spatial]``.
        kernel: Its size along each axis.
        stride: Steps between patches.
        padding: Zeros on both sides.
        dilation: Steps within a patch.
        groups: Of channels.
        places: How many patches to take along each axis; ``None``: all.
    """
    if torch.is_grad_enabled() and len(kernel) == 2 and places is None:
        patches = F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
        return patches.unflatten(1, (groups, -1)).transpose(-1, -2)
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in (0, 1)])
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, spread * (size - 1) + 1, step)[..., ::spread]  # n channels *places *kernel
        if places is not None:
            x = x.narrow(axis + 2, 0, places[axis])
    axes = len(kernel)
    x = x.movedim(tuple(range(2, 2 + axes)), tuple(range(-axes, 0)))  # n channels *kernel *places
    return x.flatten(2 + axes).flatten(1, 1 + axes).unflatten(1, (groups, -1)).transpose(-1, -2)
