"""One rule per operation: its gradients per sample are autograd's, and its squared norm is that of its gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature.graph import registry
from ms_optim.curvature.graph.backprop import deltas
from ms_optim.curvature.graph.layout import Layout
from ms_optim.curvature.graph.tape import read_tape
from ms_optim.curvature.rules import contraction as contractions
from ms_optim.curvature.rules import outer, reduction
from ms_optim.curvature.rules.contraction import Piece, wide
from ms_optim.curvature.rules.layers import contraction, curvature_rule, has_rule
from ms_optim.errors import NoRuleError

N, C = 3, 2

# name: (function of parameters and x, shapes of the parameters, shape of a sample)
RULES = {
    "linear": (lambda x, w, b: F.linear(x, w, b), {"w": (4, 5), "b": (4,)}, (5,)),
    "linear without a bias": (lambda x, w: F.linear(x, w), {"w": (4, 5)}, (5,)),
    "matrix as it is": (lambda x, w: x @ w, {"w": (5, 4)}, (5,)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), {"w": (5, 4), "b": (4,)}, (5,)),
    "addmm with a row": (lambda x, w, b: torch.addmm(b, x, w), {"w": (5, 4), "b": (1, 4)}, (5,)),
    "one bias for all outputs": (lambda x, w, b: F.linear(x, w, b) ** 2, {"w": (4, 5), "b": (1,)}, (5,)),
    "linear over positions": (lambda x, w, b: F.linear(x, w, b), {"w": (4, 5), "b": (4,)}, (2, 5)),
    "linear over positions without a bias": (lambda x, w: F.linear(x, w), {"w": (4, 5)}, (2, 5)),
    "linear over many positions": (lambda x, w, b: F.linear(x, w, b), {"w": (2, 2), "b": (2,)}, (3, 4, 2)),
    "matrix over positions": (lambda x, w: x @ w, {"w": (5, 4)}, (2, 5)),
    "convolution 1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1, 2), {"w": (4, 2, 3), "b": (4,)}, (2, 8)),
    "convolution 2d": (
        lambda x, w, b: F.conv2d(x, w, b, (1, 2), (2, 1), (2, 1), 2),
        {"w": (4, 1, 3, 2), "b": (4,)},
        (2, 5, 6),
    ),
    "convolution 3d": (
        lambda x, w, b: F.conv3d(x, w, b, (1, 2, 1), (0, 1, 2), (1, 2, 1), 2),
        {"w": (2, 1, 2, 1, 3), "b": (2,)},
        (2, 3, 4, 3),
    ),
    "convolution to one position": (lambda x, w: F.conv2d(x, w), {"w": (4, 2, 3, 3)}, (2, 3, 3)),
    "pointwise convolution": (lambda x, w: F.conv2d(x, w), {"w": (3, 2, 1, 1)}, (2, 5, 5)),
    "convolution of folded channels": (
        lambda x, w, b: F.conv2d(x.flatten(0, 1)[:, None], w, b).unflatten(0, (-1, 2)),
        {"w": (3, 1, 2, 2), "b": (3,)},
        (2, 3, 3),
    ),
    "batch norm": (lambda x, g, b: F.batch_norm(x, *STATISTICS, g, b), {"g": (4,), "b": (4,)}, (4,)),
    "batch norm over positions": (
        lambda x, g, b: F.batch_norm(x, *STATISTICS, g, b),
        {"g": (4,), "b": (4,)},
        (4, 2, 3),
    ),
    "batch norm without a bias": (lambda x, g: F.batch_norm(x, *STATISTICS, g), {"g": (4,)}, (4, 2)),
    "layer norm": (lambda x, g, b: F.layer_norm(x, (4,), g, b), {"g": (4,), "b": (4,)}, (4,)),
    "layer norm over positions": (lambda x, g, b: F.layer_norm(x, (4,), g, b), {"g": (4,), "b": (4,)}, (2, 3, 4)),
    "layer norm over two axes": (lambda x, g, b: F.layer_norm(x, (3, 4), g, b), {"g": (3, 4), "b": (3, 4)}, (2, 3, 4)),
    "layer norm with a large ε": (lambda x, g: F.layer_norm(x, (4,), g, None, 10.0), {"g": (4,)}, (4,)),
    "group norm": (lambda x, g, b: F.group_norm(x, 2, g, b), {"g": (4,), "b": (4,)}, (4,)),
    "group norm over positions": (lambda x, g, b: F.group_norm(x, 2, g, b, 0.1), {"g": (4,), "b": (4,)}, (4, 3, 2)),
    "a bias behind": (lambda x, b: x + b, {"b": (5,)}, (5,)),
    "a bias in front": (lambda x, b: b + x, {"b": (5,)}, (5,)),
    "a number": (lambda x, b: (x + b) ** 2, {"b": ()}, (5,)),
    "a bias per channel": (lambda x, b: x + b, {"b": (2, 1, 1)}, (2, 3, 4)),
    "a table of positions": (lambda x, b: x + b, {"b": (1, 3, 4)}, (3, 4)),
    "a table broadcast along one axis": (lambda x, b: (x + b) ** 2, {"b": (1, 3, 1)}, (3, 4)),
}
STATISTICS = (torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(0.3, 2, 4, dtype=torch.float64))


def drawn(case):
    """Logits [N, 3] behind a nonlinear readout, the parameters, columns [C, N, 3] to send back."""
    function, shapes, sample = RULES[case]
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    x = torch.randn(N, *sample, requires_grad=True)
    out = function(x, **parameters)
    readout = torch.randn(out[0].numel(), 3)
    return torch.tanh(out.flatten(1)) @ readout, parameters, torch.randn(C, N, 3)


def gradients_by_autograd(logits, parameter, columns):
    """g_cn = ∂ ⟨S_cn, o_n⟩ / ∂W, one backward pass each: ``[C, N, *W.shape]``."""
    rows = [
        torch.autograd.grad((columns[c, n] * logits[n]).sum(), parameter, retain_graph=True)[0]
        for c in range(C)
        for n in range(N)
    ]
    return torch.stack(rows).unflatten(0, (C, N))


def assert_sums_are_those(rule, delta, gradients):
    """Trace and diagonal of δ in two pieces, and the norm in one, are those of gradients ``[C, N, *W.shape]``."""
    for make, sums in (
        (rule.trace, gradients.flatten(2).square().sum((0, 2)) if gradients.ndim > 2 else gradients.square().sum(0)),
        (rule.diagonal, gradients.square().sum((0, 1))),
    ):
        for columns in (C, 50):  # the number that is announced decides the route only
            accumulator = make(columns)
            accumulator.add(Piece(delta[:1]))
            accumulator.add(Piece(delta[1:]))
            torch.testing.assert_close(accumulator.result(), sums, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(rule.squared_norm(delta), gradients.square().sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("case", RULES)
def test_gradients_of_a_rule_are_those_of_autograd(case, monkeypatch):
    logits, parameters, columns = drawn(case)
    for name, (use,) in read_tape(logits, parameters).uses.items():
        (delta,) = deltas(logits, [use.node], columns)
        rule = contraction(use, Layout(N))
        expected = gradients_by_autograd(logits, parameters[name], columns)
        torch.testing.assert_close(rule.gradients(delta), expected, rtol=1e-10, atol=1e-12)
        assert_sums_are_those(rule, delta, expected)
        monkeypatch.setattr(contractions, "_CHUNK_BYTES", 1)  # one sample at a time
        assert_sums_are_those(rule, delta, expected)


@pytest.mark.parametrize("case", ["linear over many positions", "linear over positions", "pointwise convolution"])
def test_direct_and_gram_routes_agree(case, monkeypatch):
    logits, parameters, columns = drawn(case)
    (use,) = read_tape(logits, parameters).uses["w"]
    (delta,) = deltas(logits, [use.node], columns)
    expected = gradients_by_autograd(logits, parameters["w"], columns)
    for gram in (False, True):
        monkeypatch.setattr(outer.Outer, "prefers_gram", lambda self, columns, gram=gram: gram)
        assert_sums_are_those(contraction(use, Layout(N)), delta, expected)


def test_the_cheaper_route_is_taken():
    for positions, outputs, gram in ((30, 2, False), (2, 30, True)):
        x, w = torch.randn(N, positions, outputs, requires_grad=True), nn.Parameter(torch.randn(outputs, outputs))
        (use,) = read_tape(F.linear(x, w).mean(1), {"w": w}).uses["w"]
        assert contraction(use, Layout(N)).prefers_gram(1) == gram


def test_half_precision_is_widened_before_it_is_squared():
    x = torch.full((2, 2), 300.0, dtype=torch.float16)
    assert wide(x).dtype == torch.float32 and wide(x.double()).dtype == torch.float64
    assert float(Piece(x[None]).row_squares.sum()) == pytest.approx(4 * 300.0**2)  # beyond half precision


# Another form of a parameter must not cost more than the parameter: name → (forward of x [N, 5], shape).
REARRANGED = {
    "a reshaped kernel": (lambda x, w: F.linear(x, w.view(4, 5)), (20,)),
    "a convolution's kernel as a matrix": (lambda x, w: F.linear(x, w.flatten(1)), (4, 5, 1, 1)),
    "a part of a matrix": (lambda x, w: F.linear(x, w[1:, 0]), (5, 2, 5)),
    "a reflected matrix": (lambda x, w: x @ -w.permute(1, 2, 0).squeeze(0), (4, 1, 5)),
    "a layer scale": (lambda x, w: (x.view(N, 5, 1, 1) * w.reshape(1, -1, 1, 1)).flatten(1), (5,)),
}


@pytest.mark.parametrize("case", REARRANGED)
def test_a_rearranged_parameter_goes_the_way_of_the_parameter(case, monkeypatch):
    function, shape = REARRANGED[case]
    x, w = torch.randn(N, 5, requires_grad=True), nn.Parameter(torch.randn(shape))
    logits = function(x, w)
    (use,) = read_tape(logits, {"w": w}).uses["w"]
    columns = torch.randn(C, *logits.shape)
    (delta,) = deltas(logits, [use.node], columns)
    expected = gradients_by_autograd(logits, w, columns)
    rule = contraction(use, Layout(N))
    assert use.derivation is not None and use.rearranged
    torch.testing.assert_close(rule.gradients(delta), expected)
    # Neither sum forms a gradient of a sample.
    monkeypatch.setattr(type(rule), "gradients", lambda self, delta: pytest.fail("a gradient was formed"))
    assert_sums_are_those(rule, delta, expected)


def test_a_rule_can_be_registered_for_a_new_operation(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    x, p = torch.rand(N, 3, requires_grad=True), nn.Parameter(torch.rand(1, 3))
    logits = torch.atan2(p, x)
    (use,) = read_tape(logits, {"p": p}).uses["p"]
    assert not has_rule(use)

    @curvature_rule(("Atan2", 0))
    def angle(use, layout):
        y, x = use.node._saved_self, use.node._saved_other
        return reduction.Reduced(use, layout, axes=(1,), factor=x / (x.square() + y.square()))

    columns = torch.randn(C, N, 3)
    (delta,) = deltas(logits, [use.node], columns)
    expected = gradients_by_autograd(logits, p, columns)
    torch.testing.assert_close(contraction(use, Layout(N)).gradients(delta), expected)


def test_an_operation_without_a_rule_is_named_with_its_parameter_and_path():
    x, w = torch.randn(4, 3, requires_grad=True), nn.Parameter(torch.randn(3, 3))
    # A tensor that is used in one place without a rule is not taken for another form of the parameter.
    (use,) = read_tape(torch.atan2(x, w.t()[0]), {"w": w}).uses["w"]
    with pytest.raises(NoRuleError, match=r"w \(3, 3\) is used by T \(input 0\).*curvature_rule"):
        contraction(use, Layout(4))
    (use,) = read_tape(torch.addmm(w[0], x, torch.eye(3), alpha=2), {"w": w}).uses["w"]
    with pytest.raises(NoRuleError, match=r"used by Select \(input 0\)"):
        contraction(use, Layout(4))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w: F.linear(x, w), (3, 3)),
        (lambda x, w: F.conv1d(x[..., None], w), (3, 3, 1)),
        (lambda x, w: F.batch_norm(x, torch.zeros(3), torch.ones(3), w), (3,)),
        (lambda x, w: x + w, (3,)),
    ],
)
def test_samples_along_the_second_axis_are_refused_where_the_channels_are(function, shape):
    x, w = torch.randn(3, 3, requires_grad=True), nn.Parameter(torch.randn(shape))
    (use,) = read_tape(function(x, w), {"w": w}).uses["w"]
    with pytest.raises(NoRuleError):
        contraction(use, Layout(3, "sequence-first"))
