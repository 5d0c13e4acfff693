r"""Rows: at which nodes it is proved where the samples lie, without sending anything.

In the order of its entries a tensor may be ``[P, N, R]``: P times a block of R entries for each sample, and only block
n of each reaches the logits of sample n.  (P = 1: the batch comes first; P = T: a sequence does.)  The logits are, with
P = 1, and from them it passes down: a node's input is if its output is and its block n is made of the input's block n.
Shapes decide that, in a few families of operations; k axes hold P and N:

    views                           the order of the entries stays, and P with it
    entry by entry, row by row      k axes of the same lengths on both sides
    along other axes                pieces, sums, norms along axes behind the first k
    permutations                    the axis of the samples goes to another place: another P
    pieces, sums before them        a stack of m such tensors: m times P

What is not proved is only doubtful: :func:`~ms_optim.curvature.graph.backprop.find_layouts` looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .kind import BATCH_NORMS
from .layout import Layout
from .use import Node, operation, shape_of

Shape = tuple[int, ...]


def _named(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Entry by entry after broadcasting, in all inputs.
_POINTWISE = _named(
    """
Add Sub Rsub Mul Div Neg Addcmul Lerp Pow Exp Log Sqrt Rsqrt Abs Maximum Minimum Where MaskedFill Relu LeakyRelu
PreluKernel Threshold Hardtanh Gelu Silu Mish Elu Softplus Sigmoid LogSigmoid Tanh Hardswish Hardsigmoid Clamp ClampMin
ClampMax Clone ToCopy Alias Expand
"""
)
# Operations on each row of an input by itself, and which inputs these are.
_BY_ROW = {
    **dict.fromkeys(("Mm", "Convolution", "NativeGroupNorm", *BATCH_NORMS), (0,)),
    **dict.fromkeys(
        _named(
            """
MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D MkldnnMaxPool2D MkldnnAdaptiveAvgPool2D AdaptiveAvgPool2D
AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D UpsampleNearest2D UpsampleBilinear2D UpsampleBicubic2D
"""
        ),
        (0,),
    ),
    "Addmm": (1,),
    "Bmm": (0, 1),
    "Baddbmm": (0, 1, 2),
    **dict.fromkeys(
        _named(
            """
ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention
ScaledDotProductCudnnAttention
"""
        ),
        (0, 1, 2),
    ),
}
_VIEWS = _named("View UnsafeView ReshapeAlias Squeeze Unsqueeze")
# Operations along some axes.
_ALONG = _named(
    "Slice Cat Split SplitWithSizes UnsafeSplit Softmax SafeSoftmax LogSoftmax Cumsum Flip Roll ConstantPadNd"
)
_REDUCTIONS = _named("Mean Sum Amax Amin LinalgVectorNorm")
_PIECES = _named("Select Unbind")
_NORMALISED = _named("NativeLayerNorm FusedRmsNorm")


def proved_layouts(order: Sequence[Node], logits: Shape) -> dict[Node, Layout]:
    """Where the samples provably lie in the outputs of nodes.

    Args:
        order: All nodes of the logits' graph, each after those that it takes its inputs from.
        logits: The logits' shape, ``[N, K]``: they may be any output of the last node.

    Returns:
        Node → its layout, for those of which it is proved.
    """
    samples = logits[0]
    if samples == 1:  # which has all of every tensor
        return {node: Layout(1) for node in order if node._input_metadata and shape_of(node)}
    outer: dict[Node, int | None] = {order[-1]: 1}  # P; None: doubtful
    shapes = {order[-1]: logits}  # of an output that is taken
    for node in reversed(order):  # whatever takes a node has been looked at before it
        p = outer[node]
        for slot, (source, output) in enumerate(node.next_functions):
            if source is None:
                continue
            found = None
            if p is not None and source._input_metadata:
                shapes[source] = shape_of(source, output)
                found = _outer_of_input(node, operation(node), slot, shapes[source], shapes[node], p, samples)
            outer[source] = found if outer.setdefault(source, found) == found else None
    layouts = {node: _layout(shape_of(node), p, samples) for node, p in outer.items() if p is not None}
    return {node: layout for node, layout in layouts.items() if layout is not None}


def _layout(shape: Shape, p: int, samples: int) -> Layout | None:
    """A tensor that is ``[P, N, R]`` as a layout, if it has that form."""
    if p == 1:
        return Layout(samples) if Layout(samples).fits(shape) else None
    if len(shape) > 1 and shape[:2] == (p, samples):
        return Layout(samples, "sequence-first")
    return Layout(samples, "position-major") if shape[:1] == (p * samples,) else None


def _outer_of_input(
    node: Node, name: str, slot: int, shape: Shape, made: Shape, p: int, samples: int
) -> int | None:
    """P of an input, of the given shape, of a node with P at an output; ``None``: it has none, or it is not known."""
    if 0 in shape:
        return None
    if name in _VIEWS:
        return p
    if name in ("Permute", "Transpose"):
        return _permuted(node, name, shape, made, p, samples)
    if name in _PIECES or name in _REDUCTIONS:
        axes = sorted(_axes(node, len(shape)))
        if len(axes) == 1 and p % math.prod(shape[: axes[0]]) == 0:  # one of m tensors, or their sum
            return p * shape[axes[0]]
    count = _axes_for(made, p * samples)
    if count is None or shape[:count] != made[:count]:
        return None
    if name in _POINTWISE:
        kept = len(shape) == len(made)  # else what is broadcast may have other axes in front
    elif name in _BY_ROW:
        rows = count == 1 and len(shape) == len(made)
        kept = rows and slot in _BY_ROW[name] and not (name in BATCH_NORMS and node._saved_training)
    elif name in _NORMALISED:
        kept = slot == 0 and len(made) - len(node._saved_normalized_shape) >= count
    elif name in _ALONG or name in _REDUCTIONS or name in _PIECES:
        kept = min(_axes(node, len(shape))) >= count
    elif name == "Stack":
        kept = min(_axes(node, len(made))) >= count
    else:
        kept = False
    return p if kept else None


def _axes_for(shape: Shape, size: int) -> int | None:
    """How many axes in front hold P·N = ``size`` blocks; ``None``: the blocks would begin within an entry of them."""
    product = 1
    for count, length in enumerate(shape, 1):
        product *= length
        if product % size == 0:
            return count
        if size % product:
            return None
    return None


def _permuted(node: Node, name: str, shape: Shape, made: Shape, p: int, samples: int) -> int | None:
    """P of the input of a permutation: the axis that holds the samples, and blocks of them only, goes elsewhere."""
    order = list(range(len(made)))
    if name == "Permute":
        order = [_signed(axis) % len(made) for axis in node._saved_dims]
    else:
        first, second = (_signed(axis) % len(made) for axis in (node._saved_dim0, node._saved_dim1))
        order[first], order[second] = order[second], order[first]
    product = 1
    for axis, length in enumerate(made):
        if product == p and length % samples == 0:
            return math.prod(shape[: order[axis]])
        product *= length
    return None


def _axes(node: Node, count: int) -> set[int]:
    """The axes that an operation goes along, of ``count``; all of them if it does not say."""
    if operation(node) == "ConstantPadNd":  # two numbers for each axis, the last axis first
        return {count - 1 - place // 2 for place, width in enumerate(node._saved_pad) if width} or {count}
    saved = getattr(node, "_saved_dims" if operation(node) in ("Flip", "Roll") else "_saved_dim", None)
    saved = [saved] if isinstance(saved, int) else saved
    return {_signed(axis) % count for axis in saved} if saved else set(range(count))


def _signed(axis: int) -> int:
    """An axis as it was given: autograd saves them as unsigned numbers, −1 as 2⁶⁴ − 1."""
    return axis - 2**64 if axis >= 2**63 else axis
