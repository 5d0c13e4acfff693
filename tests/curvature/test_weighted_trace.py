"""One signed column gives Σ w_p c_p and its gradient without bias: averaged over every sign there is, exactly."""

import itertools

import pytest
import torch
from curvature.agreement import assume_unsaturated
from curvature.random_networks import Attention, Mean, Residual, at_batch_statistics, mlps, settled, small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from hypothesis import given, settings
from torch import nn

from ms_optim.batch import Batch
from ms_optim.curvature.evaluation import evaluation
from ms_optim.curvature.losses import logit_factor
from ms_optim.curvature.weighted import weighted_trace
from ms_optim.reference import curvature as oracle


def all_signs(monkeypatch, samples, classes):
    """Go through every pattern of signs that the probe can draw."""
    for pattern in itertools.product([-1.0, 1.0], repeat=samples * (classes - 1)):
        given_signs = torch.tensor(pattern).view(samples, classes - 1)
        monkeypatch.setattr(logit_factor, "signs", lambda shape, like, generator, s=given_signs: s)
        yield


NORMALISED = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), (3,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 2, groups=2), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.Flatten()
        ),
        (2, 4, 4),
    ),
    "convolution 3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten()),
        (1, 3, 3, 3),
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)
        ),
        (1, 3, 3),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), Residual(nn.Linear(4, 4)), nn.Linear(4, 3)),
        (3,),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(8, 3)),
        (2, 3),
    ),
    "fused attention": (lambda: nn.Sequential(nn.Linear(2, 2), Attention(2, True), Mean(), nn.Linear(2, 3)), (2, 2)),
    "positions": (lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(6, 3)), (2, 2)),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_weighted_trace_and_its_gradient_are_unbiased_over_all_signs(name, monkeypatch):
    build, shape = NORMALISED[name]
    model, x = settled(build()).train(), torch.randn(2, *shape)
    parameters = dict(model.named_parameters())
    weights = {parameter: 0.5 + index for index, parameter in enumerate(parameters)}

    reference = at_batch_statistics(model, x)
    exact = oracle.weighted_trace(reference, x, weights)
    expected = torch.autograd.grad(exact, list(reference.parameters()), allow_unused=True)

    before = snapshot(model)
    values, gradients = [], []
    for _ in all_signs(monkeypatch, samples=2, classes=3):
        value = weighted_trace(model, Batch.of(x, model), weights, torch.Generator())
        values.append(value.detach())
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        gradients.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters.values(), strict=True)]
        )
    assert_undisturbed(model, before)
    torch.testing.assert_close(torch.stack(values).mean(), exact.detach(), rtol=1e-10, atol=0.0)
    for parameter, index in zip(parameters, range(len(parameters)), strict=True):
        mean = torch.stack([gradient[index] for gradient in gradients]).mean(0)
        wanted = torch.zeros_like(mean) if expected[index] is None else expected[index]
        torch.testing.assert_close(mean, wanted, rtol=1e-9, atol=1e-12, msg=lambda text, p=parameter: f"{p}: {text}")


@given(mlps())
@settings(max_examples=10)
def test_weighted_trace_is_unbiased_on_random_networks(drawn):
    model, x = drawn
    assume_unsaturated(model, x)
    x = x[:2]
    classes = model(x).shape[1]
    names = [name for name, _ in model.named_parameters()]
    weights = {name: 1.0 + index for index, name in enumerate(names[1:])}
    exact = float(oracle.weighted_trace(model, x, weights).detach())
    with pytest.MonkeyPatch.context() as monkeypatch:
        values = [
            float(weighted_trace(model, Batch.of(x, model), weights, torch.Generator(), "running").detach())
            for _ in all_signs(monkeypatch, len(x), classes)
        ]
    assert sum(values) / len(values) == pytest.approx(exact, rel=1e-10, abs=1e-14)


def test_weighted_trace_without_weights_is_zero():
    model, x = small_mlp(), torch.randn(2, 5)
    assert float(weighted_trace(model, Batch.of(x, model), {"0.weight": 0.0}, torch.Generator())) == 0.0


def test_weighted_trace_differentiates_within_an_outer_evaluation():
    model, x = settled(NORMALISED["batch norm"][0]()).train(), torch.randn(2, 1, 3, 3)
    weights = dict.fromkeys(dict(model.named_parameters()), 1.0)
    before = snapshot(model)

    def gradient():
        value = weighted_trace(model, Batch.of(x, model), weights, torch.Generator().manual_seed(1))
        return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)

    alone = gradient()
    with evaluation(model, "batch"):
        nested = gradient()
    assert_undisturbed(model, before)
    assert all(torch.equal(a, b) for a, b in zip(alone, nested, strict=True) if a is not None)
