"""How scales pass an operation channel by channel: rules on labels, beside the rules on one scale per tensor.

Here a tensor has a log-scale for every entry (:mod:`~ms_optim.symmetry.labels`), and an operation commutes with the map
x to e^s x (entry by entry) under

    entries that are moved about (reshape, slice, concatenation)      the labels move along
    entry by entry (ReLU, dropout, add, where)                        as for tensors, per entry
    sums over axes (mean, pooling, the positions of a convolution)    labels equal along them
    linear maps and convolutions                                      a_ji = s_out,j − s_in,i: rows minus columns
    products with a contraction (matmul, attention)                   s_x,ik + s_y,kj equal for all k
    normalisers                                                       s_in free, equal within what is normalised

What has no rule here has one label for each of its tensors, and then the rule for tensors decides
(:mod:`~ms_optim.symmetry.rules`): the layer-wise group is therefore contained in the channel-wise one, and nothing is
taken for granted that was opaque there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from .labels import ANY, FIXED_LABEL, Labels
from .operation import Operation, fits_any_scale, is_moving, is_scalable
from .rules import COPIES, POOLING, REFLECTIONS, RELU_FAMILY, RESHAPES, UPSAMPLING

# A product of two tensors of labels beyond this is not spelled out.
_LARGEST_PRODUCT = 2**20

Rule = Callable[["ChannelOperation"], bool]
CHANNEL_RULES: dict[str, Rule] = {}


class ChannelGraph(Protocol):
    """What a rule may ask of the graph it is applied to."""

    labels: Labels

    def labels_of(self, node: fx.Node, index: int | None = None) -> Tensor:
        """The labels of a node's tensor, or of one of its outputs, with as many axes as the tensor."""

    def put(self, node: fx.Node, index: int | None, labels: Tensor) -> None:
        """Set the labels of a result."""

    def known(self, node: fx.Node) -> Tensor | None:
        """The value of a constant tensor of integers, if the node is one."""

    def weighted(
        self, node: fx.Node, inputs: Tensor, outputs: Tensor | None, groups: int, transposed: bool
    ) -> Tensor | None:
        """Use a weight: labels of the outputs, or None if that is not possible."""

    def batch_statistics(self, op: Operation, mean: Any, variance: Any, eps: float, labels: Tensor) -> None:
        """Running statistics of an input with these labels per channel are used by a BatchNorm."""

    def inexact(self, op: Operation) -> None:
        """The operation is scale-invariant up to an ε, in evaluation mode too."""


class ChannelOperation:
    """One call in the graph, with labels in place of scales.

    Attributes:
        plain: The operation: arguments by name.
        graph: The graph.
        labels: The labels in use.
    """

    def __init__(self, plain: Operation, graph: ChannelGraph) -> None:
        self.plain, self.graph, self.labels = plain, graph, graph.labels
        self.node, self.name, self.arguments = plain.node, plain.name, plain.arguments

    def of(self, value: Any) -> Tensor:
        """The labels of an argument: fixed for numbers and integers, ``ANY`` for numbers that fit any scale."""
        if isinstance(value, fx.Node):
            return self.graph.labels_of(value) if is_moving(value) else torch.tensor(FIXED_LABEL)
        return torch.tensor(ANY if fits_any_scale(value) else FIXED_LABEL)

    def put(self, *results: Tensor) -> bool:
        """Set the labels of the results, in order; True, as a rule that holds returns."""
        several = isinstance(self.node.meta.get("val"), (list, tuple))
        for index, labels in enumerate(results):
            self.graph.put(self.node, index if several else None, labels)
        return True


def channel_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how labels pass operations.

    Args:
        names: Operators, named as in :func:`ms_optim.symmetry.scale_rule`.

    Returns:
        The decorator. The rule it takes sets the labels of the results and returns True, or returns False: then the
        tensors of the operation get one label each, and the rule for tensors decides.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            if name in CHANNEL_RULES:
                raise ValueError(f"{name} already has the rule {CHANNEL_RULES[name].__name__}")
            CHANNEL_RULES[name] = rule
        return rule

    return register


