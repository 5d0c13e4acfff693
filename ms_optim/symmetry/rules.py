"""How a scale passes an operation: one rule per family of operations, in a table by name.

Every tensor x of the graph is given a log-scale s: the symmetry maps x to e^s x.  A rule adds the equations between the
scales of an operation's inputs and outputs under which the operation commutes with that map:

    homogeneous of degree one (ReLU, pooling, reshapes, mean, ...)    s_out = s_in
    multilinear (linear, convolution, matmul, multiply, einsum)       s_out = Σ s_i
    sums and choices (add, concat, maximum, where)                    all equal
    a power p                                                         s_out = p s_in
    normalisers (BatchNorm, LayerNorm, GroupNorm, RMSNorm)            s_in free, s_out = a_γ = a_β
    scaled dot-product attention                                      s_q + s_k = 0, s_out = s_v

A constant has s = 0, but zeros and infinities equal any multiple of themselves and fit every scale.  Integers and
booleans have s = 0: what makes them is opaque, or takes equations under which they do not change.

What has no rule, or a rule that returns a reason, is opaque: s = 0 on all of its inputs and outputs, and reported.

Names are those of torch's operators without namespace and overload, as ``torch.export`` emits them after
``run_decompositions({})`` (in-place operations are functional there); the fused and decomposed variants of other
versions stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from .linear_system import FIXED
from .operation import Operation, fits_any_scale, is_moving, is_scalable

Rule = Callable[[Operation], "str | None"]
SCALE_RULES: dict[str, Rule] = {}


def scale_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how a scale passes operations.

    Args:
        names: Operators without overload: ``"relu"`` for ``aten.relu.*``, ``"library.name"`` for other namespaces.

    Returns:
        The decorator. The rule it takes adds equations to ``op.system`` and returns ``None``, or returns the reason why
        the operation is opaque and adds nothing.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            if name in SCALE_RULES:
                raise ValueError(f"{name} already has the rule {SCALE_RULES[name].__name__}; a second would hide it")
            SCALE_RULES[name] = rule
        return rule

    return register


RELU_FAMILY = ("relu", "leaky_relu", "rrelu", "rrelu_with_noise", "rrelu_with_noise_functional", "abs", "neg")
POOLING = (
    *(f"{kind}_pool{d}d{end}" for kind in ("max", "adaptive_max") for d in "123" for end in ("", "_with_indices")),
    *(f"{kind}_pool{d}d" for kind in ("avg", "adaptive_avg", "_adaptive_avg") for d in "123"),
    *("fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d", "max_unpool3d"),
)
REDUCTIONS = (
    *("mean", "sum", "nansum", "nanmean", "amax", "amin", "cummax", "cummin", "cumsum", "median"),
    *("nanmedian", "mode", "kthvalue", "topk", "sort", "msort", "std", "trace"),
)
RESHAPES = (
    *("view", "_unsafe_view", "_reshape_copy", "view_copy", "view_as", "reshape", "reshape_as", "flatten", "unflatten"),
    *("permute", "transpose", "t", "numpy_T", "mT", "mH", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "expand_copy", "broadcast_to", "repeat", "repeat_interleave"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "unbind"),
    *("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "split_copy", "split_with_sizes_copy", "unbind_copy"),
    *("permute_copy", "transpose_copy", "t_copy", "squeeze_copy", "unsqueeze_copy", "slice_copy", "select_copy"),
    *("index", "_unsafe_index", "index_select", "gather", "take", "take_along_dim", "masked_select", "roll", "flip"),
    *("fliplr", "flipud", "rot90", "diagonal", "diag", "diag_embed", "tril", "triu", "unfold", "im2col", "col2im"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "as_strided", "real", "imag"),
    *("view_as_real", "view_as_complex", "atleast_1d", "atleast_2d", "atleast_3d", "ravel", "tile"),
)
COPIES = (
    *("clone", "contiguous", "to", "_to_copy", "type_as", "detach", "detach_copy", "alias", "alias_copy", "lift"),
    *("lift_fresh", "lift_fresh_copy", "positive", "resolve_conj", "resolve_neg", "conj", "_conj", "conj_physical"),
)
UPSAMPLING = (
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")),
    *("upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
REFLECTIONS = tuple(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in "123")


@scale_rule(*POOLING, *REDUCTIONS, *RESHAPES, *COPIES)
@scale_rule(*RELU_FAMILY, *UPSAMPLING, *REFLECTIONS, "dropout", "native_dropout", "feature_dropout")
def homogeneous(op: Operation) -> str | None:
    """f(c x) = c f(x) for c > 0: the outputs carry the scale of the first input (index outputs do not move)."""
    results = op.results
    if not isinstance(op.first, fx.Node):
        return "does not take a tensor first"
    if op.name in ("view", "view_copy") and "dtype" in op.arguments:
        return "reinterprets the bits of its input"
    if not is_scalable(results[0]) and getattr(results[0], "dtype", torch.bool) != torch.bool and is_moving(op.first):
        return f"rounds to {results[0].dtype}"
    scales = zip(op.outputs, results, strict=True)
    op.system.equal(op.scale(op.first), *(scale for scale, result in scales if is_scalable(result)))
    return None


@scale_rule("linalg_vector_norm", "norm")
def vector_norm(op: Operation) -> None:
    """A norm is homogeneous, but the "norm" of order 0 counts: s_out = 0."""
    order = op.arguments.get("ord", op.arguments.get("p"))
    op.system.equal(op.output, FIXED if order == 0 else op.scale(op.first))


@scale_rule("pad", "constant_pad_nd")
def padding(op: Operation) -> str | None:
    """Padding with zeros, infinities or the tensor's own values is homogeneous."""
    value = op.arguments.get("value")
    if op.arguments.get("mode", "constant") == "constant" and not fits_any_scale(value):
        return f"pads with {value}, which does not scale"
    op.system.equal(op.output, op.scale(op.first))
    return None


