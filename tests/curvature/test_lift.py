"""δ taken from a max pooling past a ReLU is the δ that backpropagation brings there."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from ms_optim.curvature import budget, hessian_diagonal, hessian_trace
from ms_optim.curvature.graph.lift import Lift, lifts
from ms_optim.curvature.graph.tape import read_tape
from ms_optim.curvature.rules import outer
from ms_optim.curvature.rules.layers import contraction
from ms_optim.reference import curvature as oracle

GEOMETRIES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2), st.booleans())


@given(GEOMETRIES, st.booleans(), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_a_lifted_delta_is_the_one_of_backpropagation(geometry, inplace, seed):
    kernel, stride, padding, dilation, ceil = geometry
    assume(2 * padding <= kernel)
    torch.manual_seed(seed)
    convolution = nn.Conv2d(2, 3, 2)
    y = F.relu(convolution(torch.randn(2, 2, 8, 7)), inplace=inplace)
    pooled = F.max_pool2d(y, kernel, stride, padding, dilation, ceil)
    logits = torch.tanh(pooled.flatten(1)) @ torch.randn(pooled[0].numel(), 4)
    tape = read_tape(logits, dict(convolution.named_parameters()))
    end = tape.uses["weight"][0].node
    lift = lifts(tape.order, [end])[end]
    column = torch.randn_like(logits)
    edges = [GradientEdge(node, 0) for node in (end, lift.pool)]
    expected, above = torch.autograd.grad(logits, edges, column)
    torch.testing.assert_close(lift.pooled(above).delta(), expected[None], rtol=1e-14, atol=0.0)


OTHERWISE = {
    "another activation": lambda h: F.max_pool2d(F.leaky_relu(h), 2),
    "another pooling": lambda h: F.avg_pool2d(F.relu(h), 2),
    "a ReLU that two take": lambda h: F.max_pool2d(F.relu(h), 2) + F.relu(h)[..., ::2, ::2],
    "a ReLU whose output is taken again": lambda h: (lambda y: F.max_pool2d(y, 2) + y[..., ::2, ::2])(F.relu(h)),
    "a convolution that two take": lambda h: F.max_pool2d(F.relu(h), 2) - h[..., ::2, ::2],
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_nothing_else_is_lifted_and_all_of_it_is_exact(case):
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(OTHERWISE[case](self.convolution(x)).flatten(1))

    model, x = Network(), torch.randn(2, 2, 6, 6)
    tape = read_tape(model(x), dict(model.named_parameters()))
    assert lifts(tape.order, [tape.uses["convolution.weight"][0].node]) == {}
    assert dict(hessian_trace(model, x)) == pytest.approx(oracle.gauss_newton_traces(model, x), rel=1e-10)


def exact_by_windows(model, x, monkeypatch):
    """Trace and diagonal, column by column, against whole Jacobians; the number of sums over windows."""
    count = []
    original = outer._OuterDirect._contract_pooled
    monkeypatch.setattr(outer._OuterDirect, "_contract_pooled", lambda self: count.append(1) or original(self))
    monkeypatch.setattr(budget, "_TOGETHER_BYTES", {"cpu": 0})
    expected = oracle.exact_diagonals(model, x)
    for name, diagonal in hessian_diagonal(model, x).items():
        torch.testing.assert_close(diagonal, expected[name], rtol=1e-10, atol=1e-12 * float(expected[name].max()))
    traces = {name: float(diagonal.sum()) for name, diagonal in expected.items()}
    assert dict(hessian_trace(model, x)) == pytest.approx(traces, rel=1e-10)
    return len(count)


@given(GEOMETRIES, GEOMETRIES, st.sampled_from([1, 2]), st.sampled_from([2, 8]), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_sums_over_windows_are_sums_over_positions(pool, convolution, groups, classes, first, seed):
    kernel, stride, padding, dilation, ceil = pool
    assume(2 * padding <= kernel)
    size, step, border, spread, bias = convolution
    torch.manual_seed(seed)
    below = [] if first else [nn.Conv2d(2, 2, 1)]
    layer = nn.Conv2d(2, 4, size, step, border, spread, groups, bias)
    features = nn.Sequential(*below, layer, nn.ReLU(), nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil))
    x = torch.randn(3, 2, 9, 8)
    try:
        out = features(x)
    except RuntimeError:
        assume(False)
    model = nn.Sequential(features, nn.Flatten(), nn.Tanh(), nn.Linear(out[0].numel(), classes))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(outer.Outer, "prefers_gram", lambda self, columns: False)
        monkeypatch.setattr(outer._OuterDirect, "prefers", lambda self, lift: self.rule.plane)
        # (With something below, the diagonal of the bias takes δ itself, and the weight with it.)
        assert exact_by_windows(model, x, monkeypatch) >= (2 if first or not bias else 1)


def test_windows_are_summed_over_where_that_is_shorter_and_at_ends_delta_is_never_spread(monkeypatch):
    torch.manual_seed(0)
    spread = []
    down = Lift.down
    monkeypatch.setattr(Lift, "down", lambda self, bracket: spread.append(1) or down(self, bracket))
    first = [nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    second = [nn.Conv2d(3, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1)]
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(12, 8))
    x = torch.randn(3, 2, 10, 10)
    assert exact_by_windows(model, x, monkeypatch) >= 2
    spread.clear()
    hessian_trace(model, x)
    assert not spread


OTHER_BIASES = {
    "along the last axis": (lambda: nn.LayerNorm(6), 2, 2),
    "along the plane": (lambda: nn.LayerNorm([6, 6]), 2, 2),
    "along all axes": (lambda: nn.LayerNorm([2, 6, 6]), 3, 1),
    "along the channels": (lambda: nn.GroupNorm(1, 2), 2, 2),
}


@pytest.mark.parametrize("case", OTHER_BIASES)
def test_only_a_shift_of_channels_is_a_sum_over_windows(case, monkeypatch):
    torch.manual_seed(0)
    norm, kernel, stride = OTHER_BIASES[case]
    features = nn.Sequential(norm(), nn.ReLU(), nn.MaxPool2d(kernel, stride), nn.Flatten())
    x = torch.randn(3, 2, 6, 6)
    model = nn.Sequential(features, nn.Linear(features(x).shape[1], 4))
    exact_by_windows(model, x, monkeypatch)


def test_what_is_saved_is_taken_once(monkeypatch):
    from torch.utils.checkpoint import checkpoint

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            first = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            self.body = nn.Sequential(*first, nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            self.head = nn.Linear(16, 8)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False).flatten(1))

    torch.manual_seed(0)
    model, x = Network(), torch.randn(3, 2, 8, 8)
    monkeypatch.setattr(budget, "_TOGETHER_BYTES", {"cpu": 0})
    plain = oracle.gauss_newton_traces(nn.Sequential(model.body, nn.Flatten(), model.head), x)
    assert list(hessian_trace(model, x).values()) == pytest.approx(list(plain.values()), rel=1e-10)


def test_windows_are_not_summed_over_where_that_takes_more_memory_than_a_chunk():
    wide = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8192, 4))
    few = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4096, 4))
    narrow = nn.Sequential(nn.Conv2d(4, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 4))
    for model, channels, better in ((wide, 64, False), (few, 3, False), (narrow, 4, True)):
        tape = read_tape(model(torch.randn(2, channels, 16, 16)), dict(model.named_parameters()))
        (use,) = tape.uses["0.weight"]
        rule = contraction(use, tape.layouts[use.node])
        assert rule.trace(9).prefers(lifts(tape.order, [use.node])[use.node]) is better