# Those that add up entries, look at memory or values, or know no integers; one scale serves them.
_NOT_MOVEMENT = {"col2im", "as_strided", "masked_select", "view_as_real", "view_as_complex", "real", "imag", "unfold"}
MOVEMENT = tuple(name for name in RESHAPES if name not in _NOT_MOVEMENT)
JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
WRITES = ("slice_scatter", "select_scatter", "diagonal_scatter")


@channel_rule(*MOVEMENT, *JOINS, *WRITES, "constant_pad_nd", "pad")
def movement(op: ChannelOperation) -> bool:
    """Entries are moved about, and their labels with them."""
    if op.name in ("view", "view_copy") and "dtype" in op.arguments:
        return False
    padded, mode = op.name in ("constant_pad_nd", "pad"), op.arguments.get("mode", "constant")
    if padded and not (mode == "constant" and fits_any_scale(op.arguments.get("value"))):
        return False

    def with_labels(node: fx.Node) -> Tensor:
        value: Any = node.meta.get("val")
        if is_scalable(value):
            return op.graph.labels_of(node).expand(value.shape).contiguous()
        known = op.graph.known(node)
        if known is None:
            raise _UnknownError
        return known

    try:
        if padded:
            x = with_labels(op.arguments["self"])
            moved: Any = torch.nn.functional.pad(x, op.arguments["pad"], value=ANY)
        else:
            args, kwargs = fx.map_arg((op.node.args, op.node.kwargs), with_labels)
            moved = op.node.target(*args, **kwargs)  # type: ignore[operator]
    except (_UnknownError, RuntimeError, NotImplementedError, TypeError, IndexError):
        return False
    results = list(moved) if isinstance(moved, (list, tuple)) else [moved]
    shapes = [getattr(value, "shape", None) for value in op.plain.results]
    if [getattr(result, "shape", None) for result in results] != shapes:
        return False
    return op.put(*results)


class _UnknownError(Exception):
    """An index that depends on the inputs."""


@channel_rule(*RELU_FAMILY, *COPIES, "dropout", "native_dropout", "feature_dropout")
def entrywise(op: ChannelOperation) -> bool:
    """f(c x) = c f(x) for every entry."""
    if not is_moving(op.plain.first) or not is_scalable(op.plain.results[0]):
        return False
    labels = op.of(op.plain.first)
    return op.put(labels, *(torch.tensor(FIXED_LABEL) for _ in op.plain.results[1:]))


_SPATIAL = (*(name for name in POOLING if "unpool" not in name), *UPSAMPLING, *REFLECTIONS)


@channel_rule(*_SPATIAL)
def spatial(op: ChannelOperation) -> bool:
    """Sums and choices over the last d axes, d being in the operator's name."""
    if not is_moving(op.plain.first):
        return False
    d = next(int(digit) for digit in "123" if f"{digit}d" in op.name)
    labels = op.labels.collapsed(op.of(op.plain.first), range(-d, 0))
    return op.put(labels, *(torch.tensor(FIXED_LABEL) for _ in op.plain.results[1:]))


