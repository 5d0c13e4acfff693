r"""One rule per operation: which contraction gives a parameter's gradient, and of what.

A rule is a function from (use, samples) to a :class:`~ms_optim.curvature.contraction.Contraction`, entered in the table
by :func:`curvature_rule` under the operation and the input slot that the parameter takes.  It says how the operation's
input becomes U (unfolding a convolution's patches) or x̂ (normalising), and refuses what it does not cover.

Source: arXiv 2106.12612, App. H (linear and convolution layers, by unfolding); the rest derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CurvatureError
from .contraction import Broadcast, Contraction, Outer, PlainLinear, Reduced, fold_check, wide
from .tape import Node, Use

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


@curvature_rule(("Addmm", 2), ("Mm", 1))
def linear_weight(use: Use, samples: int) -> Contraction:
    """X W or X Wᵀ: positions are the rows of X that belong to one sample."""
    node = use.node
    x = node._saved_mat1 if use.operation == "Addmm" else node._saved_self
    _require_unit_scale(use, node)
    fold_check(x.shape[0], samples, use)
    if x.shape[0] == samples:
        return PlainLinear(use, x)
    x = x.unflatten(0, (samples, -1))  # n v i
    times, inputs = x.shape[1:]
    outputs = use.shape[0] if use.transposed else use.shape[1]

    def unfold(source: Tensor) -> Tensor:
        return source.transpose(1, 2)[:, None]

    def arrange(d: Tensor) -> Tensor:
        return d.flatten(1).unflatten(0, (-1, times)).transpose(1, 2)[:, None]

    return Outer(use, x, unfold, arrange, sizes=(1, outputs, inputs, times))


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

    def unfold(source: Tensor) -> Tensor:
        patches = _patches(source.flatten(0, 1), kernel, stride, padding, dilation)  # (n t) (g i) v
        patches = patches.unflatten(1, (groups, inputs))
        return patches if times == 1 else patches.unflatten(0, (-1, times)).movedim(1, 3).flatten(3, 4)

    def arrange(d: Tensor) -> Tensor:
        d = d.flatten(3).unflatten(2, (groups, outputs)).unflatten(0, (-1, times))  # n t c g o v
        return d.permute(0, 3, 2, 4, 1, 5).flatten(4, 5).flatten(2, 3)

    return Outer(use, x, unfold, arrange, sizes=(groups, outputs, inputs, times * math.prod(spatial)))


@curvature_rule(("Convolution", 2))
def convolution_bias(use: Use, samples: int) -> Contraction:
    """One bias per output channel, at every position."""
    return Reduced(use, samples, axes=(1,))


@curvature_rule(("NativeBatchNorm", 1), ("CudnnBatchNorm", 1), ("MiopenBatchNorm", 1))
def batch_norm_weight(use: Use, samples: int) -> Contraction:
    """x̂ = (x − m) / √(v + ε) with constant statistics."""
    node = use.node
    x = node._saved_input
    view = (1, -1, *([1] * (x.ndim - 2)))
    eps = node._saved_eps if use.operation == "NativeBatchNorm" else node._saved_epsilon
    dtype = wide(x[:0]).dtype
    mean = node._saved_running_mean.to(dtype).view(view)
    rstd = (node._saved_running_var.to(dtype) + eps).rsqrt().view(view)

    def normalised(rows: slice) -> Tensor:  # made when asked for: all of them together are as large as the activations
        return (wide(x[rows]) - mean) * rstd

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

    A copy of overlapping windows takes a fifth of the time of ``F.unfold`` on CPU, and knows any number of axes; of
    the backward passes that of ``F.unfold`` is the faster.
    """
    if torch.is_grad_enabled() and len(kernel) == 2:
        return F.unfold(x, kernel, tuple(dilation), tuple(padding), tuple(stride))
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in (0, 1)])
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, spread * (size - 1) + 1, step)[..., ::spread]  # n channels *places *kernel
    axes = len(kernel)
    windows = x.movedim(tuple(range(2 + axes, 2 + 2 * axes)), tuple(range(2, 2 + axes)))
    return windows.flatten(2 + axes).flatten(1, 1 + axes)