@scale_rule("prelu", "_prelu_kernel")
def prelu(op: Operation) -> None:
    """PReLU: the slope stays, a = 0."""
    x, slope = op.inputs[:2]
    op.system.equal(op.scale(slope), FIXED)
    op.system.equal(op.output, op.scale(x))


@scale_rule("threshold", "clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
def clipping(op: Operation) -> str | None:
    """max(x, b), min(x, b): a number as a bound must be 0 or infinite; a tensor must scale as x does."""
    x, *bounds = op.inputs
    numbers = [b for b in bounds if not isinstance(b, fx.Node) and not fits_any_scale(b)]
    if numbers:
        return f"a threshold at {numbers[0]} does not scale"
    op.system.equal(op.output, op.scale(x), *(op.scale(b) for b in bounds if isinstance(b, fx.Node)))
    return None


@scale_rule("linear", "convolution", "_convolution", "conv1d", "conv2d", "conv3d")
@scale_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear")
def weighted_sum(op: Operation) -> None:
    """s_out = s_in + a_W (both inputs, for a bilinear map); the bias is added to the output, a_b = s_out."""
    factors = [value for name, value in op.arguments.items() if name in ("input", "input1", "input2", "weight")]
    op.system.equal(op.output, sum((op.scale(factor) for factor in factors), FIXED))
    if op.arguments.get("bias") is not None:
        op.system.equal(op.scale(op.arguments["bias"]), op.output)


@scale_rule("mul", "multiply", "matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "einsum", "kron")
@scale_rule("tensordot", "chain_matmul", "linalg_multi_dot")
def product(op: Operation) -> None:
    """A product of any number of factors: s_out = Σ s_i; numbers and constants count 0."""
    op.system.equal(op.output, sum((op.scale(factor) for factor in op.inputs), FIXED))


@scale_rule("addmm", "addmv", "addbmm", "baddbmm", "addr")
def sum_with_product(op: Operation) -> None:
    """β b + α x y: s_out = s_b = s_x + s_y."""
    b, x, y = op.inputs[:3]
    op.system.equal(op.output, op.scale(x) + op.scale(y), op.scale(b))


@scale_rule("addcmul", "addcdiv")
def sum_with_elementwise(op: Operation) -> None:
    """b + c x y, b + c x / y: s_out = s_b = s_x ± s_y."""
    b, x, y = op.inputs[:3]
    op.system.equal(op.output, op.scale(x) + op.scale(y) * (-1 if op.name == "addcdiv" else 1), op.scale(b))


@scale_rule("div", "divide", "true_divide")
def quotient(op: Operation) -> str | None:
    """s_out = s_x − s_y, unless the quotient is rounded."""
    if op.arguments.get("rounding_mode") is not None:
        return "rounds the quotient"
    x, y = op.inputs[:2]
    op.system.equal(op.output, op.scale(x) - op.scale(y))
    return None


@scale_rule("scaled_dot_product_attention", "_scaled_dot_product_attention_math")
@scale_rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")
@scale_rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@scale_rule("_scaled_dot_product_fused_attention_overrideable")
def attention(op: Operation) -> None:
    """softmax(q kᵀ + mask) v: s_q + s_k = 0, s_mask = 0, s_out = s_v; log-sum-exp does not move."""
    q, k, v, *others = op.inputs
    op.system.equal(op.scale(q) + op.scale(k), FIXED, *(op.scale(other) for other in others))
    out, *rest = op.outputs
    op.system.equal(out, op.scale(v))
    op.system.equal(FIXED, *rest)


@scale_rule("embedding", "embedding_bag", "_embedding_bag")
def embedding(op: Operation) -> None:
    """Rows of the table: s_out = a_W, times the weights per sample where there are any."""
    weights = op.arguments.get("per_sample_weights")
    op.system.equal(op.output, op.scale(op.first) + op.scale(weights))


@scale_rule("add", "sub", "subtract", "rsub", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
@scale_rule("maximum", "minimum", "fmax", "fmin", "where", "masked_fill", "masked_scatter", "hypot", "block_diag")
@scale_rule("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "index_put", "fmod")
@scale_rule("scatter", "scatter_add", "index_add", "index_copy", "index_fill", "_unsafe_index_put", "remainder")
@scale_rule("complex")
def alternatives(op: Operation) -> str | None:
    """Terms of a sum, or values to choose from, scale as the output; a number other than 0, ±∞ fixes it."""
    # Multipliers and positions are no terms.
    passive = {"alpha", "dim", "dim1", "dim2", "index", "indices", "mask", "condition", "start", "end", "step"}
    passive |= {"accumulate", "size", "stride", "storage_offset", "offset"}
    if op.arguments.get("reduce") is not None:
        return f"combines by {op.arguments['reduce']}"
    terms: list[Any] = []
    for name, value in op.arguments.items():
        if name not in passive:
            terms.extend(value if isinstance(value, (list, tuple)) else [value])
    op.system.equal(op.output, *(op.scale(term) for term in terms if not fits_any_scale(term)))
    return None


@scale_rule("max", "min")
def extremum(op: Operation) -> str | None:
    """The largest entry of a tensor is homogeneous; of two tensors, a choice between them."""
    return alternatives(op) if "other" in op.arguments else homogeneous(op)


@scale_rule("lerp")
def interpolation(op: Operation) -> None:
    """x + w (y − x): s_out = s_x = s_y, s_w = 0."""
    x, y, w = op.inputs[:3]
    op.system.equal(op.output, op.scale(x), op.scale(y))
    op.system.equal(op.scale(w), FIXED)


@scale_rule("copy")
def overwriting(op: Operation) -> None:
    """What was there before does not matter: s_out = s of the source."""
    op.system.equal(op.output, op.scale(op.arguments["src"]))


@scale_rule("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal")
def comparison(op: Operation) -> None:
    """x > y is the same for c x > c y: the scales are equal; a comparison with 0 leaves the scale free."""
    terms = [op.scale(term) for term in op.inputs if not fits_any_scale(term)]
    op.system.equal(*terms)


@scale_rule("sign", "sgn", "signbit", "angle", "argmax", "argmin", "argsort", "isnan", "isinf", "isfinite")
@scale_rule("logical_not", "logical_and", "logical_or", "logical_xor", "any", "all", "nonzero", "count_nonzero")
@scale_rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size", "sym_numel", "sym_stride")
def scale_invariant(op: Operation) -> None:
    """f(c x) = f(x): the input is free, the output does not move."""
    op.system.equal(FIXED, *op.outputs)


@scale_rule("pow", "square", "sqrt", "rsqrt", "reciprocal")
def power(op: Operation) -> str | None:
    """xᵖ: s_out = p s_in."""
    known = {"square": 2, "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "reciprocal": -1}
    exponent = known.get(op.name, op.arguments.get("exponent"))
    base = op.first
    if not isinstance(base, fx.Node) or not isinstance(exponent, (int, float, Fraction)) or not math.isfinite(exponent):
        return "the exponent is not a number"
    p = Fraction(exponent)
    # 1/3 as a binary fraction has a denominator of 2⁵⁴, of which no integer basis can be made.
    if p.denominator > 64:
        return f"the exponent {exponent} is not a short fraction"
    op.system.equal(op.output, op.scale(base) * p)
    return None


@scale_rule("var", "var_mean", "std_mean")
def moments(op: Operation) -> None:
    """Variance: 2 s_in; standard deviation and mean: s_in."""
    spread, *mean = op.outputs
    op.system.equal(spread, op.scale(op.first) * (1 if op.name == "std_mean" else 2))
    op.system.equal(op.scale(op.first), *mean)


@scale_rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional")
@scale_rule("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_impl_index")
@scale_rule("_batch_norm_with_update", "_batch_norm_with_update_functional", "_batch_norm_no_update")
@scale_rule("batch_norm_with_update", "batch_norm_with_update_functional", "instance_norm")
def batch_norm(op: Operation) -> None:
    """γ (x − mean) / √(var + ε) + β: s_in free, with running statistics moving along; a_γ = a_β = s_out."""
    x, s = op.arguments["input"], op.scale(op.arguments["input"])
    mean, variance = op.arguments.get("running_mean"), op.arguments.get("running_var")
    eps = float(op.arguments.get("eps", op.arguments.get("epsilon", 0.0)))
    if isinstance(mean, fx.Node) and isinstance(variance, fx.Node):
        op.graph.running_statistics(op, mean, variance, eps, s)
    _affine(op)
    # Beyond the output: the statistics that were used, in the units of x (save_mean, save_invstd, new running ones).
    degrees = (1, -1, 1, 2) if op.name != "instance_norm" else ()
    for output, degree in zip(op.outputs[1:], degrees, strict=False):
        op.system.equal(output, s * degree)
    if mean is None and isinstance(x, fx.Node):
        # Without running statistics ε stands still in evaluation mode too.
        op.graph.inexact(op)


@scale_rule("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm", "_fused_rms_norm")
def sample_norm(op: Operation) -> None:
    """γ x / scale(x) + β per sample: s_in free (up to ε), a_γ = a_β = s_out."""
    _affine(op)
    # Beyond the output: the mean, which has the units of x, and the inverse standard deviation.
    degrees = (-1,) if op.name == "_fused_rms_norm" else (1, -1)
    for output, degree in zip(op.outputs[1:], degrees, strict=False):
        op.system.equal(output, op.scale(op.first) * degree)
    op.graph.inexact(op)


def _affine(op: Operation) -> None:
    """The output of a normaliser has the scale of γ and of β; without γ it does not move."""
    op.system.equal(op.output, op.scale(op.arguments.get("weight")))
    if op.arguments.get("bias") is not None:
        op.system.equal(op.output, op.scale(op.arguments["bias"]))


@scale_rule("_weight_norm", "_weight_norm_interface")
def weight_norm(op: Operation) -> None:
    """g v / ‖v‖: s_out = s_g, and v is free; the norm ‖v‖ moves with v."""
    v, g = op.inputs[:2]
    out, *norm = op.outputs
    op.system.equal(out, op.scale(g))
    op.system.equal(op.scale(v), *norm)


@scale_rule("zeros", "zeros_like", "new_zeros", "zero", "empty", "empty_like", "new_empty", "empty_strided")
@scale_rule("new_empty_strided", "empty_permuted")
def zeros(op: Operation) -> None:
    """Zeros fit any scale, and what is not initialised is written before it is read: nothing to add."""


@scale_rule("full", "full_like", "new_full", "fill", "scalar_tensor")
def filled(op: Operation) -> None:
    """A constant does not move, unless it is 0 or infinite."""
    value = op.arguments.get("fill_value", op.arguments.get("value", op.arguments.get("s")))
    if isinstance(value, fx.Node):
        op.system.equal(op.output, op.scale(value))
    elif not fits_any_scale(value):
        op.system.equal(op.output, FIXED)


@scale_rule("ones", "ones_like", "new_ones", "arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices")
@scale_rule("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "one_hot", "hann_window")
def constant(op: Operation) -> None:
    """Made from nothing that moves."""
    op.system.equal(FIXED, *op.outputs)


@scale_rule("bernoulli")
def bernoulli(op: Operation) -> None:
    """Random zeros and ones; the probability is a number, or a tensor that must not move."""
    probability = op.arguments.get("p") if "p" in op.arguments else op.first
    op.system.equal(op.output, FIXED, op.scale(probability))


@scale_rule("getitem")
def getitem(op: Operation) -> None:
    """One result of several has a scale already: nothing to add."""


def apply_rule(op: Operation, rules: Mapping[str, Rule] = SCALE_RULES) -> str | None:
    """Add an operation's equations to the system; without a rule that holds, fix all of its tensors.

    Args:
        op: The operation.
        rules: The table.

    Returns:
        ``None``, or the reason why the operation is opaque.
    """
    rule = rules.get(op.name)
    reason = rule(op) if rule is not None else "not known to commute with positive rescaling"
    if reason is not None:
        op.system.equal(FIXED, *(op.scale(node) for node in op.node.all_input_nodes), *op.outputs)
    return reason