@channel_rule("mean", "sum", "nansum", "nanmean", "amax", "amin")
def reduction(op: ChannelOperation) -> bool:
    """A sum over axes: labels are equal along them."""
    x = op.plain.first
    if not is_moving(x) or not is_scalable(op.plain.results[0]):
        return False
    dims = op.arguments.get("dim")
    labels = op.of(x)
    axes = list(range(labels.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    labels = op.labels.collapsed(labels, axes)
    if not op.arguments.get("keepdim", False) and labels.ndim:
        kept = [size for axis, size in enumerate(labels.shape) if axis not in {a % labels.ndim for a in axes}]
        labels = labels.reshape(kept)
    return op.put(labels)


@channel_rule("prelu", "_prelu_kernel")
def prelu(op: ChannelOperation) -> bool:
    """PReLU: the slopes stay, a = 0."""
    x, slope = op.plain.inputs[:2]
    op.labels.equal(op.of(slope), torch.tensor(FIXED_LABEL))
    return op.put(op.of(x))


@channel_rule("threshold", "clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
def clipping(op: ChannelOperation) -> bool:
    """max(x, b), min(x, b): a number as a bound must be 0 or infinite; a tensor must scale as x does."""
    x, *bounds = op.plain.inputs
    if not all(isinstance(bound, fx.Node) or fits_any_scale(bound) for bound in bounds):
        return False
    return op.put(op.labels.merged([op.of(x), *(op.of(bound) for bound in bounds)]))


@channel_rule("add", "sub", "subtract", "rsub", "maximum", "minimum", "fmax", "fmin", "where", "masked_fill")
def alternatives(op: ChannelOperation) -> bool:
    """Terms of a sum, or values to choose from, entry by entry."""
    passive = {"alpha", "mask", "condition"}
    return op.put(op.labels.merged([op.of(value) for name, value in op.arguments.items() if name not in passive]))


@channel_rule("copy")
def overwriting(op: ChannelOperation) -> bool:
    """What was there before does not matter."""
    return op.put(op.of(op.arguments["src"]))


@channel_rule("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal")
def comparison(op: ChannelOperation) -> bool:
    """x > y is the same for c x > c y, entry by entry."""
    op.labels.merged([op.of(term) for term in op.plain.inputs])
    return True


@channel_rule("sign", "sgn", "signbit", "isnan", "isinf", "isfinite", "sym_size", "_assert_tensor_metadata")
def scale_invariant(op: ChannelOperation) -> bool:
    """f(c x) = f(x), entry by entry."""
    return op.put(*(torch.tensor(FIXED_LABEL) for _ in op.plain.results))


@channel_rule("mul", "multiply")
def product(op: ChannelOperation) -> bool:
    """x y: s_out = s_x + s_y, entry by entry."""
    x, y = (op.of(value) if isinstance(value, fx.Node) else torch.tensor(FIXED_LABEL) for value in op.plain.inputs[:2])
    return op.put(op.labels.total(x, y))


@channel_rule("div", "divide", "true_divide")
def quotient(op: ChannelOperation) -> bool:
    """x / y: s_out = s_x − s_y, entry by entry, unless the quotient is rounded."""
    x, y = op.plain.inputs[:2]
    if op.arguments.get("rounding_mode") is not None:
        return False
    divisor = op.of(y) if isinstance(y, fx.Node) else torch.tensor(FIXED_LABEL)
    if bool((divisor == ANY).any()):
        return False
    return op.put(op.labels.total(op.of(x), op.labels.multiple(divisor, -1)))


@channel_rule("pow", "square", "sqrt", "rsqrt", "reciprocal")
def power(op: ChannelOperation) -> bool:
    """xᵖ: s_out = p s_in, entry by entry."""
    known = {"square": 2, "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "reciprocal": -1}
    exponent = known.get(op.name, op.arguments.get("exponent"))
    if not isinstance(exponent, (int, float, Fraction)) or not math.isfinite(exponent) or not is_moving(op.plain.first):
        return False
    p, labels = Fraction(exponent), op.of(op.plain.first)
    if p.denominator > 64 or bool((labels == ANY).any()):
        return False
    return op.put(op.labels.multiple(labels, p))


def _per_channel(op: ChannelOperation, labels: Tensor, axis: int, size: int) -> Tensor:
    """Labels along one axis, once they are equal along all others: ``[size]``."""
    axis %= labels.ndim
    labels = op.labels.collapsed(labels, (other for other in range(labels.ndim) if other != axis))
    return labels.reshape(-1).expand(size)


def _along(labels: Tensor, axis: int, ndim: int) -> Tensor:
    """A vector of labels along one axis of a tensor."""
    shape = [1] * ndim
    shape[axis] = -1
    return labels.reshape(shape)


@channel_rule("linear")
def linear(op: ChannelOperation) -> bool:
    """W x + b: a_ji = s_out,j − s_in,i and a_b,j = s_out,j."""
    x, weight, bias = op.arguments["input"], op.arguments["weight"], op.arguments.get("bias")
    shape = weight.meta["val"].shape
    if len(shape) != 2 or not is_moving(x):
        return False
    outputs = None if bias is None else op.of(bias).expand(shape[0])
    found = op.graph.weighted(weight, _per_channel(op, op.of(x), -1, shape[1]), outputs, 1, transposed=False)
    return found is not None and op.put(_along(found, -1, len(x.meta["val"].shape)))


@channel_rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(op: ChannelOperation) -> bool:
    """A linear map of channels at every offset, in groups."""
    x, weight, bias = op.arguments["input"], op.arguments["weight"], op.arguments.get("bias")
    shape, ndim = weight.meta["val"].shape, len(x.meta["val"].shape)
    groups = int(op.arguments.get("groups", 1))
    transposed = bool(op.arguments.get("transposed", op.name.startswith("conv_transpose")))
    if ndim != len(shape) or (transposed and groups > 1):
        return False
    count = shape[1] if transposed else shape[0]
    outputs = None if bias is None else op.of(bias).expand(count)
    channels = x.meta["val"].shape[1]
    found = op.graph.weighted(weight, _per_channel(op, op.of(x), 1, channels), outputs, groups, transposed)
    return found is not None and op.put(_along(found, 1, ndim))


@channel_rule("mm", "bmm", "matmul")
def matrix_product(op: ChannelOperation) -> bool:
    """x y with x [..., i, k] and y [..., k, j]: s_x,ik + s_y,kj is equal for all k."""
    x, y = op.plain.inputs[:2]
    found = _contracted(op, x, y)
    return found is not None and op.put(found)


@channel_rule("addmm", "baddbmm")
def matrix_product_added(op: ChannelOperation) -> bool:
    """b + x y."""
    b, x, y = op.plain.inputs[:3]
    found = _contracted(op, x, y)
    return found is not None and op.put(op.labels.merged([found, op.of(b)]))


def _contracted(op: ChannelOperation, x: Any, y: Any) -> Tensor | None:
    if not (is_moving(x) and is_moving(y)):
        return None
    shape_x, shape_y = x.meta["val"].shape, y.meta["val"].shape
    if len(shape_x) < 2 or len(shape_y) < 2:
        return None
    if len(shape_y) == 2:
        # A weight is used as a linear map's, transposed: its labels are rows and columns, not entries.
        vector = _per_channel(op, op.of(x), -1, shape_y[0])
        found = op.graph.weighted(y, vector, None, 1, transposed=True)
        return None if found is None else _along(found, -1, len(shape_x))
    a, b = op.of(x).unsqueeze(-1), op.of(y).unsqueeze(-3)
    if math.prod(torch.broadcast_shapes(a.shape, b.shape)) > _LARGEST_PRODUCT:
        return None
    return op.labels.collapsed(op.labels.total(a, b), [-2]).squeeze(-2)


@channel_rule("einsum")
def einstein_sum(op: ChannelOperation) -> bool:
    """Σ over some axes of a product of tensors: the sum of their scales is equal along those axes."""
    equation, tensors = str(op.arguments["equation"]).replace(" ", ""), op.arguments["tensors"]
    sources, arrow, result = equation.partition("->")
    operands = sources.split(",")
    plain = all(letters.isalpha() and len(set(letters)) == len(letters) for letters in operands)
    if not arrow or not plain or not all(is_moving(tensor) for tensor in tensors):
        return False
    order = result + "".join(dict.fromkeys(letter for letter in sources if letter.isalpha() and letter not in result))
    total = torch.full((1,) * len(order), FIXED_LABEL)
    for letters, tensor in zip(operands, tensors, strict=True):
        kept = [letters.index(letter) for letter in order if letter in letters]
        labels = op.of(tensor).permute(kept)
        sizes = iter(labels.shape)
        labels = labels.reshape([next(sizes) if letter in letters else 1 for letter in order])
        if math.prod(torch.broadcast_shapes(total.shape, labels.shape)) > _LARGEST_PRODUCT:
            return False
        total = op.labels.total(total, labels)
    contracted = range(len(result), len(order))
    return op.put(op.labels.collapsed(total, contracted).reshape(total.shape[: len(result)]))


@channel_rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
@channel_rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
@channel_rule("_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention")
@channel_rule("_scaled_dot_product_fused_attention_overrideable")
def attention(op: ChannelOperation) -> bool:
    """softmax(q kᵀ + mask) v: s_q,d + s_k,d = 0 for every d, s_mask = 0, s_out,d = s_v,d; all equal over positions."""
    nodes = [value for value in op.plain.inputs if is_moving(value)]
    q, k, v = nodes[:3]
    shapes = [node.meta["val"].shape for node in (q, k, v)]
    if shapes[0][:-2] != shapes[1][:-2] or shapes[0][:-2] != shapes[2][:-2]:
        return False
    s_q, s_k, s_v = (op.labels.collapsed(op.of(node), [-2]) for node in (q, k, v))
    fixed = torch.tensor(FIXED_LABEL)
    op.labels.equal(op.labels.total(s_q, s_k), fixed)
    for other in nodes[3:]:
        op.labels.equal(op.of(other), fixed)
    return op.put(s_v, *(fixed for _ in op.plain.results[1:]))


@channel_rule("embedding")
def embedding(op: ChannelOperation) -> bool:
    """Rows of the table: their labels are equal, and each entry keeps its own."""
    table = op.of(op.arguments["weight"])
    return op.put(op.labels.collapsed(table, [0]))


def _affine(op: ChannelOperation) -> Tensor:
    """The labels of γ and of β; without γ nothing moves."""
    weight = op.arguments.get("weight")
    labels = torch.tensor(FIXED_LABEL) if weight is None else op.of(weight)
    if op.arguments.get("bias") is not None:
        op.labels.equal(op.of(op.arguments["bias"]), labels)
    return labels


@channel_rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional")
@channel_rule("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_impl_index")
@channel_rule("_batch_norm_with_update", "_batch_norm_with_update_functional", "_batch_norm_no_update")
@channel_rule("batch_norm_with_update", "batch_norm_with_update_functional")
def batch_norm(op: ChannelOperation) -> bool:
    """Every channel's scale is free, with its running statistics moving along; a_γ = a_β = s_out."""
    x = op.arguments["input"]
    shape = x.meta["val"].shape
    if len(op.plain.results) > 5:
        return False
    s = _per_channel(op, op.of(x), 1, shape[1])
    mean, variance = op.arguments.get("running_mean"), op.arguments.get("running_var")
    eps = float(op.arguments.get("eps", op.arguments.get("epsilon", 0.0)))
    if isinstance(mean, fx.Node) and isinstance(variance, fx.Node):
        op.graph.batch_statistics(op.plain, mean, variance, eps, s)
    else:
        op.graph.inexact(op.plain)
    results = [_along(_affine(op).expand(shape[1]), 1, len(shape))]
    s = op.labels.without_any(s)
    results += [op.labels.multiple(s, degree) for degree in (1, -1, 1, 2)][: len(op.plain.results) - 1]
    return op.put(*results)


@channel_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(op: ChannelOperation) -> bool:
    """Normalised over the last axes: one scale there, free up to ε; a_γ = a_β = s_out."""
    x, dims = op.plain.first, op.arguments["normalized_shape"]
    s = op.labels.without_any(op.labels.collapsed(op.of(x), range(-len(dims), 0)))
    op.graph.inexact(op.plain)
    degrees = (-1,) if op.name == "_fused_rms_norm" else (1, -1)
    rest = [op.labels.multiple(s, degree) for degree, _ in zip(degrees, op.plain.results[1:], strict=False)]
    return op.put(_affine(op), *rest)


@channel_rule("group_norm", "native_group_norm")
def group_norm(op: ChannelOperation) -> bool:
    """Normalised over groups of channels: one scale in each, free up to ε; a_γ = a_β = s_out."""
    x = op.plain.first
    shape, groups = x.meta["val"].shape, int(op.arguments.get("num_groups", op.arguments.get("group", 1)))
    s = op.labels.without_any(_per_channel(op, op.of(x), 1, shape[1]))
    s = op.labels.collapsed(s.reshape(groups, -1), [1])
    op.graph.inexact(op.plain)
    degrees = zip((1, -1), op.plain.results[1:], strict=False)
    rest = [op.labels.multiple(s, degree).reshape(1, -1) for degree, _ in degrees]
    return op.put(_along(_affine(op).expand(shape[1]), 1, len(shape)), *rest)


def apply_channel_rule(op: ChannelOperation) -> bool:
    """Add an operation's equations on labels.

    Args:
        op: The operation.

    Returns:
        False if there is no rule, or it does not hold here: then the rule for tensors has to be applied.
    """
    rule = CHANNEL_RULES.get(op.name)
    return rule is not None and rule(op)
