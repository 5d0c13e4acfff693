"""Every measure finds on the GPU what it finds on the CPU: random numbers are drawn where the generator lives."""

import copy

import pytest
import torch
from sharpness.networks import labelled, normalised

import ms_optim

MEASURES = {
    "normalized": lambda model, data: ms_optim.normalized_sharpness(model, data),
    "sam": lambda model, data: ms_optim.sam_sharpness(model, data, 0.1, steps=4),
    "adaptive": lambda model, data: ms_optim.adaptive_sharpness(model, data, 0.1, "linf", steps=4, m=5),
    "average": lambda model, data: ms_optim.adaptive_sharpness(model, data, 0.1, case="average", samples=3),
    "fisher-rao": lambda model, data: ms_optim.fisher_rao_norm(model, data),
    "empirical": lambda model, data: ms_optim.fisher_rao_norm(model, data, "empirical"),
    "pac-bayes": lambda model, data: ms_optim.pac_bayes_flatness(model, data, samples=3),
    "bn-invariant": lambda model, data: ms_optim.bn_invariant_sharpness(model, data, case="integral", steps=4),
}


@pytest.mark.cuda
@pytest.mark.parametrize("name", MEASURES)
def test_the_gpu_finds_what_the_cpu_finds(name):
    model, (x, _) = normalised(), labelled(shape=(2, 4, 4))
    data = (x, model(x).argmax(1))  # on the CPU in both: a measure moves its batches
    there = copy.deepcopy(model).cuda()
    value = MEASURES[name](model, data)
    assert MEASURES[name](there, data) == pytest.approx(value, rel=1e-7)
    assert value != 0
    assert all(p.is_cuda for p in there.parameters()) and torch.equal(there[0].weight.cpu(), model[0].weight)
