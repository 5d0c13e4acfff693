"""Rényi sharpness is its formula of all eigenvalues, its error bars are true, and layers do not see rescalings."""

import copy
import math
import pickle
from functools import cache

import pytest
import torch
from curvature.undisturbed import assert_undisturbed, snapshot
from sharpness.spectral_cases import biased, chain, labelled, rescaled, seeded
from torch import nn
from torch.nn import functional as F
from zoo import Residual, images

import ms_optim
from ms_optim.curvature.operator import Operator
from ms_optim.curvature.spectrum import spectrum
from ms_optim.models import lenet, small_resnet
from ms_optim.reference import spectrum as dense
from ms_optim.sharpness.renyi import renyi_of, renyi_sharpness

ORDERS = [0.3, 1.0, 1.2, 2.0, 3.0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("network", [chain, biased])
def test_it_is_the_formula_applied_to_all_eigenvalues(network, matrix, order):
    model, (x, y) = network(), labelled()
    whole = dense.hessian(model, x, y) if matrix == "hessian" else dense.gauss_newton(model, x)
    assert float(whole.trace()) > 0
    found = renyi_sharpness(model, (x, y), order, "all", matrix)
    assert found == pytest.approx(dense.renyi(whole, order), rel=1e-8)
    assert found.standard_error == 0.0 and found.notes == ()
    assert found.details["trace"] == pytest.approx(float(whole.trace()))
    assert found.details["dimension"] == len(whole)
    values = torch.linalg.eigvalsh(whole)
    share = -float(values[values < 0].sum() / values.abs().sum())
    assert found.details["negative_share"] == pytest.approx(share, abs=1e-12)
    assert (share > 1e-12) == (matrix == "hessian")
    for name, _ in model.named_parameters():
        right = dense.renyi(dense.block(whole, model, [name]), order)
        assert found.layers[name] == pytest.approx(right, rel=1e-8, abs=1e-12)


def test_which_layers_and_which_block():
    model, data = biased(), labelled()
    plain = renyi_sharpness(model, data)
    assert list(plain.layers) == ["0.weight", "2.weight"]
    all_ = renyi_sharpness(model, data, parameters="all")
    assert list(all_.layers) == [name for name, _ in model.named_parameters()] and all_ == plain
    some = renyi_sharpness(model, data, parameters=["2.bias", "2.weight"])
    right = dense.block(dense.hessian(model, *data), model, ["2.weight", "2.bias"])
    assert some == pytest.approx(dense.renyi(right, 1.2), rel=1e-8) and list(some.layers) == ["2.weight", "2.bias"]
    one = renyi_sharpness(model, data, parameters=["2.weight"])
    assert one == one.layers["2.weight"] == plain.layers["2.weight"]
    assert one.details["products"] == 15  # one spectrum serves both


def test_it_is_minus_an_entropy():
    model, data = biased(), labelled()
    found = [float(renyi_sharpness(model, data, order, matrix="gauss-newton")) for order in (0.5, 0.999, 1.0, 1.001, 4)]
    assert found == sorted(found)  # entropies fall with their order
    assert -math.log(43) < found[0] and found[-1] < 0
    assert found[1] == pytest.approx(found[2], abs=1e-3) and found[3] == pytest.approx(found[2], abs=1e-3)
    even = Operator(lambda v: 3 * v, 8)
    one = Operator(lambda v: v.sum(1, keepdim=True) * torch.ones_like(v), 8)
    for order in ORDERS:
        assert renyi_of(spectrum(even, 5, 5, seeded(0)), order)[0] == pytest.approx(-math.log(8))
        assert renyi_of(spectrum(one, 5, 5, seeded(0)), order)[0] == pytest.approx(0, abs=1e-9)


def test_it_says_nothing_about_the_size_of_the_curvature():
    model, data = chain(), labelled()
    for order in (0.5, 1.0, 1.2):
        found = renyi_sharpness(model, data, order)
        tripled = renyi_sharpness(model, data, order, loss=lambda o, t: 3 * F.cross_entropy(o, t))
        assert tripled == pytest.approx(found, rel=1e-9) and tripled.layers == pytest.approx(found.layers, rel=1e-9)
        assert tripled.details["trace"] == pytest.approx(3 * found.details["trace"])


def random_matrix(d=40, least=-0.1):
    torch.manual_seed(7)
    q, _ = torch.linalg.qr(torch.randn(d, d))
    return q @ torch.cat([torch.linspace(least, 0.6, d - 4), torch.tensor([1.0, 2, 3, 6])]).diag() @ q.T


@cache
def repeated():
    """A matrix, and 300 spectral measures of it from 25 probes each, without an error of the quadrature."""
    matrix = random_matrix()
    operator = Operator(lambda v: v @ matrix, len(matrix))
    return matrix, [spectrum(operator, 25, 40, seeded(s), exact=False) for s in range(300)]


@pytest.mark.parametrize("order", [0.5, 1.0, 1.2, 2.0])
def test_the_standard_error_is_the_spread_of_repeated_estimates(order):
    matrix, measures = repeated()
    found = [renyi_of(measure, order) for measure in measures]
    values, errors = torch.tensor([value for value, _, _ in found]), torch.tensor([error for _, error, _ in found])
    spread = float(values.std())
    assert float(errors.square().mean().sqrt()) == pytest.approx(spread, rel=0.12)
    right = dense.renyi(0.5 * (matrix + matrix.T), order)
    covered = ((values - right).abs() < 2 * errors).double().mean()
    assert 0.88 < float(covered) <= 0.99
    # Numerator and denominator share their probes: without that, the error would be another one.
    if order != 1.0:
        naive = [
            math.hypot(
                m.standard_error(m.samples(lambda x: x.abs() ** order)) / m.trace(lambda x: x.abs() ** order)[0],
                order * m.standard_error(m.samples(lambda x: x)) / m.trace(lambda x: x)[0],
            )
            / abs(order - 1)
            for m in measures
        ]
        assert abs(sum(naive) / len(naive) / spread - 1) > 0.15


def test_the_error_of_few_steps_is_shown_beside_that_of_few_probes():
    matrix = random_matrix(least=0.0)
    operator = Operator(lambda v: v @ matrix, len(matrix))
    for order in (0.3, 0.5, 1.2):
        right = renyi_of(spectrum(operator, 100, 40, seeded(1), exact=False), order)[0]  # of the same probes
        for steps in (4, 8, 15):
            found = spectrum(operator, 100, steps, seeded(1), exact=False)
            value, half = renyi_of(found, order)[0], renyi_of(found.coarse, order)[0]
            assert 1e-7 < abs(value - right) < abs(value - half)
    found = spectrum(operator, 100, 4, seeded(1), exact=False)  # an integer power is a polynomial
    assert renyi_of(found, 2.0)[0] == pytest.approx(renyi_of(found.coarse, 2.0)[0], rel=1e-12)


def test_sampled_values_converge_to_the_exact_ones():
    model, data = chain(), labelled()
    exact = renyi_sharpness(model, data, matrix="gauss-newton")
    assert exact.standard_error == 0.0
    errors, whole = [], dense.gauss_newton(model, data[0])
    operator = Operator(lambda v: v @ whole, 52)
    for probes in (10, 40, 160):
        value, error, _ = renyi_of(spectrum(operator, probes, 15, seeded(probes), exact=False), 1.2)
        assert abs(value - exact) < 4 * error
        errors.append(error)
    assert errors[0] > 1.4 * errors[1] > 1.4**2 * errors[2] > 0 and errors[2] < 0.05


@pytest.mark.parametrize("options", [{}, {"probes": 3, "steps": 4}], ids=["exact", "sampled"])
@pytest.mark.parametrize("order", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("network", [chain, biased])
def test_layers_are_unchanged_by_rescalings_and_the_whole_network_is_not(network, order, options):
    model, data = network(), labelled()
    other = rescaled(model, data[0])
    found, again = (renyi_sharpness(m, data, order, "all", **options) for m in (model, other))
    for name in found.layers:
        assert again.layers[name] == pytest.approx(found.layers[name], rel=1e-7, abs=1e-9)
        key = f"standard_error of {name}"
        assert again.details[key] == pytest.approx(found.details[key], rel=1e-6, abs=1e-9)
    assert abs(again - found) > 0.01 * abs(found)
    assert (found.standard_error == 0.0) == (options == {})


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
def test_layers_beside_normalisers_and_residual_sums_are_unchanged_by_rescalings(matrix):
    model, data = Residual().eval(), (images(4), torch.tensor([0, 1, 2, 0]))
    names = ["conv.weight", "norm.weight", "conv1.weight", "head.weight"]
    found, again = (
        renyi_sharpness(m, data, 1.2, names, matrix, probes=3, steps=4) for m in (model, rescaled(model, data[0]))
    )
    assert again.layers == pytest.approx(found.layers, rel=1e-6)
    assert abs(again - found) > 0.01 * abs(found)


def test_a_trace_that_is_not_positive_is_said_and_disturbs_no_other_value():
    model, (x, y) = biased(), labelled()
    found = renyi_sharpness(model, (x, F.one_hot(y).double()), loss=lambda o, t: -F.mse_loss(o, t))
    assert math.isnan(found) and all(math.isnan(value) for value in found.layers.values())
    assert len(found.notes) == 3 and all("not positive" in note for note in found.notes)
    assert found.notes[1].startswith("0.weight: ")
    model[2].weight.requires_grad_(False).zero_()  # nothing below it matters
    found = renyi_sharpness(model, (x, y), 1.0, "all")
    assert math.isnan(found.layers["0.weight"]) and not math.isnan(found.layers["2.bias"]) and not math.isnan(found)
    zero = "the matrix is 0, which has no normalised spectrum"
    assert found.notes == (f"0.weight: {zero}", f"0.bias: {zero}")


@pytest.mark.parametrize("build, shape", [(lenet, (4, 1, 28, 28)), (lambda: small_resnet(4), (4, 1, 8, 8))])
def test_large_networks_can_be_measured_and_are_left_alone(build, shape):
    model, x, y = build(), torch.randn(shape), torch.tensor([0, 3, 5, 9])
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    names = [name for name, p in model.named_parameters() if p.ndim >= 2][:2]
    for matrix in ("hessian", "gauss-newton"):
        found = ms_optim.renyi_sharpness(model, [(x[:3], y[:3]), (x[3:], y[3:])], 1.2, names, matrix, 3, 4)
        assert list(found.layers) == names and not any(math.isnan(value) for value in found.layers.values())
        assert found.standard_error > 0
    assert_undisturbed(model, before)


def test_numbers_out_of_range_are_refused():
    model, data = biased(), labelled()
    for order in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="order must be > 0 and finite, got"):
            renyi_sharpness(model, data, order)
    for name in ("probes", "steps"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            renyi_sharpness(model, data, **{name: 0})
    with pytest.raises(ValueError, match="parameters holds 'all of them'"):
        renyi_sharpness(model, data, parameters=["all of them"])


def test_a_value_is_a_number_that_keeps_its_attributes():
    found = renyi_sharpness(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), labelled())
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), copy.copy(found)):
        assert type(other) is ms_optim.Sharpness and other == found and repr(other) == repr(float(found))
        assert other.layers == found.layers and other.details == found.details
        assert other.standard_error == found.standard_error and other.notes == found.notes
    assert type(found + 1) is float and f"{found:.3f}" == f"{float(found):.3f}"
