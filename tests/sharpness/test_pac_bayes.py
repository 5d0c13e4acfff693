"""PAC-Bayes flatness: a linear classifier in closed form, its standard error, and what rescalings change."""

import math

import pytest
import scipy.optimize
import scipy.stats
import torch
from curvature.undisturbed import assert_undisturbed, snapshot
from sharpness.networks import (
    chain,
    grown_before_normalisers,
    labelled,
    normalised,
    rescaled_layers,
    rescaled_neurons,
    three_kinds,
)
from torch import nn

from ms_optim import pac_bayes_flatness
from ms_optim.errors import DataError


def two_classes(n=40, seed=0):
    """A linear classifier that makes some mistakes, and its data."""
    stream = torch.Generator().manual_seed(seed)
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 4, generator=stream))
    x = torch.randn(n, 4, generator=stream)
    with torch.no_grad():
        y = (model(x) + 0.3 * torch.randn(n, 2, generator=stream)).argmax(1)
    return model, (x, y)


def learnt(model, data):
    """The same inputs with the model's own answers, two of them wrong."""
    with torch.no_grad():
        y = model(data[0]).argmax(1)
    y[:2] = (y[:2] + 1) % 3
    return model, (data[0], y)


def expected_error(model, x, y, deviation):
    """E err(w + u) for u_i ~ N(0, deviation_i²): the margin of each sample is normal."""
    w = model.weight.detach()
    sign = 2.0 * y - 1.0
    margin = sign * ((w[1] - w[0]) * x).sum(1)
    spread = (x.square() @ deviation.square().sum(0)).sqrt()
    return scipy.stats.norm.cdf(-(margin / spread).numpy()).mean()


def exact_sigma(model, x, y, deviation_of, allowed=0.1):
    with torch.no_grad():
        clean = float((model(x).argmax(1) != y).double().mean())
    return scipy.optimize.brentq(
        lambda log: expected_error(model, x, y, deviation_of(math.exp(log))) - clean - allowed, -8, 3, xtol=1e-12
    )


@pytest.mark.parametrize("magnitude_aware", [False, True])
def test_a_linear_classifier_in_closed_form_within_the_standard_error(magnitude_aware):
    model, (x, y) = two_classes()
    w = model.weight.detach()

    def deviation_of(sigma):
        return (sigma**2 * w.square() + 0.01**2).sqrt() if magnitude_aware else torch.full_like(w, sigma)

    expected = math.exp(-2 * exact_sigma(model, x, y, deviation_of))
    errors = []
    for samples in (50, 3200):
        value = pac_bayes_flatness(model, (x, y), magnitude_aware, epsilon=0.01, samples=samples)
        assert abs(value - expected) < 4 * value.standard_error
        assert value.details["sigma"] == pytest.approx(value**-0.5, rel=1e-12)
        assert value.details["rise"] <= 0.1
        errors.append(value.standard_error)
    assert 5 < errors[0] / errors[1] < 13  # √64 = 8, and slopes of the first are noisy
    assert errors[1] < 0.05 * expected


def test_the_standard_error_is_the_scatter_of_independent_values():
    model, data = two_classes()
    values = [
        pac_bayes_flatness(model, data, samples=100, generator=torch.Generator().manual_seed(seed))
        for seed in range(40)
    ]
    scatter = torch.tensor(values).std().item()
    claimed = torch.tensor([value.standard_error for value in values]).mean().item()
    assert 0.7 < scatter / claimed < 1.4  # 40 values know their scatter to 11 %


def test_sigma_is_where_the_rise_crosses_the_deviation():
    model, data = two_classes()
    options = {"samples": 200, "tolerance": 1e-4}
    for deviation in (0.05, 0.2):
        value = pac_bayes_flatness(model, data, deviation=deviation, **options)
        assert value.details["rise"] <= deviation
        assert value.details["rise"] == pytest.approx(deviation, abs=1e-3)
    looser, tighter = (pac_bayes_flatness(model, data, deviation=d, **options) for d in (0.2, 0.05))
    assert looser < tighter


