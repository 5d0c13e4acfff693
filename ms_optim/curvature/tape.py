r"""The tape: what autograd recorded of one forward pass, read as a description of the network.

Autograd's graph of the logits is the one record that misses nothing: functional code, in-place operations, tied and
reused tensors all end in it, and every path from a parameter to the logits passes through its nodes.  Two things are
read off it.

*Sites.*  Every use of every parameter is an edge into that parameter's ``AccumulateGrad`` node.  The node at the other
end says what was done with it (``ConvolutionBackward0``, …), keeps the input that the curvature rule needs, and is the
place where the backpropagated factor is taken: an in-place operation afterwards has a node of its own, so it does no
harm.  A use without a rule is an error, hence no parameter is ever skipped silently.

*Kind.*  A parameter's diagonal Hessian block equals its Gauss-Newton block where the logits are piecewise linear in
it.  Each node is piecewise linear in its inputs jointly (ReLU, pooling, sums), a product (linear in each factor), or
neither.  Carrying the set of parameters that each tensor depends on from the leaves to the logits, a parameter loses
the name "hessian" exactly when it enters a nonlinear slot, or two factors of one product.  What is not in the table
counts as nonlinear: the weaker claim is always true.

Source: arXiv 2106.12612, section 4 (the Hessian of a ReLU network is its Gauss-Newton matrix, layer by layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import CurvatureError

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes that the type does not declare

_LINEAR = """
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

_BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


def operation(node: Node) -> str:
    """The name of the operation that a node differentiates: ``"Convolution"`` for ``ConvolutionBackward0``."""
    name = str(node.name()).rsplit("::", 1)[-1]
    return name.rstrip("0123456789").removesuffix("Backward")


@dataclass(frozen=True)
class Use:
    """One use of one parameter.

    Attributes:
        parameter: Its name in the model.
        shape: Its shape.
        node: The autograd node of the operation that used it.
        operation: That operation's name.
        slot: Which input of the operation it was.
        transposed: Whether an odd number of transpositions stands between the parameter and the operation.
    """

    parameter: str
    shape: tuple[int, ...]
    node: Node
    operation: str
    slot: int
    transposed: bool = False


@dataclass(frozen=True)
class Tape:
    """The uses of all parameters, and what may be said of their traces.

    Attributes:
        uses: Parameter name → its uses, in the order in which autograd meets them; empty if the logits ignore it.
        kind: Parameter name → ``"hessian"`` or ``"gauss-newton"``.
    """

    uses: dict[str, list[Use]] = field(default_factory=dict)
    kind: dict[str, str] = field(default_factory=dict)


def read_tape(logits: Tensor, parameters: Mapping[str, Tensor]) -> Tape:
    """Find every use of every parameter in the graph of ``logits``, and each parameter's kind.

    Args:
        logits: The output of a forward pass, in the graph.
        parameters: Name → parameter; each tensor once.

    Returns:
        The tape. Parameters that the logits do not depend on have no use, and kind ``"hessian"`` (of zero).

    Raises:
        CurvatureError: If part of the graph is hidden by reentrant checkpointing, or a BatchNorm differentiates
            through the statistics of the batch, so that samples are not independent.
    """
    names = {id(tensor): name for name, tensor in parameters.items()}
    bits = {name: 1 << i for i, name in enumerate(parameters)}
    uses: dict[str, list[Use]] = {name: [] for name in parameters}
    depends: dict[Node, int] = {}
    tainted = 0
    for node in _inputs_first(logits.grad_fn):
        name = operation(node)
        if name == "AccumulateGrad":
            depends[node] = bits.get(names.get(id(node.variable), ""), 0)
            continue
        slots = [0 if source is None else depends[source] for source, _ in node.next_functions]
        depends[node] = _union(slots)
        tainted |= _tainted(node, name, slots)
        if _transposed_leaf(node) is not None:
            continue  # only another view of a parameter; whatever takes it is the use
        for slot, (source, _) in enumerate(node.next_functions):
            leaf, transposed = _transposed_leaf(source) or (source, False)
            if leaf is not None and operation(leaf) == "AccumulateGrad":
                parameter = names.get(id(leaf.variable))
                if parameter is not None:
                    shape = tuple(leaf.variable.shape)
                    uses[parameter].append(Use(parameter, shape, node, name, slot, transposed))
    kind = {name: "gauss-newton" if tainted & bit else "hessian" for name, bit in bits.items()}
    return Tape(uses, kind)


def _inputs_first(root: Node | None) -> list[Node]:
    """All nodes below ``root``, each after every node that it takes its inputs from."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [] if root is None else [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source, _ in node.next_functions if source is not None)
    return order


def _transposed_leaf(node: Node | None) -> tuple[Node, bool] | None:
    """The leaf matrix under a chain of ``.t()``, ``.T``, ``.mT``, and whether their number is odd; else ``None``."""
    odd, links = False, 0
    while node is not None and operation(node) in ("T", "Transpose", "Permute"):
        if len(node._input_metadata[0].shape) != 2:
            return None
        # Autograd saves axes as unsigned numbers, -1 as 2⁶⁴ − 1; of two axes the parity tells which it is.
        if operation(node) == "Transpose":
            odd ^= (node._saved_dim0 - node._saved_dim1) % 2 == 1
        else:
            odd ^= operation(node) == "T" or node._saved_dims[0] % 2 == 1
        node, links = node.next_functions[0][0], links + 1
    return (node, odd) if links and node is not None and operation(node) == "AccumulateGrad" else None


def _union(masks: list[int]) -> int:
    """The parameters in any of the masks."""
    total = 0
    for mask in masks:
        total |= mask
    return total


def _tainted(node: Node, name: str, slots: list[int]) -> int:
    """The parameters in which this node is not piecewise linear, given what each of its inputs depends on."""
    if name in _LINEAR:
        return 0
    if name in _PRODUCTS:
        return _overlap(slots, _PRODUCTS[name])
    if name in _BATCH_NORMS:
        if node._saved_training:
            raise CurvatureError(
                "a normalisation differentiates through statistics of its own input: a functional batch_norm with "
                "training=True, where one sample's logits depend on the others, or an InstanceNorm, which no rule "
                "covers; use nn.BatchNorm modules, whose statistics we hold fixed, or GroupNorm(C, C) per instance"
            )
        return _overlap(slots, ((0,), (1,)))
    if name in _NONLINEAR_SLOTS:
        nonlinear, groups = _NONLINEAR_SLOTS[name]
        return _union([slots[i] for i in nonlinear if i < len(slots)]) | _overlap(slots, groups)
    if name == "CheckpointFunction":
        raise CurvatureError(
            "reentrant activation checkpointing hides the parameters inside it from autograd's graph; "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off"
        )
    return _union(slots)


def _overlap(slots: list[int], groups: tuple[tuple[int, ...], ...]) -> int:
    """The parameters that stand in more than one factor of a product."""
    seen = shared = 0
    for group in groups:
        mask = _union([slots[i] for i in group if i < len(slots)])
        shared |= seen & mask
        seen |= mask
    return shared
