"""Parameters with several uses: their gradients add before they are squared, and are formed only where they must be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature import hessian_diagonal, hessian_trace
from ms_optim.curvature.rules.outer import Outer, PlainLinear
from ms_optim.curvature.rules.shared import Joined
from ms_optim.reference import curvature as oracle


class Tied(nn.Module):
    """One matrix and one kernel, each used in several ways one after the other."""

    def __init__(self, width, positions, how):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width))
        self.kernel = nn.Parameter(torch.randn(width, width, 3))
        self.positions, self.how = positions, how
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = x if self.positions else x[:, 0]  # N T W, or N W
        for step in self.how:
            if step == "linear":
                x = F.relu(F.linear(x, self.w))
            elif step == "bias":
                x = F.relu(F.linear(x, self.w, self.b))
            elif step == "transposed":
                x = F.relu(x @ self.w)
            elif step == "one":
                x = x + F.linear(x.mean(1) if self.positions else x, self.w).reshape(len(x), *[1] * self.positions, -1)
            elif step == "convolution" and self.positions:
                x = F.relu(F.conv1d(x.mT, self.kernel, padding=1)).mT
            elif step == "turned" and self.positions:
                x = F.relu(F.conv_transpose1d(x.mT, self.kernel, padding=1)).mT
        return self.head(x.mean(1) if self.positions else x)


STEPS = ["linear", "bias", "transposed", "one", "convolution", "turned"]


@given(
    st.lists(st.sampled_from(STEPS), min_size=2, max_size=4), st.integers(1, 4), st.booleans(), st.integers(0, 2**16)
)
@settings(max_examples=60, deadline=None)
def test_gradients_of_all_uses_add_before_they_are_squared(how, width, positions, seed):
    torch.manual_seed(seed)
    model, x = Tied(width, positions, how), torch.randn(3, 2, width)
    expected = oracle.exact_diagonals(model, x)
    largest = max(float(entries.sum()) for entries in expected.values())
    traces, diagonals = hessian_trace(model, x), hessian_diagonal(model, x)
    assert traces.generic == ()
    for name, entries in expected.items():
        assert traces[name] == pytest.approx(float(entries.sum()), rel=1e-10, abs=1e-13 * largest)
        torch.testing.assert_close(diagonals[name], entries, rtol=1e-10, atol=1e-13 * largest)


@pytest.mark.parametrize("positions", [True, False])
def test_no_gradient_of_a_linear_map_called_in_a_loop_is_formed(positions, monkeypatch):
    def refuse(self, delta):
        raise AssertionError(f"{self.use.parameter} formed its gradients")

    torch.manual_seed(0)
    how = ["linear", "bias", "one", *(["convolution"] * 2 if positions else [])]
    model, x = Tied(4, positions, how), torch.randn(3, 2, 4)
    expected = oracle.exact_diagonals(model, x)
    for kind in (Outer, PlainLinear):
        monkeypatch.setattr(kind, "gradients", refuse)
    found = hessian_trace(model, x)
    for name, entries in expected.items():
        assert found[name] == pytest.approx(float(entries.sum()), rel=1e-10)


def test_the_gram_route_is_taken_for_few_positions_of_a_large_matrix(monkeypatch):
    torch.manual_seed(0)
    model, x = Tied(12, False, ["linear", "linear"]), torch.randn(3, 2, 12)
    expected = oracle.gauss_newton_traces(model, x)
    sizes = []
    vecdot = torch.linalg.vecdot
    monkeypatch.setattr(torch.linalg, "vecdot", lambda a, b: sizes.append(tuple(a.shape)) or vecdot(a, b))
    assert hessian_trace(model, x)["w"] == pytest.approx(expected["w"], rel=1e-10)
    assert (3, 4) in sizes  # two uses of one position each: 2 x 2


def test_uses_that_lay_out_the_gradient_differently_are_not_joined():
    torch.manual_seed(0)
    built = []
    original = Joined.__init__
    model, x = Tied(3, True, ["linear", "transposed"]), torch.randn(2, 2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Joined, "__init__", lambda self, *a: built.append(self) or original(self, *a))
        traces = hessian_trace(model, x)
        assert not built
        hessian_trace(Tied(3, True, ["linear", "linear"]), x)
        assert built
    assert traces["w"] == pytest.approx(oracle.gauss_newton_traces(model, x)["w"], rel=1e-10)