def test_magnitude_aware_without_epsilon_is_unchanged_by_every_rescaling():
    model, data = learnt(chain(), labelled(30))
    value = pac_bayes_flatness(model, data, True, epsilon=0.0)
    assert value > 0
    for other in (rescaled_layers(model, data[0], 1.5), rescaled_neurons(model, data[0])):
        # Errors are counted, so that rounding does not reach them.
        assert pac_bayes_flatness(other, data, True, epsilon=0.0) == pytest.approx(value, rel=1e-12)
    model, data = learnt(normalised(), labelled(30, shape=(2, 4, 4)))
    value = pac_bayes_flatness(model, data, True, epsilon=0.0)
    for other in (rescaled_layers(model, data[0]), grown_before_normalisers(model, data[0])):
        assert pac_bayes_flatness(other, data, True, epsilon=0.0) == pytest.approx(value, rel=1e-12)


def test_plain_noise_and_epsilon_do_not_survive_a_rescaling():
    model, data = learnt(chain(), labelled(30))
    other = rescaled_layers(model, data[0], 1.5)
    for options in ({}, {"magnitude_aware": True, "epsilon": 0.05}):
        value, moved = (pac_bayes_flatness(net, data, **options) for net in (model, other))
        assert abs(moved - value) > 0.05 * value


def test_an_error_that_never_rises_so_far_and_one_that_does_at_once():
    model, (x, y) = two_classes()
    flat = pac_bayes_flatness(model, (x, y), deviation=0.9)
    assert flat == 0.0 and flat.details["sigma"] == math.inf
    assert "less than 0.9 under noise of any size" in flat.notes[0]
    sharp = pac_bayes_flatness(model, (x, y), True, epsilon=1e6)
    assert sharp == math.inf and sharp.details["sigma"] == 0.0
    assert "ε alone raises the error" in sharp.notes[0]


@pytest.mark.parametrize("magnitude_aware", [False, True])
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet"])
def test_the_three_kinds_of_networks_and_nothing_is_disturbed(name, magnitude_aware):
    model, (x, _) = three_kinds()[name]
    y = model(x).argmax(1)
    model.train()
    before = snapshot(model)
    value = pac_bayes_flatness(model, [(x[:3], y[:3]), (x[3:], y[3:])], magnitude_aware, samples=2, tolerance=0.5)
    assert_undisturbed(model, before)
    assert 0 < value < math.inf
    assert value.details["error"] == 0.0


def test_the_same_call_gives_the_same_number():
    model, data = two_classes()
    assert pac_bayes_flatness(model, data) == pac_bayes_flatness(model, data)
    assert pac_bayes_flatness(model, data, samples=1).standard_error is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deviation": 0.0}, "deviation must be between 0 and 1"),
        ({"deviation": 1.0}, "deviation must be between 0 and 1"),
        ({"epsilon": -1.0}, "epsilon must be >= 0"),
        ({"samples": 0}, "samples must be a whole number >= 1"),
        ({"tolerance": 0.0}, "tolerance must be > 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message):
    model, data = two_classes()
    with pytest.raises(ValueError, match=message):
        pac_bayes_flatness(model, data, **options)


def test_targets_that_are_no_classes_are_refused():
    model, (x, _) = two_classes()
    with pytest.raises(DataError, match=r"targets are torch.float64 \(40, 2\) beside logits \(40, 2\)"):
        pac_bayes_flatness(model, (x, torch.rand(40, 2)))
    with pytest.raises(DataError, match=r"\(40, 1\); an error rate needs logits \[N, K\] with K >= 2"):
        pac_bayes_flatness(nn.Linear(4, 1), (x, torch.zeros(40, dtype=torch.long)))
    with pytest.raises(DataError, match="without targets"):
        pac_bayes_flatness(model, x)
