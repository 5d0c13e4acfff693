"""δ taken from a max pooling past a ReLU is the δ that backpropagation brings there."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from ms_optim.curvature import budget, hessian_trace
from ms_optim.curvature.graph import backprop
from ms_optim.curvature.graph.lift import lifts
from ms_optim.curvature.graph.tape import read_tape
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
    torch.testing.assert_close(lift.down(above), expected, rtol=1e-14, atol=0.0)


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


def test_a_lifted_network_is_exact_column_by_column(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(budget, "_TOGETHER_BYTES", {"cpu": 0})
    lifted = []
    monkeypatch.setattr(backprop, "lifts", lambda *a: lifted.append(lifts(*a)) or lifted[-1])
    first = [nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)]
    second = [nn.Conv2d(3, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1)]
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3, 3))
    x = torch.randn(3, 2, 9, 9)
    assert dict(hessian_trace(model, x)) == pytest.approx(oracle.gauss_newton_traces(model, x), rel=1e-10)
    assert [len(found) for found in lifted] == [1]  # the first convolution, below which nothing is wanted
