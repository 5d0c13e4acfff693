"""The trace as a measure: a sum with its parts, unbiased where it is sampled, and dependent on the scaling."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import ms_optim
from ms_optim.models import lenet, small_resnet
from ms_optim.sharpness import trace_sharpness


def network():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))


def test_it_is_the_sum_of_the_layers_traces():
    model, x = network(), torch.randn(9, 5)
    value = trace_sharpness(model, x)
    traces = ms_optim.hessian_trace(model, x)
    assert value == pytest.approx(sum(traces.values()), rel=1e-14) and value.layers == dict(traces)
    assert value.standard_error == 0 and value.notes == ()


def test_it_is_the_trace_of_the_dense_hessian():
    model, x, y = network(), torch.randn(9, 5), torch.randint(4, (9,))
    names = [name for name, _ in model.named_parameters()]

    def loss(*values):
        logits = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return nn.functional.cross_entropy(logits, y)

    parameters = tuple(p.detach() for p in model.parameters())
    hessian = torch.autograd.functional.hessian(loss, parameters)
    dense = sum(float(hessian[i][i].reshape(p.numel(), p.numel()).trace()) for i, p in enumerate(parameters))
    assert trace_sharpness(model, x) == pytest.approx(dense, rel=1e-11)


def test_it_depends_on_the_scaling():
    model, x = network(), torch.randn(9, 5)
    before = trace_sharpness(model, x)
    group = ms_optim.scale_symmetries(model, x)
    group.rescale_(model, [1.5])
    assert trace_sharpness(model, x) > 1.5 * before
    assert ms_optim.minimum_sharpness(model, x) <= before


def test_samples_of_it_are_unbiased_and_within_the_bound():
    model, x = network(), torch.randn(9, 5)
    exact = trace_sharpness(model, x)
    values = [
        trace_sharpness(model, x, columns=1, probes=2, generator=torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    found = torch.tensor([float(value) for value in values])
    scatter = float(found.std())
    assert abs(float(found.mean()) - exact) < 4 * scatter / math.sqrt(len(values))
    # The standard error is a bound: errors of layers that share their signs add up at most linearly.
    assert scatter <= 1.1 * math.sqrt(sum(value.standard_error**2 for value in values) / len(values))
    assert scatter > 0


@pytest.mark.parametrize("build, shape", [(lenet, (2, 1, 28, 28)), (small_resnet, (4, 1, 8, 8))])
def test_networks_of_the_papers(build, shape):
    value = trace_sharpness(build(), torch.randn(shape), columns=1, probes=2)
    assert value > 0 and value.standard_error > 0


def test_gauss_newton_traces_are_noted():
    model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4))
    assert trace_sharpness(model, torch.randn(3, 5)).notes == ("of 2 of 4 parameters the Gauss-Newton trace",)


def test_values_survive_copies():
    value = trace_sharpness(network(), torch.randn(3, 5))
    for other in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert other == value and other.layers == value.layers and other.standard_error == 0
