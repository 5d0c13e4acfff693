"""The Riemannian norm is a generalised eigenvalue, unchanged by rescalings of tensors and not by those of units."""

import pytest
import torch
from curvature.undisturbed import assert_undisturbed, snapshot
from sharpness.spectral_cases import biased, chain, labelled, rescaled, with_rescaled_units
from torch import nn
from torch.nn import functional as F
from zoo import Residual, images, mlp

import ms_optim
from ms_optim.models import lenet, small_resnet
from ms_optim.reference import spectrum as dense
from ms_optim.sharpness.riemannian import riemannian_sharpness


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("network", [chain, biased])
def test_it_is_the_generalised_eigenvalue_of_the_matrix_written_out(network, matrix):
    model, (x, y) = network(), labelled()
    right = dense.hessian(model, x, y) if matrix == "hessian" else dense.gauss_newton(model, x)
    found = riemannian_sharpness(model, (x, y), matrix=matrix)
    assert found == pytest.approx(dense.riemannian_norm(right, model), rel=1e-6)
    assert found == abs(found.details["eigenvalue"]) and found.notes == ()
    assert sum(found.layers.values()) == pytest.approx(1) and list(found.layers) == list(dict(model.named_parameters()))


def test_the_largest_magnitude_may_be_that_of_a_negative_eigenvalue():
    model, (x, y) = biased(), labelled()

    def upside_down(logits, targets):
        return -F.cross_entropy(logits, targets)

    found, right = riemannian_sharpness(model, (x, y), loss=upside_down), riemannian_sharpness(model, (x, y))
    assert found == pytest.approx(right) and found.details["eigenvalue"] == pytest.approx(-right.details["eigenvalue"])


def test_a_closed_form():
    model = nn.Linear(3, 1, bias=False)
    x = torch.randn(5, 3)
    right = 2 * float(model.weight.detach().square().sum()) * float(torch.linalg.eigvalsh(x.T @ x / 5).max())
    assert riemannian_sharpness(model, (x, torch.randn(5, 1)), loss="mse") == pytest.approx(right, rel=1e-6)


def cases():
    yield "chain", chain(), labelled()
    yield "biased", biased(), labelled()
    torch.manual_seed(5)
    yield "smooth below", mlp(nn.LeakyReLU).eval(), labelled(6, 5)
    yield "residual with batch norm", Residual().eval(), (images(4), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("case", range(4))
def test_it_is_unchanged_by_rescalings_of_tensors(case, matrix):
    name, model, data = list(cases())[case]
    other = rescaled(model, data[0])
    found, again = (riemannian_sharpness(m, data, matrix=matrix) for m in (model, other))
    assert again == pytest.approx(found, rel=1e-7)
    plain, moved = (ms_optim.top_eigenvalue(m, data, matrix=matrix) for m in (model, other))
    assert abs(moved / plain - 1) > 0.1  # which would not be so without the metric


@pytest.mark.parametrize("network", [chain, biased])
def test_it_is_changed_by_rescalings_of_single_units(network):
    model, data = network(), labelled()
    other = with_rescaled_units(model)
    assert torch.allclose(model(data[0]), other(data[0]))
    found, again = (riemannian_sharpness(m, data) for m in (model, other))
    assert abs(again / found - 1) > 0.02


def test_a_tensor_that_is_zero_drops_out_and_is_named():
    model, data = biased(), labelled()
    nn.init.zeros_(model[0].bias)
    found = riemannian_sharpness(model, data)
    assert found.notes == ("0.bias is 0 and drops out",) and found.layers["0.bias"] < 1e-8
    others = [name for name, _ in model.named_parameters() if name != "0.bias"]
    assert found == pytest.approx(riemannian_sharpness(model, data, others), rel=1e-6)


@pytest.mark.parametrize("build, shape", [(lenet, (4, 1, 28, 28)), (lambda: small_resnet(4), (4, 1, 8, 8))])
def test_large_networks_can_be_measured_and_are_left_alone(build, shape):
    model, x, y = build().float(), torch.randn(shape).float(), torch.tensor([0, 3, 5, 9])
    before = snapshot(model)
    found = ms_optim.riemannian_sharpness(model, [(x[:3], y[:3]), (x[3:], y[3:])], tolerance=1e-3)
    assert found > 0 and not any("not converged" in note for note in found.notes)
    assert_undisturbed(model, before)
