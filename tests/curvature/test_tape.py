"""The tape finds every use of every parameter, and gives the name "hessian" exactly where it is true."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature.graph.tape import operation, read_tape
from ms_optim.errors import CurvatureError


def tape_of(function, **shapes):
    """The tape of ``function(x, parameters…)`` at x ``[4, 3]``."""
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return read_tape(function(torch.randn(4, 3), **parameters), parameters)


def written(y):
    """Two columns of y, written in place into a tensor of zeros."""
    out = torch.zeros_like(y)
    out[:, 1:] = y[:, 1:]
    return out


# name: (function of x [4, 3] and parameters, shapes, the parameters that are not "hessian")
KINDS = {
    "a linear layer": (lambda x, w, b: F.linear(x, w, b), {"w": (3, 3), "b": (3,)}, ""),
    "relu": (lambda x, v, w: F.relu(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "relu in place": (lambda x, v, w: F.relu_(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "relu6": (lambda x, v, w: F.relu6(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "hard sigmoid": (lambda x, v, w: F.hardsigmoid(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "hard swish": (lambda x, v, w: F.hardswish(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, "v"),
    "maxout": (lambda x, v, w: torch.maximum(x @ v, x @ w), {"v": (3, 3), "w": (3, 3)}, ""),
    "absolute value": (lambda x, v, w: (x @ v).abs() @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "gelu downstream": (lambda x, v, w: F.gelu(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, "v"),
    "gelu upstream": (lambda x, v, w: F.relu(F.gelu(x) @ v) @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "a bias after the nonlinearity": (lambda x, v, b: F.gelu(x @ v) + b, {"v": (3, 3), "b": (3,)}, "v"),
    "a bias before the nonlinearity": (lambda x, v, b: F.silu(x @ v + b), {"v": (3, 3), "b": (3,)}, "v b"),
    "a sum of two branches": (lambda x, v, w: F.relu(x @ v) + F.tanh(x @ w), {"v": (3, 3), "w": (3, 3)}, "w"),
    "a residual sum": (lambda x, v, w: (x @ v) + F.relu(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "a weight twice in parallel": (lambda x, v: F.relu(x @ v) + F.relu(-x @ v), {"v": (3, 3)}, ""),
    "a weight twice in series": (lambda x, v, w: F.relu(F.relu(x @ v) @ v) @ w, {"v": (3, 3), "w": (3, 3)}, "v"),
    "a weight and its transpose in series": (lambda x, v: F.linear(F.linear(x, v), v.t()), {"v": (2, 3)}, "v"),
    "a layer scale": (lambda x, v, g: (x @ v) * g, {"v": (3, 3), "g": (3,)}, ""),
    "a layer scale by its own weight": (lambda x, v: (x @ v) * v[0], {"v": (3, 3)}, "v"),
    "a gate": (lambda x, v, w: F.relu(x @ v) * F.relu(x @ w), {"v": (3, 3), "w": (3, 3)}, ""),
    "a gate computed from what it gates": (
        lambda x, u, w: (lambda h: h * F.hardsigmoid(h @ w))(F.relu(x @ u)),
        {"u": (3, 3), "w": (3, 3)},
        "u",
    ),
    "a square": (lambda x, v: (x @ v) * (x @ v), {"v": (3, 3)}, "v"),
    "a division by a constant": (lambda x, v: (x @ v) / 3.0, {"v": (3, 3)}, ""),
    "a division by an activation": (lambda x, v, w: (x @ v) / (x @ w), {"v": (3, 3), "w": (3, 3)}, "w"),
    "a power": (lambda x, v: (x @ v).pow(3), {"v": (3, 3)}, "v"),
    "softmax attention": (
        lambda x, q, k, v: (x @ q @ (x @ k).t()).softmax(-1) @ (x @ v),
        {"q": (3, 3), "k": (3, 3), "v": (3, 3)},
        "q k",
    ),
    "linear attention": (
        lambda x, q, k, v: (x @ q) @ ((x @ k).t() @ (x @ v)),
        {"q": (3, 3), "k": (3, 3), "v": (3, 3)},
        "",
    ),
    "fused attention": (
        lambda x, q, w: F.scaled_dot_product_attention((x @ q)[None, None], x[None, None], x[None, None])[0, 0] @ w,
        {"q": (3, 3), "w": (3, 3)},
        "q",
    ),
    "layer norm": (
        lambda x, v, g, b: F.layer_norm(x @ v, (3,), g, b),
        {"v": (3, 3), "g": (3,), "b": (3,)},
        "v",
    ),
    "group norm": (
        lambda x, v, g, b, w: F.relu(F.group_norm(x @ v, 1, g, b)) @ w,
        {"v": (3, 3), "g": (3,), "b": (3,), "w": (3, 3)},
        "v",
    ),
    "rms norm": (lambda x, v, g: F.rms_norm(x @ v, (3,), g), {"v": (3, 3), "g": (3,)}, "v"),
    "batch norm with constant statistics": (
        lambda x, v, g, b: F.batch_norm(x @ v, torch.zeros(3), torch.ones(3), g, b),
        {"v": (3, 3), "g": (3,), "b": (3,)},
        "",
    ),
    "max pooling": (lambda x, v: F.max_pool1d((x @ v)[:, None], 2).flatten(1), {"v": (3, 3)}, ""),
    "power-average pooling": (lambda x, v: F.lp_pool1d((x @ v)[:, None], 2.0, 2).flatten(1), {"v": (3, 3)}, "v"),
    "circular padding": (
        lambda x, k: F.conv1d(F.pad(x[:, None], (1, 1), "circular"), k).flatten(1),
        {"k": (1, 1, 3)},
        "",
    ),
    "writing into a slice": (lambda x, v, w: written(x @ v) @ w, {"v": (3, 3), "w": (3, 3)}, ""),
    "a learned slope": (
        lambda x, v, s, w: F.prelu(x @ v, s) @ w,
        {"v": (3, 3), "s": (3,), "w": (3, 3)},
        "",
    ),
    "a stack of views": (
        lambda x, v: torch.stack([(x @ v)[:, i] for i in (2, 0)], 1).roll(1, 0).flip(1).repeat(1, 2),
        {"v": (3, 3)},
        "",
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_kind_is_decided_from_the_graph(case):
    function, shapes, tainted = KINDS[case]
    kind = tape_of(function, **shapes).kind
    assert {name for name in kind if kind[name] == "gauss-newton"} == set(tainted.split())
    assert set(kind.values()) <= {"hessian", "gauss-newton"}


class Unknown(torch.autograd.Function):
    """The identity, by an operation that no table knows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_an_unknown_operation_makes_the_weaker_claim():
    kind = tape_of(lambda x, v, w: Unknown.apply(x @ v) @ w, v=(3, 3), w=(3, 3)).kind
    assert kind == {"v": "gauss-newton", "w": "hessian"}


