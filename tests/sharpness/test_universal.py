"""Members of the universal class converge to their functions of the spectrum, with true error bars."""

import math

import pytest
import torch
from curvature.undisturbed import assert_undisturbed, snapshot
from sharpness.spectral_cases import biased, chain, labelled, rescaled, seeded, with_permuted_units
from torch import nn

import ms_optim
from ms_optim.models import lenet, small_resnet
from ms_optim.reference import spectrum as dense
from ms_optim.sharpness.universal import (
    DETERMINANT,
    FROBENIUS,
    TRACE,
    Member,
    frobenius_sharpness,
    universal_sharpness,
)

#: √(E t²): with v normal E t² = ¼ (2 ‖H‖_F² + (Tr H)²).
ROOT = Member("root mean square", lambda t: t.square(), lambda mean, n: mean.sqrt())


def limits(matrix):
    """What the members with a normal μ converge to."""
    trace, norm = float(matrix.trace()), float(matrix.square().sum())
    return {"trace": trace / 2, "frobenius": norm / 4, "root mean square": 0.5 * math.sqrt(2 * norm + trace**2)}


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("member", [TRACE, FROBENIUS, ROOT], ids=lambda m: m.name)
def test_members_converge_to_their_function_of_the_matrix(member, matrix):
    model, (x, y) = biased(), labelled()
    right = limits(dense.hessian(model, x, y) if matrix == "hessian" else dense.gauss_newton(model, x))[member.name]
    for probes in (400, 2500):
        found = universal_sharpness(model, (x, y), member, probes, matrix=matrix, generator=seeded(probes))
        assert abs(found - right) < 4 * found.standard_error
        assert found.details == {"dimension": 43, "products": probes}
    assert found.standard_error < 0.1 * right


@pytest.mark.parametrize("member", [TRACE, FROBENIUS, ROOT], ids=lambda m: m.name)
def test_the_standard_error_is_the_spread_of_repeated_estimates(member):
    model, data = nn.Linear(4, 3), labelled()
    found = [universal_sharpness(model, data, member, 60, generator=seeded(s)) for s in range(150)]
    spread = float(torch.tensor([float(value) for value in found]).std())
    stated = math.sqrt(sum(value.standard_error**2 for value in found) / len(found))
    assert stated == pytest.approx(spread, rel=0.2)


class Product(nn.Module):
    """o = u·w: two parameters, so that H is known and integrals over the square can be done."""

    def __init__(self, u, w):
        super().__init__()
        self.u, self.w = nn.Parameter(torch.tensor([u])), nn.Parameter(torch.tensor([w]))

    def forward(self, x):
        return x * self.u * self.w


def product_data(y=3.0):
    return torch.ones(1, 1), torch.full((1, 1), y)


def test_the_determinants_member_is_its_integral_over_the_cube():
    model, data = Product(1.5, 1.2), product_data()
    h = dense.hessian(model, *data, "mse")
    grid = (torch.arange(400) + 0.5) / 200 - 1
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    quadratic = 0.5 * (h[0, 0] * a * a + 2 * h[0, 1] * a * b + h[1, 1] * b * b)
    right = float((-0.5 * quadratic).exp().mean()) ** -2
    found = universal_sharpness(model, data, DETERMINANT, 20000, loss="mse")
    assert abs(found - right) < 4 * found.standard_error < 0.1 * right


def test_a_member_says_how_many_probes_it_needs():
    model, data = biased(), labelled()
    with pytest.raises(ValueError, match="probes must be an integer >= 2, got 1"):
        universal_sharpness(model, data, FROBENIUS, 1)
    assert math.isnan(universal_sharpness(model, data, TRACE, 1).standard_error)


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
def test_the_norm_is_exact_where_that_costs_no_more(matrix):
    model, (x, y) = biased(), labelled()
    right = dense.hessian(model, x, y) if matrix == "hessian" else dense.gauss_newton(model, x)
    found = frobenius_sharpness(model, (x, y), matrix=matrix)
    assert found == pytest.approx(float(right.square().sum()), rel=1e-10)
    assert found.standard_error == 0.0 and sum(found.layers.values()) == pytest.approx(found, rel=1e-12)
    rows = dict(zip([n for n, _ in model.named_parameters()], right.square().sum(1).split([20, 5, 15, 3]), strict=True))
    assert found.layers == pytest.approx({name: float(row.sum()) for name, row in rows.items()}, rel=1e-10)
    block = frobenius_sharpness(model, (x, y), parameters=["2.weight"], matrix=matrix)
    assert block == pytest.approx(float(dense.block(right, model, ["2.weight"]).square().sum()), rel=1e-10)


def test_the_norm_is_unbiased_with_the_variance_it_is_documented_with():
    model, (x, y) = biased(), labelled()
    h = dense.hessian(model, x, y)
    square = h @ h
    variance = 2 * float(square.square().sum() - square.diagonal().square().sum())
    found = [frobenius_sharpness(model, (x, y), 10, generator=seeded(s)) for s in range(150)]
    values = torch.tensor([float(value) for value in found])
    assert abs(float(values.mean()) - float(square.trace())) < 4 * math.sqrt(variance / 1500)
    assert float(values.var()) == pytest.approx(variance / 10, rel=0.3)
    assert sum(value.standard_error**2 for value in found) / 150 == pytest.approx(variance / 10, rel=0.3)
    assert variance < 2 * float((square @ square).trace())
    # The member of the class, from as many probes, is further off.
    assert universal_sharpness(model, (x, y), FROBENIUS, 10).standard_error * 4 > math.sqrt(variance / 10)


def test_units_in_another_order_change_nothing_and_rescalings_do():
    model, data = chain(), labelled()
    permuted, other = with_permuted_units(model), rescaled(model, data[0], 1.5)
    norm = frobenius_sharpness(model, data)
    assert norm.standard_error == 0.0
    assert frobenius_sharpness(permuted, data) == pytest.approx(norm, rel=1e-10)
    assert abs(frobenius_sharpness(other, data) / norm - 1) > 0.3
    for member in (TRACE, FROBENIUS):
        found, same, scaled = (
            universal_sharpness(m, data, member, 1500, generator=seeded(1)) for m in (model, permuted, other)
        )
        assert found != same
        assert abs(found - same) < 4 * math.hypot(found.standard_error, same.standard_error)
        assert abs(found - scaled) > 4 * math.hypot(found.standard_error, scaled.standard_error)


@pytest.mark.parametrize("build, shape", [(lenet, (4, 1, 28, 28)), (lambda: small_resnet(4), (4, 1, 8, 8))])
def test_large_networks_can_be_measured_and_are_left_alone(build, shape):
    model, x, y = build(), torch.randn(shape), torch.tensor([0, 3, 5, 9])
    before = snapshot(model)
    assert ms_optim.frobenius_sharpness(model, (x, y), 3) > 0
    assert ms_optim.universal_sharpness(model, (x, y), FROBENIUS, 3) > 0
    assert_undisturbed(model, before)
