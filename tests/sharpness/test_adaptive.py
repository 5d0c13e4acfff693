"""SAM's and adaptive sharpness: formulas, oracles on tiny networks, what rescalings leave and what they change."""

import copy
import itertools
import math

import numpy as np
import pytest
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
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ms_optim import adaptive_sharpness, sam_sharpness
from ms_optim.errors import CurvatureError, DataError, UnsupportedError
from ms_optim.sharpness.adaptive import metric, normalized

SCALES = [None, "element", "filter", "layer"]


def loss_at(model, x, y, steps):
    """L(w + ε) on a copy."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, step in zip(other.parameters(), steps, strict=True):
            parameter += step
        return float(F.cross_entropy(other(x), y))


def clean_loss(model, x, y):
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def gradient(model, x, y):
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def full_metric(model, scale):
    return [metric(p.detach(), scale).expand_as(p) for p in model.parameters()]


def test_the_metrics():
    weight = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
    assert metric(weight, None) == 1.0
    assert torch.equal(metric(weight, "element"), weight.abs())
    assert torch.equal(metric(weight, "filter"), torch.tensor([[5.0], [2.0]]))
    assert float(metric(weight, "layer")) == pytest.approx(29**0.5)
    kernel = torch.randn(4, 3, 2, 2)
    assert torch.allclose(metric(kernel, "filter").flatten(), kernel.flatten(1).norm(dim=1))
    assert torch.equal(metric(weight[0], "filter"), weight[0].abs())  # in a vector each entry is a unit of its own


@pytest.mark.parametrize("scale", SCALES)
def test_one_step_is_the_rise_at_sams_point(scale):
    # ε = ρ T² g / ‖T g‖: SAM for T = 1, ASAM for T = |w|.
    model, (x, y) = chain(), labelled()
    rho = 0.3 if scale in (None, "element") else 0.1
    g, t = gradient(model, x, y), full_metric(model, scale)
    norm = math.sqrt(sum(float((a * b).square().sum()) for a, b in zip(t, g, strict=True)))
    steps = [rho * a.square() * b / norm for a, b in zip(t, g, strict=True)]
    rise = loss_at(model, x, y, steps) - clean_loss(model, x, y)
    assert rise > 0.01
    assert adaptive_sharpness(model, (x, y), rho, scale=scale, steps=1) == pytest.approx(rise, rel=1e-11)
    if scale is None:
        assert sam_sharpness(model, (x, y), rho, steps=1) == pytest.approx(rise, rel=1e-11)


@pytest.mark.parametrize("scale", SCALES)
def test_one_step_in_the_largest_norm_is_the_rise_at_the_corner(scale):
    model, (x, y) = chain(), labelled()
    steps = [0.05 * a * b.sign() for a, b in zip(full_metric(model, scale), gradient(model, x, y), strict=True)]
    rise = loss_at(model, x, y, steps) - clean_loss(model, x, y)
    value = adaptive_sharpness(model, (x, y), 0.05, "linf", scale=scale, steps=1)
    assert value == pytest.approx(rise, rel=1e-11) and rise > 0


@pytest.mark.parametrize("scale", SCALES)
def test_the_worst_case_of_two_weights_is_what_a_fine_search_finds(scale):
    model = nn.Linear(1, 2, bias=False)
    x, y = torch.tensor([[1.5], [-0.7], [0.4]]), torch.tensor([0, 1, 1])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.8], [-0.3]]))
    t = full_metric(model, scale)[0].flatten()
    angles = torch.linspace(0, 2 * math.pi, 200_001)
    points = model.weight.detach().flatten() + 0.9 * t * torch.stack([angles.cos(), angles.sin()], 1)
    logits = points[:, None, :] * x  # the loss is convex in the weights: its maximum is on the circle
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(points)), reduction="none").view(-1, 3).mean(1)
    expected = float(losses.max()) - clean_loss(model, x, y)
    value = adaptive_sharpness(model, (x, y), 0.9, scale=scale, steps=200)
    # Angles of a grid of step h miss the maximum by a part of h² = 1e-9.
    assert expected * (1 - 1e-12) <= value <= expected * (1 + 1e-8)


def test_the_worst_case_on_a_cube_is_at_a_corner_of_linear_logits():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(2, 2), labelled(7, 2, shape=(2,))
    corners = [
        [0.4 * torch.tensor(c[:4]).view(2, 2), 0.4 * torch.tensor(c[4:])]
        for c in itertools.product((-1.0, 1.0), repeat=6)
    ]
    expected = max(loss_at(model, x, y, corner) for corner in corners) - clean_loss(model, x, y)
    assert sam_sharpness(model, (x, y), 0.4, "linf", steps=40) == pytest.approx(expected, rel=1e-12)


def test_the_average_case_is_that_of_an_integral():
    # One weight: E over N(0, ρ² T²) by Gauss-Hermite quadrature.
    model = nn.Linear(1, 2, bias=False)
    x, y = torch.tensor([[1.5], [-0.7]]), torch.tensor([0, 1])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.8], [-0.3]]))
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    for scale in (None, "element"):
        t = full_metric(model, scale)[0].flatten()
        expected = -clean_loss(model, x, y)
        for (a, p), (b, q) in itertools.product(zip(nodes, weights, strict=True), repeat=2):
            step = [(0.6 * t * torch.tensor([a, b])).view(2, 1)]
            expected += p * q / (2 * math.pi) * loss_at(model, x, y, step)
        few, many = (
            adaptive_sharpness(model, (x, y), 0.6, case="average", scale=scale, samples=n) for n in (100, 6400)
        )
        for value in (few, many):
            assert value.standard_error > 0
            assert abs(value - expected) < 4 * value.standard_error
        assert 6 < few.standard_error / many.standard_error < 11  # √64 = 8
        assert many.standard_error < 0.1 * expected


@pytest.mark.parametrize("case", ["worst", "average"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("scale", ["element", "filter", "layer"])
def test_unchanged_by_rescaling_layers(case, norm, scale):
    model, (x, y) = chain(), labelled()
    options = {"norm": norm, "case": case, "scale": scale, "steps": 8, "samples": 3}
    rho = 0.05 if norm == "linf" or case == "average" else 0.2
    value = adaptive_sharpness(model, (x, y), rho, **options)
    assert adaptive_sharpness(rescaled_layers(model, x), (x, y), rho, **options) == pytest.approx(value, rel=1e-8)
    assert abs(value) > 1e-4


@pytest.mark.parametrize("scale", ["element", "filter", "layer"])
def test_unchanged_by_scales_in_front_of_normalisers(scale):
    model, (x, y) = normalised(), labelled(shape=(2, 4, 4))
    value = adaptive_sharpness(model, (x, y), 0.1, scale=scale, steps=5)
    moved = adaptive_sharpness(rescaled_layers(model, x), (x, y), 0.1, scale=scale, steps=5)
    assert moved == pytest.approx(value, rel=1e-8)
    units = adaptive_sharpness(grown_before_normalisers(model, x), (x, y), 0.1, scale=scale, steps=5)
    assert (units == pytest.approx(value, rel=1e-8)) is (scale != "layer")


def test_without_a_metric_a_rescaling_of_layers_changes_it():
    model, (x, y) = chain(), labelled()
    other = rescaled_layers(model, x, std=1.5)
    for case in ("worst", "average"):
        value, moved = (sam_sharpness(net, (x, y), 0.1, case=case) for net in (model, other))
        assert abs(moved - value) > 0.05 * abs(value)


def test_only_the_metric_of_entries_undoes_rescalings_of_neurons():
    model, (x, y) = chain(), labelled()
    other = rescaled_neurons(model, x)
    for scale, same in (("element", True), ("filter", False), ("layer", False)):
        value, moved = (adaptive_sharpness(net, (x, y), 0.2, scale=scale, steps=8) for net in (model, other))
        assert (moved == pytest.approx(value, rel=1e-8)) is same
        assert same or abs(moved - value) > 1e-2 * value


def test_pieces_of_m_samples_have_perturbations_of_their_own():
    model, (x, y) = chain(), labelled(10)
    rises = [adaptive_sharpness(model, (x[i : i + 4], y[i : i + 4]), 0.2) for i in (0, 4, 8)]
    value = adaptive_sharpness(model, (x, y), 0.2, m=4)
    assert value == pytest.approx(0.4 * rises[0] + 0.4 * rises[1] + 0.2 * rises[2], rel=1e-12)
    assert value.details["pieces"] == 3 and value.details["largest"] == max(rises)
    assert value.details["loss"] == pytest.approx(clean_loss(model, x, y), rel=1e-13)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    assert adaptive_sharpness(model, loader, 0.2) == pytest.approx(value, rel=1e-12)
    # A perturbation that suits them all rises by no more.
    assert adaptive_sharpness(model, (x, y), 0.2) <= value
    # In the average case there is nothing to suit: pieces make no difference.
    whole, cut = (adaptive_sharpness(model, (x, y), 0.2, case="average", m=m) for m in (None, 3))
    assert cut == pytest.approx(whole, rel=1e-12)


def test_more_steps_and_larger_balls_find_no_less():
    model, (x, y) = chain(), labelled()
    values = [adaptive_sharpness(model, (x, y), 0.5, steps=steps) for steps in (1, 20)]
    assert values[0] < values[1]
    assert adaptive_sharpness(model, (x, y), 0.1) < adaptive_sharpness(model, (x, y), 0.3)


def test_normalised_logits_do_not_see_the_temperature():
    logits = torch.randn(4, 5) + 3.0
    expected = logits / logits.std(1, correction=0, keepdim=True)
    assert torch.allclose(normalized(logits), expected, rtol=1e-14)
    assert torch.equal(normalized(torch.ones(2, 3)), torch.ones(2, 3))
    model, (x, y) = chain(bias=False), labelled()
    hotter = copy.deepcopy(model)
    with torch.no_grad():
        hotter[4].weight *= 4.0
    with_, without = (
        [adaptive_sharpness(net, (x, y), 0.1, normalize_logits=on) for net in (model, hotter)] for on in (True, False)
    )
    assert with_[1] == pytest.approx(with_[0], rel=1e-9)
    assert abs(without[1] - without[0]) > 0.1 * without[0]


def test_a_loss_of_ones_own():
    model, (x, _) = chain(), labelled()
    targets = torch.randn(12, 3)
    assert adaptive_sharpness(model, (x, targets), 0.1, loss=F.mse_loss) == adaptive_sharpness(
        model, (x, targets), 0.1, loss="mse"
    )


@pytest.mark.parametrize("case", ["worst", "average"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet"])
def test_the_three_kinds_of_networks_and_nothing_is_disturbed(name, case):
    model, (x, y) = three_kinds()[name]
    model.train()
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    with torch.no_grad():
        value = adaptive_sharpness(model, [(x[:2], y[:2]), (x[2:], y[2:])], 0.1, case=case, steps=3, samples=2)
    assert_undisturbed(model, before)
    assert math.isfinite(value) and value != 0


def test_the_same_call_gives_the_same_number_and_an_exception_restores_the_weights():
    model, (x, y) = chain(), labelled()
    first, second = (adaptive_sharpness(model, (x, y), 0.3, case="average") for _ in range(2))
    assert first == second and first.standard_error == second.standard_error
    calls = itertools.count()

    def failing(logits, targets):
        if next(calls) == 3:
            raise KeyError("inside the loss")
        return F.cross_entropy(logits, targets)

    before = snapshot(model)
    with pytest.raises(KeyError, match="inside the loss"):
        adaptive_sharpness(model, (x, y), 0.3, loss=failing)
    assert_undisturbed(model, before)


def test_a_dead_network_has_no_sharpness():
    model, (x, y) = chain(bias=False), labelled()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for scale in ("element", "filter", "layer"):
        assert adaptive_sharpness(model, (x, y), 0.3, scale=scale) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be > 0"),
        ({"rho": float("nan")}, "rho must be > 0"),
        ({"norm": "l1"}, "norm must be 'l2' or 'linf', got 'l1'"),
        ({"case": "best"}, "case must be"),
        ({"scale": "neuron"}, "scale must be"),
        ({"steps": 0}, "steps must be a whole number >= 1"),
        ({"samples": 2.5}, "samples must be a whole number >= 1"),
        ({"step_size": -1.0}, "step_size must be > 0"),
        ({"m": 0}, "m must be a whole number >= 1"),
        ({"loss": 3}, "loss must be a name or a callable"),
        ({"loss": lambda o, y: F.cross_entropy(o, y, reduction="none")}, "one number"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message):
    model, data = chain(), labelled()
    with pytest.raises(ValueError, match=message):
        adaptive_sharpness(model, data, **options)


def test_data_that_cannot_be_measured_are_refused():
    model, (x, y) = chain(), labelled()
    with pytest.raises(DataError, match="without targets"):
        sam_sharpness(model, x)
    with pytest.raises(DataError, match="cannot be cut into pieces of m=5"):
        sam_sharpness(model, (x, [y]), m=5, loss=lambda o, t: F.cross_entropy(o, t[0]))
    with pytest.raises(UnsupportedError, match="has no name here"):
        sam_sharpness(model, (x, y), loss="hinge")
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    for case in ("worst", "average"):
        with pytest.raises(CurvatureError, match="the loss at the weights is nan"):
            sam_sharpness(model, (x, y), case=case)
