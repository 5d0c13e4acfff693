"""The largest eigenvalue is that of the matrix written out, with a bound that holds; λ_max sees rescalings."""

import math

import pytest
import torch
from curvature.undisturbed import assert_undisturbed, snapshot
from sharpness.spectral_cases import biased, chain, labelled, rescaled, with_permuted_units

import ms_optim
from ms_optim.models import lenet, small_resnet
from ms_optim.reference import spectrum as dense
from ms_optim.sharpness.eigenvalue import top_eigenvalue


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("network", [chain, biased])
def test_it_is_that_of_the_matrix_written_out(network, matrix):
    model, (x, y) = network(), labelled()
    right = dense.hessian(model, x, y) if matrix == "hessian" else dense.gauss_newton(model, x)
    values = torch.linalg.eigvalsh(right).flip(0)
    found = top_eigenvalue(model, (x, y), 3, matrix=matrix)
    assert found == pytest.approx(float(values[0]), rel=1e-6) and found.notes == ()
    for place in (2, 3):
        assert found.details[f"eigenvalue {place}"] == pytest.approx(float(values[place - 1]), rel=1e-4)
        bound = found.details[f"residual {place}"]
        assert float((values - found.details[f"eigenvalue {place}"]).abs().min()) <= bound + 1e-13
    assert found.details["residual"] <= 1e-4 * abs(float(values.abs().max()))
    assert found.details["products"] < len(right) + 4
    block = top_eigenvalue(model, (x, y), parameters=["2.weight"], matrix=matrix)
    right = torch.linalg.eigvalsh(dense.block(right, model, ["2.weight"])).max()
    assert block == pytest.approx(float(right), rel=1e-6)


def test_a_search_that_stops_early_says_so_and_its_bound_holds():
    model, (x, y) = chain(), labelled()
    found = top_eigenvalue(model, (x, y), products=3, tolerance=1e-8)
    values = torch.linalg.eigvalsh(dense.hessian(model, x, y))
    assert float((values - found).abs().min()) <= found.details["residual"]
    assert found < float(values.max()) and "not converged" in found.notes[0]


def test_units_in_another_order_change_nothing_and_rescalings_do():
    model, data = chain(), labelled()
    found = top_eigenvalue(model, data, tolerance=1e-6)
    assert top_eigenvalue(with_permuted_units(model), data, tolerance=1e-6) == pytest.approx(found, rel=1e-9)
    assert abs(top_eigenvalue(rescaled(model, data[0]), data) / found - 1) > 0.3


@pytest.mark.parametrize("build, shape", [(lenet, (4, 1, 28, 28)), (lambda: small_resnet(4), (4, 1, 8, 8))])
def test_large_networks_can_be_measured_and_are_left_alone(build, shape):
    model, x, y = build().float(), torch.randn(shape).float(), torch.tensor([0, 3, 5, 9])
    before = snapshot(model)
    found = ms_optim.top_eigenvalue(model, (x, y), tolerance=1e-3)
    assert found > 0 and found.notes == () and found.details["residual"] <= 1e-3 * found * 2
    assert_undisturbed(model, before)


def test_numbers_out_of_range_are_refused():
    model, data = biased(), labelled()
    for tolerance in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be > 0 and finite, got"):
            top_eigenvalue(model, data, tolerance=tolerance)
    with pytest.raises(ValueError, match="products must be an integer >= 1, got 0"):
        top_eigenvalue(model, data, products=0)
    with pytest.raises(ValueError, match="count must be at most the 3 parameters of the block, got 4"):
        top_eigenvalue(model, data, 4, parameters=["2.bias"])
