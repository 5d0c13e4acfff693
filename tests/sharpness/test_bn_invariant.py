"""BN-invariant sharpness: which weights set their own unit, and what is undone by that and what is not."""

import copy
import math

import pytest
import scipy.integrate
import torch
from curvature.undisturbed import assert_undisturbed, snapshot
from sharpness.networks import chain, grown_before_normalisers, known_group, labelled, normalised, three_kinds
from torch import nn
from torch.nn import functional as F
from zoo import ZOO

from ms_optim import adaptive_sharpness, bn_invariant_sharpness, sam_sharpness, scale_symmetries
from ms_optim.errors import SymmetryError
from ms_optim.sharpness.bn_invariant import scale_free_names

CASES = ["worst", "average", "integral"]
IMAGES = (2, 4, 4)


def test_the_scale_free_weights_are_those_in_front_of_normalisers():
    model, (x, _) = normalised(), labelled(shape=IMAGES)
    # γ and β of the first normaliser reach the logits through the second only.
    free = {"0.weight", "1.weight", "1.bias", "4.weight", "4.bias"}
    assert scale_free_names(model, scale_symmetries(model, x)) == free
    residual = next(network for network in ZOO if network.name == "residual with projection")
    model, x = residual.build(), residual.inputs(2)
    kernels = {"conv.weight", "conv1.weight", "conv2.weight", "shortcut.0.weight"}
    vectors = {"norm.weight", "norm.bias", "norm1.weight", "norm1.bias"}
    assert scale_free_names(model, scale_symmetries(model, x)) == kernels | vectors


def test_one_step_is_the_rise_at_the_point_of_its_metric():
    model, (x, y) = normalised(), labelled(shape=IMAGES)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    v = []
    for name, p in model.named_parameters():
        weight = p.detach()
        if name == "0.weight":
            v.append(weight.flatten(1).norm(dim=1)[:, None, None, None].expand_as(weight))
        elif name == "4.weight":
            v.append(weight.norm(dim=1, keepdim=True).expand_as(weight))
        elif name in ("1.weight", "1.bias", "4.bias"):
            v.append(weight.abs())
        else:
            v.append(torch.ones_like(weight))
    norm = math.sqrt(sum(float((a * b).square().sum()) for a, b in zip(v, g, strict=True)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, a, b in zip(other.parameters(), v, g, strict=True):
            parameter += 0.1 * a.square() * b / norm
        rise = float(F.cross_entropy(other(x), y) - F.cross_entropy(model(x), y))
    assert bn_invariant_sharpness(model, (x, y), 0.1, steps=1) == pytest.approx(rise, rel=1e-11)
    assert rise > 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_unchanged_by_scales_in_front_of_normalisers(case, norm):
    model, (x, y) = normalised(), labelled(shape=IMAGES)
    rho = 0.05 if norm == "l2" else 0.01
    options = {"norm": norm, "case": case, "steps": 5, "samples": 3, "group": known_group(model, x)}
    value = bn_invariant_sharpness(model, (x, y), rho, **options)
    other = grown_before_normalisers(model, x)
    assert bn_invariant_sharpness(other, (x, y), rho, **options) == pytest.approx(value, rel=1e-8)
    assert abs(value) > 1e-6 and value.notes == ()


def test_absolute_units_are_changed_by_them():
    model, (x, y) = normalised(), labelled(shape=IMAGES)
    value, moved = (sam_sharpness(net, (x, y)) for net in (model, grown_before_normalisers(model, x)))
    assert abs(moved - value) > 0.01 * value


@pytest.mark.parametrize("case", CASES)
def test_changed_by_a_scale_that_one_layer_gives_to_the_next(case):
    model, (x, y) = normalised(), labelled(shape=IMAGES)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[5].weight *= 3.0
        other[5].bias *= 3.0
        other[7].weight /= 3.0
        torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-13)
    group = known_group(model, x)
    value, moved = (bn_invariant_sharpness(net, (x, y), 0.1, case=case, group=group) for net in (model, other))
    assert abs(moved - value) > 0.05 * abs(value)
    # Which adaptive sharpness is not.
    value, moved = (adaptive_sharpness(net, (x, y), 0.1, scale="layer") for net in (model, other))
    assert moved == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("case", ["worst", "average"])
def test_without_normalisers_it_is_sams_and_says_so(case):
    model, (x, y) = chain(), labelled()
    value = bn_invariant_sharpness(model, (x, y), 0.2, case=case)
    assert value == sam_sharpness(model, (x, y), 0.2, case=case)
    assert "no normaliser makes a weight scale-free" in value.notes[0]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_integral_is_that_of_a_fine_rule_along_the_worst_direction(power):
    # Two weights, linear logits: one gradient step from a point finds the direction.
    model = nn.Linear(1, 2, bias=False)
    x, y = torch.tensor([[1.5], [-0.7], [0.4]]), torch.tensor([0, 1, 1])
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])
    direction, weight = g / g.norm(), model.weight.detach()

    def risen(t):
        with torch.no_grad():
            return float(F.cross_entropy(x @ (weight + t * direction).T, y) - F.cross_entropy(x @ weight.T, y))

    mean, _ = scipy.integrate.quad(lambda t: abs(risen(t)) ** power / 0.8, -0.4, 0.4, points=[0.0], epsabs=1e-13)
    value = bn_invariant_sharpness(model, (x, y), 0.4, case="integral", power=power, steps=1)
    assert value == pytest.approx(mean ** (1 / power), rel=1e-9)


@pytest.mark.parametrize(("name", "case"), [("mlp", "worst"), ("lenet", "average"), ("resnet", "integral")])
def test_the_three_kinds_of_networks_and_nothing_is_disturbed(name, case):
    model, (x, y) = three_kinds()[name]
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    value = bn_invariant_sharpness(model, iter([(x[:3], y[:3]), (x[3:], y[3:])]), case=case, steps=2, samples=2)
    assert_undisturbed(model, before)
    assert math.isfinite(value) and value != 0
    assert bool(value.notes) is (name != "resnet")


def test_arguments_that_mean_nothing_are_refused():
    model, (x, y) = chain(), labelled()
    with pytest.raises(ValueError, match="case must be 'worst', 'average' or 'integral', got 'line'"):
        bn_invariant_sharpness(model, (x, y), case="line")
    with pytest.raises(ValueError, match="power must be > 0"):
        bn_invariant_sharpness(model, (x, y), power=0.0)
    with pytest.raises(ValueError, match="norm must be"):
        bn_invariant_sharpness(model, (x, y), norm="l1")
    with pytest.raises(SymmetryError, match="rebuild it with scale_symmetries"):
        bn_invariant_sharpness(model, (x, y), group=scale_symmetries(chain(bias=False), x))
