"""Normalised sharpness: its definition on networks, the rescalings of neurons that it undoes, and what it does not."""

import copy
import pickle

import pytest
import torch
from curvature.undisturbed import assert_undisturbed, snapshot
from sharpness.networks import (
    assert_same_function,
    chain,
    grown_before_normalisers,
    labelled,
    normalised,
    rescaled_layers,
    rescaled_neurons,
    three_kinds,
)
from sharpness.test_matrix_scaling import by_scipy
from torch import nn

import ms_optim
from ms_optim import hessian_diagonal, minimum_sharpness, normalized_sharpness
from ms_optim.errors import CurvatureError, UnsupportedError
from ms_optim.reference import curvature as oracle


def test_it_is_the_definition_with_brute_force_diagonals():
    model, (x, _) = chain(), labelled()
    diagonals = oracle.exact_diagonals(model, x)
    value = normalized_sharpness(model, x)
    assert value.layers.keys() == {"0.weight", "2.weight", "4.weight"}
    for name, layer in value.layers.items():
        weight = model.get_parameter(name).detach()
        assert layer == pytest.approx(by_scipy(diagonals[name], weight.square()), rel=1e-9)
    assert value == pytest.approx(sum(value.layers.values()), rel=1e-15)
    assert value.details["residual"] <= 1e-12
    assert value.notes == ()


def test_a_kernel_is_summed_over_its_positions_and_a_group_is_a_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(5, 4, 4, 4)
    h = hessian_diagonal(model, x)["0.weight"].sum((2, 3))
    q = model[0].weight.detach().square().sum((2, 3))
    expected = by_scipy(h[:3], q[:3]) + by_scipy(h[3:], q[3:])
    assert normalized_sharpness(model, x).layers["0.weight"] == pytest.approx(expected, rel=1e-9)


def test_a_depthwise_convolution_has_its_closed_form():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(5, 4, 4, 4)
    h = hessian_diagonal(model, x)["0.weight"].sum((1, 2, 3))
    q = model[0].weight.detach().square().sum((1, 2, 3))
    assert normalized_sharpness(model, x).layers["0.weight"] == pytest.approx(float(2 * (h * q).sqrt().sum()))


@pytest.mark.parametrize("seed", range(3))
def test_unchanged_by_rescaling_neurons_one_by_one(seed):
    model, (x, _) = chain(seed=seed), labelled()
    value = normalized_sharpness(model, x)
    other = normalized_sharpness(rescaled_neurons(model, x, 1.5, seed), x)
    assert other == pytest.approx(value, rel=1e-10)
    assert other.layers == pytest.approx(value.layers, rel=1e-10)
    # Minimum sharpness claims rescalings of layers only.
    assert minimum_sharpness(rescaled_neurons(model, x, 1.5, seed), x) != pytest.approx(
        minimum_sharpness(model, x), rel=1e-2
    )


def test_unchanged_by_rescaling_layers_and_units_in_front_of_normalisers():
    model, (x, _) = normalised(), labelled(shape=(2, 4, 4))
    value = normalized_sharpness(model, x)
    assert normalized_sharpness(rescaled_layers(model, x), x) == pytest.approx(value, rel=1e-10)
    assert normalized_sharpness(grown_before_normalisers(model, x), x) == pytest.approx(value, rel=1e-10)


def test_changed_by_a_rotation_between_linear_layers_which_traces_do_not_see():
    model, (x, _) = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)), labelled()
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(rotation @ model[0].weight)
        other[1].weight.copy_(model[1].weight @ rotation.T)
    assert_same_function(model, other, x)
    assert minimum_sharpness(other, x) == pytest.approx(minimum_sharpness(model, x), rel=1e-10)
    assert normalized_sharpness(other, x) != pytest.approx(normalized_sharpness(model, x), rel=1e-3)


def test_dead_units_contribute_nothing():
    model, (x, _) = chain(), labelled()
    with torch.no_grad():
        model[0].weight[:2] = -model[0].weight[:2].abs()
        model[0].bias[:2] = -100.0
        x[:, 1] = 0.0  # and an input that is always zero
    smaller = chain(sizes=(4, 5, 6, 3))
    with torch.no_grad():
        smaller[0].weight.copy_(model[0].weight[2:][:, [0, 2, 3, 4]])
        smaller[0].bias.copy_(model[0].bias[2:])
        smaller[2].weight.copy_(model[2].weight[:, 2:])
        smaller[2].bias.copy_(model[2].bias)
        smaller[4].load_state_dict(model[4].state_dict())
    value = normalized_sharpness(model, x)
    assert value == pytest.approx(normalized_sharpness(smaller, x[:, [0, 2, 3, 4]]), rel=1e-11)
    assert value.details["residual"] <= 1e-12


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet"])
def test_the_three_kinds_of_networks(name):
    model, (x, _) = three_kinds()[name]
    before = snapshot(model)
    value = normalized_sharpness(model, [x[:2], x[2:]])
    assert_undisturbed(model, before)
    assert value > 0 and value.details["residual"] <= 1e-12
    assert all(model.get_parameter(layer).ndim >= 2 for layer in value.layers)


def test_sampled_diagonals_and_smooth_activations_are_said():
    model, (x, _) = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)), labelled()
    value = normalized_sharpness(model, x, columns=0)
    assert any("sampled" in note for note in value.notes)
    assert any("0.weight" in note and "2.weight" not in note for note in value.notes)
    assert value > 0


def test_the_value_is_a_float_that_keeps_what_was_found_beside_it():
    model, (x, _) = chain(), labelled()
    value = normalized_sharpness(model, x)
    for same in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert type(same) is type(value) and same == value and repr(same) == repr(float(value))
        assert (same.layers, same.details, same.notes) == (value.layers, value.details, value.notes)
        assert same.standard_error is None
    assert type(value + 1.0) is float


def test_the_loss_is_that_of_the_diagonal():
    model, (x, _) = chain(), labelled()
    h = hessian_diagonal(model, x, loss="mse")["2.weight"]
    expected = by_scipy(h, model[2].weight.detach().square())
    assert normalized_sharpness(model, x, loss="mse").layers["2.weight"] == pytest.approx(expected, rel=1e-9)


def test_what_it_cannot_measure_is_refused():
    model, (x, _) = chain(), labelled()
    with pytest.raises(UnsupportedError, match="form='icml' is not known"):
        normalized_sharpness(model, x, form="icml")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    with pytest.raises(CurvatureError, match="no trainable parameter with two or more axes"):
        normalized_sharpness(model, x)
    assert ms_optim.normalized_sharpness is normalized_sharpness
