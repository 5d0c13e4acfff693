r"""Kinds: in which parameters the logits are piecewise linear, so that their Hessian block is the Gauss-Newton block.

Each node of autograd's graph is piecewise linear in its inputs jointly (ReLU, pooling, sums), a product (linear in each
factor), or neither.  Carrying the set of parameters that each tensor depends on from the leaves to the logits, a
parameter loses the name "hessian" exactly when it enters a nonlinear slot, or two factors of one product.  What is not
in the table counts as nonlinear: the weaker claim is always true.

Source: arXiv 2106.12612, section 4 (the Hessian of a ReLU network is its Gauss-Newton matrix, layer by layer).
"""

from __future__ import annotations

from ...errors import CurvatureError
from .use import Node, operation, shape_of

_LINEAR = frozenset(
    """
Add Sub Rsub Neg Relu LeakyRelu RreluWithNoise Threshold Hardtanh Hardsigmoid Clamp ClampMin ClampMax Abs
MaxPool2DWithIndices MaxPool3DWithIndices MaxPool1D AdaptiveMaxPool2D AdaptiveMaxPool3D AvgPool2D AvgPool3D
MkldnnMaxPool2D MkldnnAdaptiveAvgPool2D AdaptiveAvgPool2D AdaptiveAvgPool3D Mean Sum Maximum Minimum Amax Amin Max Min
View UnsafeView ReshapeAlias T Transpose Permute Expand Squeeze Unsqueeze Select Slice Index IndexSelect Gather Take
Cat Stack Split SplitWithSizes UnsafeSplit Unbind Clone ToCopy Alias Detach ConstantPadNd ReflectionPad1D
ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D UpsampleNearest1D UpsampleNearest2D
UpsampleNearest3D UpsampleNearestExact2D UpsampleBilinear2D UpsampleBilinear2DAa UpsampleBicubic2D UpsampleTrilinear3D
Where Flip Roll Repeat Cumsum CopySlices AsStrided Copy PixelShuffle PixelUnshuffle Unfold Im2Col Col2Im Diagonal
Tril Triu MaskedFill MaskedSelect SelectScatter SliceScatter IndexAdd Scatter ScatterAdd AccumulateGrad Embedding
""".split()
)

# Node -> groups of input slots; the node is linear in each group, and a product across groups.
_PRODUCTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "Mul": ((0,), (1,)),
    "Mm": ((0,), (1,)),
    "Mv": ((0,), (1,)),
    "Bmm": ((0,), (1,)),
    "Dot": ((0,), (1,)),
    "Addmm": ((1,), (2,)),
    "Addbmm": ((1,), (2,)),
    "Baddbmm": ((1,), (2,)),
    "Addcmul": ((1,), (2,)),
    "Lerp": ((0, 1), (2,)),
    "Convolution": ((0,), (1,)),
    "PreluKernel": ((0,), (1,)),
}

# Node -> (slots it is not linear in, groups of slots that form a product).
_NONLINEAR_SLOTS: dict[str, tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "NativeLayerNorm": ((0,), ((0,), (1,))),
    "NativeGroupNorm": ((0,), ((0,), (1,))),
    "FusedRmsNorm": ((0,), ((0,), (1,))),
    "Div": ((1,), ((0,), (1,))),
}

BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
_VIEWS = ("View", "UnsafeView", "ReshapeAlias")


def nonlinear_in(node: Node, name: str, slots: list[int], samples: int, derived: bool) -> int:
    """The parameters in which a node is not piecewise linear.

    Args:
        node: The node.
        name: Its operation.
        slots: For each of its inputs the set of parameters that it depends on, as bits.
        samples: N.
        derived: Whether the node's output is used as if it were a parameter, the same for all samples.

    Returns:
        Their set, as bits.

    Raises:
        CurvatureError: If part of the graph is hidden by reentrant checkpointing, or a BatchNorm differentiates
            through the statistics of the batch, so that samples are not independent.
    """
    if name in _LINEAR:
        return 0
    if name in _PRODUCTS:
        return _overlap(slots, _PRODUCTS[name])
    if name in BATCH_NORMS:
        if not node._saved_training:
            return _overlap(slots, ((0,), (1,)))
        if not derived and not _of_instances(node, samples):
            raise CurvatureError(
                "a normalisation differentiates through the statistics of a batch: in a functional batch_norm with "
                "training=True one sample's logits depend on the others; use nn.BatchNorm modules, whose statistics we "
                "hold fixed, or GroupNorm(C, C) per instance"
            )
        return slots[0] | _overlap(slots, ((0,), (1,)))
    if name in _NONLINEAR_SLOTS:
        nonlinear, groups = _NONLINEAR_SLOTS[name]
        return union([slots[i] for i in nonlinear if i < len(slots)]) | _overlap(slots, groups)
    if name == "CheckpointFunction":
        raise CurvatureError(
            "reentrant activation checkpointing hides the parameters inside it from autograd's graph; "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off"
        )
    return union(slots)


def _of_instances(node: Node, samples: int) -> bool:
    """Whether a batch norm is an instance norm: of one row in which every channel of every sample has its own place.

    That they do not mix is seen where the parameters below are used, when it is found out where the samples lie.
    """
    source = node.next_functions[0][0]
    shape = shape_of(node)
    return shape[0] == 1 and shape[1] % samples == 0 and source is not None and operation(source) in _VIEWS


def union(masks: list[int]) -> int:
    """The parameters in any of the masks."""
    total = 0
    for mask in masks:
        total |= mask
    return total


def _overlap(slots: list[int], groups: tuple[tuple[int, ...], ...]) -> int:
    """The parameters that stand in more than one factor of a product."""
    seen = shared = 0
    for group in groups:
        mask = union([slots[i] for i in group if i < len(slots)])
        shared |= seen & mask
        seen |= mask
    return shared