TRANSPOSITIONS = {
    "x @ w": (lambda x, w: x @ w, False),
    "linear": (lambda x, w: F.linear(x, w), True),
    "w.t()": (lambda x, w: x @ w.t(), True),
    "w.T": (lambda x, w: x @ w.T, True),
    "w.mT": (lambda x, w: x @ w.mT, True),
    "transpose(-1, 0)": (lambda x, w: x @ w.transpose(-1, 0), True),
    "transpose(0, 0)": (lambda x, w: x @ w.transpose(0, 0), False),
    "permute(-1, 0)": (lambda x, w: x @ w.permute(-1, 0), True),
    "permute(0, 1)": (lambda x, w: x @ w.permute(0, 1), False),
    "linear of w.t()": (lambda x, w: F.linear(x, w.t()), False),
    "linear of w.T.t()": (lambda x, w: F.linear(x, w.T.t()), True),
}


@pytest.mark.parametrize("case", TRANSPOSITIONS)
def test_a_weight_is_found_behind_any_number_of_transpositions(case):
    function, transposed = TRANSPOSITIONS[case]
    (use,) = tape_of(function, w=(3, 3)).uses["w"]
    assert (use.operation, use.slot, use.transposed) == ("Mm", 1, transposed)


def test_every_use_of_a_parameter_is_found():
    tape = tape_of(lambda x, v, w: F.linear(F.relu(F.linear(x, v)) @ v, v.t()) @ w, v=(3, 3), w=(3, 2))
    assert [(use.operation, use.transposed) for use in tape.uses["v"]] == [("Mm", True), ("Mm", False), ("Mm", False)]
    assert [use.shape for use in tape.uses["w"]] == [(3, 2)]


