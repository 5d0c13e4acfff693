"""One rule per operation: its gradients per sample are autograd's, and its squared norm is that of its gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature import contraction as contractions
from ms_optim.curvature import layers
from ms_optim.curvature.backprop import deltas, require_separate_samples
from ms_optim.curvature.contraction import Columns, wide
from ms_optim.curvature.layers import contraction, curvature_rule
from ms_optim.curvature.tape import read_tape
from ms_optim.errors import CurvatureError

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


@pytest.mark.parametrize("case", RULES)
def test_gradients_of_a_rule_are_those_of_autograd(case, monkeypatch):
    logits, parameters, columns = drawn(case)
    for name, (use,) in read_tape(logits, parameters).uses.items():
        (delta,) = deltas(logits, [use.node], columns)
        at, rule = Columns([delta[:1], delta[1:]]), contraction(use, N)
        expected = gradients_by_autograd(logits, parameters[name], columns)
        torch.testing.assert_close(rule.gradients(at), expected, rtol=1e-10, atol=1e-12)
        squares = expected.square().sum()
        torch.testing.assert_close(rule.squared_norm(at), squares, rtol=1e-12, atol=0.0)
        monkeypatch.setattr(contractions, "_CHUNK_BYTES", 1)  # one sample at a time
        torch.testing.assert_close(rule.squared_norm(at), squares, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("case", ["linear over many positions", "linear over positions", "pointwise convolution"])
def test_direct_and_gram_routes_agree(case, monkeypatch):
    logits, parameters, columns = drawn(case)
    (use,) = read_tape(logits, parameters).uses["w"]
    at, rule = Columns(list(deltas(logits, [use.node], columns))), contraction(use, N)
    expected = gradients_by_autograd(logits, parameters["w"], columns).square().sum()
    g, o, i, v = rule.sizes
    for claimed in (0, v, 10**6):  # positions: 0 makes both routes free (direct), many make Gram matrices dear
        rule.sizes = (g, o, i, claimed)
        torch.testing.assert_close(rule.squared_norm(at), expected, rtol=1e-12, atol=0.0)
    rule.sizes = (g, 10**3, 10**3, 1)  # and huge layers make them cheap
    torch.testing.assert_close(rule.squared_norm(at), expected, rtol=1e-12, atol=0.0)


def test_the_cheaper_route_is_taken(monkeypatch):
    products = []
    square_sum = lambda tensor: products.append(tensor.shape) or tensor.square().sum()  # noqa: E731
    monkeypatch.setattr(contractions, "_square_sum", square_sum)
    for positions, outputs, direct in ((30, 2, True), (2, 30, False)):
        x, w = torch.randn(N, positions, outputs, requires_grad=True), nn.Parameter(torch.randn(outputs, outputs))
        logits = F.linear(x, w).mean(1)
        (use,) = read_tape(logits, {"w": w}).uses["w"]
        (delta,) = deltas(logits, [use.node], torch.randn(1, N, outputs))
        products.clear()
        contraction(use, N).squared_norm(Columns([delta]))
        assert bool(products) == direct


def test_what_a_linear_weight_and_its_bias_share_is_computed_once(monkeypatch):
    logits, parameters, columns = drawn("linear")
    uses = read_tape(logits, parameters).uses
    (delta,) = deltas(logits, [uses["w"][0].node], columns)
    at = Columns([delta])
    first = at.row_squares
    assert at.row_squares is first
    torch.testing.assert_close(first, delta.square().sum((0, 2)))


def test_half_precision_is_widened_before_it_is_squared():
    x = torch.full((2, 2), 300.0, dtype=torch.float16)
    assert wide(x).dtype == torch.float32 and wide(x.double()).dtype == torch.float64
    assert float(Columns([x[None]]).row_squares[0]) == 2 * 300.0**2  # beyond 65504, the largest of half precision


def test_a_rule_can_be_registered_for_a_new_operation(monkeypatch):
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))

    @curvature_rule(("Mul", 1))
    def layer_scale(use, samples):
        return contractions.Reduced(use, samples, axes=(1,), normalised=use.node._saved_self)

    x, gamma = torch.randn(N, 3, requires_grad=True), nn.Parameter(torch.randn(3))
    logits = x * gamma
    (use,) = read_tape(logits, {"gamma": gamma}).uses["gamma"]
    columns = torch.randn(C, N, 3)
    (delta,) = deltas(logits, [use.node], columns)
    expected = gradients_by_autograd(logits, gamma, columns)
    torch.testing.assert_close(contraction(use, N).gradients(Columns([delta])), expected)


def test_an_operation_without_a_rule_is_named_with_its_parameter_and_path():
    w = nn.Parameter(torch.randn(3, 3))
    (use,) = read_tape(torch.randn(4, 3) * w.t()[0], {"w": w}).uses["w"]
    with pytest.raises(CurvatureError, match=r"w \(3, 3\) is used by transpose -> Select \(input 0\).*curvature_rule"):
        contraction(use, 4)


@pytest.mark.parametrize("silent", [0, 1])
def test_one_sample_reaching_into_the_part_of_another_is_found(silent):
    # Row 1 belongs to sample 0's part of the axis, and only the sample that is not `silent` depends on it.
    x, w = torch.randn(4, 3), nn.Parameter(torch.randn(3, 3))
    rows = F.linear(x, w)
    logits = torch.stack([rows[0], rows[3] + rows[1]] if silent == 0 else [rows[0] + rows[2], rows[3]])
    (use,) = read_tape(logits, {"w": w}).uses["w"]
    with pytest.raises(CurvatureError, match="influence each other"):
        require_separate_samples(logits, [use], torch.randn(2, 3))
    require_separate_samples(torch.stack([rows[0] + rows[1], rows[3]]), [use], torch.randn(2, 3))
