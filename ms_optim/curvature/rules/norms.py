r"""Normalisers: the weight meets x̂, the normalised input, and the bias meets nothing.

x̂ is made again from the operation's input, differentiably, since what autograd saves of it is not.  An instance norm is
a batch norm of one row with N·C channels, whose weight is repeated N times before (see
:mod:`ms_optim.curvature.rules.products`); there the repetition is the use.
"""

from __future__ import annotations

from torch import Tensor

from ..graph.layout import Layout
from ..graph.registry import curvature_rule, on_axis, on_rows, require_rows
from ..graph.use import Use
from .contraction import Contraction, wide
from .reduction import Reduced


def _constant_statistics(use: Use) -> bool:
    """The statistics are not those of the input itself."""
    return on_rows(use) and not use.node._saved_training


@curvature_rule(
    ("NativeBatchNorm", 1), ("CudnnBatchNorm", 1), ("MiopenBatchNorm", 1), covers=_constant_statistics
)
def batch_norm_weight(use: Use, layout: Layout) -> Contraction:
    """x̂ = (x − m) / √(v + ε) with constant statistics."""
    require_rows(use, layout)
    node = use.node
    x = node._saved_input
    view = (1, 1, -1, *([1] * (x.ndim - 2)))  # behind N and T
    eps = node._saved_eps if use.operation == "NativeBatchNorm" else node._saved_epsilon
    dtype = wide(x[:0]).dtype
    mean = node._saved_running_mean.to(dtype).view(view)
    rstd = (node._saved_running_var.to(dtype) + eps).rsqrt().view(view)

    x = layout.front(x)

    def normalised(part: slice) -> Tensor:  # made when asked for: all of them together are as large as the activations
        return (wide(x[part]) - mean) * rstd

    return Reduced(use, layout, axes=(1,), factor=normalised)


@curvature_rule(
    ("NativeBatchNorm", 2), ("CudnnBatchNorm", 2), ("MiopenBatchNorm", 2), covers=_constant_statistics
)
@curvature_rule(("NativeGroupNorm", 2), covers=on_rows)
def channel_bias(use: Use, layout: Layout) -> Contraction:
    """One bias per channel."""
    require_rows(use, layout)
    return Reduced(use, layout, axes=(1,))


def _behind_samples(use: Use) -> bool:
    """The normalised axes, which are those of the parameter, leave room for the samples in front of them."""
    free = len(use.output_shape) - len(use.shape)
    return free > 1 and on_axis(use) or free == 1 and on_rows(use)


@curvature_rule(("NativeLayerNorm", 1), ("NativeLayerNorm", 2), ("FusedRmsNorm", 1), covers=_behind_samples)
def layer_norm_affine(use: Use, layout: Layout) -> Contraction:
    """x̂ over the trailing axes, whose shape is the parameter's; an RMS norm subtracts no mean."""
    x = wide(use.node._saved_input)
    axes = tuple(range(x.ndim - len(use.shape), x.ndim))
    if axes[0] == 1:
        require_rows(use, layout)
    if use.slot == 2:
        return Reduced(use, layout, axes)
    if use.operation == "FusedRmsNorm":
        return Reduced(use, layout, axes, _standardised(x, axes, use.node._saved_result1, centred=False))
    return Reduced(use, layout, axes, _standardised(x, axes, use.node._saved_result2))


@curvature_rule(("NativeGroupNorm", 1), covers=on_rows)
def group_norm_weight(use: Use, layout: Layout) -> Contraction:
    """x̂ over the channels and positions of a group, one weight per channel."""
    require_rows(use, layout)
    node = use.node
    x = wide(node._saved_input)
    grouped = x.reshape(x.shape[0], node._saved_group, -1)
    normalised = _standardised(grouped, (2,), node._saved_result2.reshape(x.shape[0], -1, 1))
    return Reduced(use, layout, axes=(1,), factor=normalised.reshape(x.shape))


def _standardised(x: Tensor, axes: tuple[int, ...], rstd: Tensor, centred: bool = True) -> Tensor:
    """(x − mean) / √(variance + ε), differentiable; autograd's saved 1/√(variance + ε) is not, and ε is not saved."""
    deviation = x - x.mean(axes, keepdim=True) if centred else x
    variance = deviation.square().mean(axes, keepdim=True)
    eps = (rstd.detach().to(x.dtype).reshape(variance.shape).pow(-2) - variance.detach()).clamp_min(0.0)
    return deviation * (variance + eps).rsqrt()