def test_one_transposed_view_used_twice_is_two_uses():
    def forward(x, v):
        view = v.t()
        return F.relu(x @ view) + F.relu(-x @ view)

    assert len(tape_of(forward, v=(3, 3)).uses["v"]) == 2


# name: (function of x [4, 3] and w, shape of w, path and slot of each use)
DERIVED = {
    "a multiple": (lambda x, w: x @ (2 * w).t(), (3, 3), ["Mul -> T -> Mm 1"]),
    "a reshaped scale": (lambda x, w: x * w.view(1, 3), (3, 1), ["View -> Mul 1"]),
    "an expanded scale": (lambda x, w: x * w.expand(4, 3), (1, 3), ["Mul 1"]),
    "a token for every sample": (lambda x, w: F.gelu(w.expand(4, 3)), (1, 3), ["Expand 0"]),
    "a normalised matrix": (lambda x, w: F.linear(x, w / w.norm()), (3, 3), ["Div -> T -> Mm 1"]),
    "a sum of products": (lambda x, w: F.linear(x, w + w @ w), (3, 3), ["Add -> T -> Mm 1"]),
    "two parts of one tensor": (
        lambda x, w: F.linear(x, w[:3], w[3]),
        (4, 3),
        ["Select -> Addmm 0", "Slice -> T -> Addmm 2"],
    ),
    "the data as a matrix": (lambda x, w: F.relu(x @ w) @ w, (3, 3), ["Mm 1", "Mm 1"]),
    "the data as rows that are scaled": (lambda x, w: (x * w) @ torch.eye(3), (3,), ["Mul 1"]),
    "a form that is also used without a rule": (
        lambda x, w: (lambda v: x @ v + torch.atan2(x, v[:1]))(w.exp()),
        (3, 3),
        ["Exp 0"],
    ),
    "a layer on another's output": (
        lambda x, w: (lambda v: F.relu(x @ v) @ v)(2 * w),
        (3, 3),
        ["Mul -> Mm 1", "Mul -> Mm 1"],
    ),
}


@pytest.mark.parametrize("case", DERIVED)
def test_what_takes_another_form_of_a_parameter_is_its_use(case):
    function, shape, expected = DERIVED[case]
    uses = tape_of(function, w=shape).uses["w"]
    assert [f"{use.path} {use.slot}" for use in uses] == expected


def test_a_form_made_of_several_parameters_is_a_use_of_each():
    tape = tape_of(
        lambda x, v, w, b: F.linear(x, v + w.t(), torch.cat([b, torch.zeros(1), b])), v=(3, 3), w=(3, 3), b=(1,)
    )
    paths = {name: [use.path for use in uses] for name, uses in tape.uses.items()}
    assert paths == {"v": ["Add -> T -> Addmm"], "w": ["T -> Add -> T -> Addmm"], "b": ["Cat -> Addmm"]}


def test_of_one_sample_the_first_operation_with_a_rule_is_the_use():
    w, v = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
    tape = read_tape((torch.randn(1, 3) @ w + v) * v, {"w": w, "v": v})
    assert [use.path for use in tape.uses["w"]] == ["Mm"]


