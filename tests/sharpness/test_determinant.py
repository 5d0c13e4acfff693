"""The log-determinant is that of all eigenvalues, and keeps its value where volumes are kept."""

import math

import pytest
import torch
from sharpness.spectral_cases import biased, chain, labelled, rescaled, seeded, with_permuted_units
from torch import nn

from ms_optim.models import small_resnet
from ms_optim.reference import spectrum as dense
from ms_optim.sharpness.determinant import logdet_sharpness


class Product(nn.Module):
    """o = Π w_i: a parameter per factor, and scale symmetries that keep the volume."""

    def __init__(self, *w):
        super().__init__()
        self.w = nn.ParameterList(torch.tensor([value]) for value in w)

    def forward(self, x):
        for w in self.w:
            x = x * w
        return x


@pytest.mark.parametrize("epsilon", [1.0, 1e-3, None])
@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("network", [chain, biased])
def test_it_is_that_of_all_eigenvalues(network, matrix, epsilon):
    model, (x, y) = network(), labelled()
    right = dense.hessian(model, x, y) if matrix == "hessian" else dense.gauss_newton(model, x)
    found = logdet_sharpness(model, (x, y), epsilon, matrix=matrix)
    assert found == pytest.approx(dense.log_determinant(right, epsilon), rel=1e-8)
    assert found.standard_error == 0.0
    negative = int((torch.linalg.eigvalsh(right) < -1e-12).sum())
    assert found.details["negative"] == negative and (matrix == "gauss-newton") == (negative == 0)
    assert bool(found.notes) == (negative > 0)
    if matrix == "gauss-newton":  # rank at most n (K − 1)
        assert found.details["positive"] == int(torch.linalg.matrix_rank(right)) <= 12
    block = logdet_sharpness(model, (x, y), epsilon, parameters=["2.weight"], matrix=matrix)
    assert block == pytest.approx(dense.log_determinant(dense.block(right, model, ["2.weight"]), epsilon), rel=1e-8)


def test_samples_converge_to_the_exact_value_with_the_error_they_state():
    model, data = chain(), labelled()
    exact = logdet_sharpness(model, data, 0.01)
    found = [logdet_sharpness(model, data, 0.01, 3, 15, generator=seeded(s)) for s in range(60)]
    values = torch.tensor([float(value) for value in found])
    stated = math.sqrt(sum(value.standard_error**2 for value in found) / 60)
    assert stated > 0 and stated == pytest.approx(float(values.std()), rel=0.35)
    assert abs(float(values.mean()) - exact) < 4 * stated / math.sqrt(60)
    bias = abs(float(values.mean()) - exact)
    assert bias < sum(value.details["steps_error"] for value in found) / 60 + 3 * stated / math.sqrt(60)
    note = logdet_sharpness(model, data, None, 3, 5).notes[-1]
    assert "not reliable where eigenvalues are near 0" in note


def test_it_has_the_closed_form_of_two_factors_and_is_unchanged_where_the_volume_is_kept():
    y, u, w = 3.0, 1.5, 1.2
    x, target = torch.ones(1, 1), torch.full((1, 1), y)
    s = u * w  # L = (s − y)², H = 2 [[w², 2s − y], [2s − y, u²]], definite for y/3 < s < y
    right = math.log(4 * (y - s) * (3 * s - y))
    for scale in (1.0, 0.3, 7.0):
        found = logdet_sharpness(Product(u * scale, w / scale), (x, target), None, loss="mse")
        assert found == pytest.approx(right, rel=1e-10) and found.notes == ()
        smooth = logdet_sharpness(Product(u * scale, w / scale), (x, target), 0.5, loss="mse")
        assert (smooth == pytest.approx(logdet_sharpness(Product(u, w), (x, target), 0.5, loss="mse"))) == (scale == 1)


def test_units_in_another_order_change_nothing_and_rescalings_do():
    model, data = chain(), labelled()
    for epsilon in (1e-3, None):
        found = logdet_sharpness(model, data, epsilon)
        assert logdet_sharpness(with_permuted_units(model), data, epsilon) == pytest.approx(found, rel=1e-7)
        assert abs(logdet_sharpness(rescaled(model, data[0]), data, epsilon) - found) > 0.01 * abs(found)


def test_a_network_with_normalisers_can_be_measured():
    model, x = small_resnet(4), torch.randn(4, 1, 8, 8)
    found = logdet_sharpness(model, x, probes=3, steps=4, matrix="gauss-newton")
    assert found > 0 and found.details["positive"] > 0


def test_numbers_out_of_range_are_refused():
    for epsilon in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="epsilon must be > 0 and finite, got"):
            logdet_sharpness(biased(), labelled(), epsilon)