def test_a_form_below_another_use_of_its_parameter_is_not_counted_twice():
    # Of one sample the activations look like functions of the parameters; what they are used for again is not.
    w = nn.Parameter(torch.randn(3, 3))
    x = torch.randn(1, 3)
    y = F.relu(x @ w) + torch.ones(3)
    logits = F.relu(y @ w) + y
    (use, other) = read_tape(logits, {"w": w}).uses["w"]
    assert use.path == other.path == "Mm"


def test_a_parameter_that_the_logits_ignore_has_no_use_and_the_kind_of_zero():
    tape = tape_of(lambda x, v, w: x @ v + 0.0 * float(w.detach().sum()), v=(3, 3), w=(3,))
    assert tape.uses["w"] == [] and tape.kind["w"] == "hessian"


def test_inputs_and_parameters_that_were_not_asked_for_are_not_uses():
    other, x = nn.Parameter(torch.randn(3, 3)), torch.randn(4, 3, requires_grad=True)
    v = nn.Parameter(torch.randn(3, 3))
    tape = read_tape(F.gelu(x @ other) @ v, {"v": v})
    assert len(tape.uses["v"]) == 1 and tape.kind == {"v": "hessian"}


def test_a_very_deep_graph_is_read():
    v = nn.Parameter(torch.eye(3))
    y = torch.randn(4, 3) @ v
    for _ in range(3000):  # deeper than Python's stack
        y = F.relu(y + 1.0)
    assert read_tape(y, {"v": v}).kind == {"v": "hessian"}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda x: F.relu(x), "Relu"),
        (lambda x: F.leaky_relu_(x.clone()), "LeakyRelu"),
        (lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 2)), "Convolution"),
        (lambda x: F.max_pool2d(x[None, None], 2), "MaxPool2DWithIndices"),
        (lambda x: F.layer_norm(x, (3,)), "NativeLayerNorm"),
        (lambda x: x.sum(), "Sum"),
        (Unknown.apply, "Unknown"),
    ],
)
def test_an_operation_has_the_name_of_what_it_differentiates(make, name):
    assert operation(make(torch.randn(4, 3, requires_grad=True)).grad_fn) == name


def test_statistics_of_the_batch_in_the_graph_are_refused():
    with pytest.raises(CurvatureError, match="training=True"):
        tape_of(lambda x, v: F.batch_norm(x @ v, None, None, training=True), v=(3, 3))


def test_statistics_of_parameters_and_of_instances_are_read():
    def standardised(x, v, w):
        return x @ F.batch_norm(v[None], None, None, training=True)[0] @ w

    assert tape_of(standardised, v=(3, 3), w=(3, 3)).kind == {"v": "gauss-newton", "w": "hessian"}

    def instances(x, v, w):
        return F.instance_norm((x @ v)[:, None]).flatten(1) @ w

    assert tape_of(instances, v=(3, 3), w=(3, 3)).kind == {"v": "gauss-newton", "w": "hessian"}


def test_rows_of_weights_are_not_rows_of_samples():
    def forward(x, v, w):  # vᵀ w has as many rows as there are samples, and is no batch
        return (x @ v) @ (v.t() @ w)

    tape = tape_of(forward, v=(3, 4), w=(3, 4))
    batch = [node for node in tape.layouts if operation(node) == "Mm"]
    assert len(batch) == 2  # the logits and x v


def test_reentrant_checkpoints_are_refused_and_the_others_are_read():
    from torch.utils.checkpoint import checkpoint

    v, w = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))

    def logits(use_reentrant):
        x = torch.randn(4, 3, requires_grad=use_reentrant)
        return checkpoint(lambda h: F.relu(h @ v), x, use_reentrant=use_reentrant) @ w

    with pytest.raises(CurvatureError, match="use_reentrant=False"):
        read_tape(logits(True), {"v": v, "w": w})
    assert [len(uses) for uses in read_tape(logits(False), {"v": v, "w": w}).uses.values()] == [1, 1]
