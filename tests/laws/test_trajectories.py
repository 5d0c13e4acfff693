"""The law this package exists for: training does not depend on how the network happens to be scaled.

With ``rebalance="move"`` and ``"rows"`` the trajectory in function space is the same from every equivalent start.
SAM's is not, which shows that the test can fail.
"""

from __future__ import annotations

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import EVERY, Case, mlp, samples, train
from torch import nn

import ms_optim


def divergence(build, model, batches, std, seed=0) -> float:
    """Largest difference of logits, relative to their size, between training from W and from an equivalent W'."""
    equivalent = copy.deepcopy(model)
    group = ms_optim.scale_symmetries(model, batches[0])
    group.rescale_(equivalent, group.random(std=std, generator=torch.Generator().manual_seed(seed)))
    worst = 0.0
    runs = [train(net, build(net), batches) for net in (model, equivalent)]
    for (_, a), (_, b) in zip(*runs, strict=True):
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst


moving = [case for case in EVERY if "move" in case.name or "rows" in case.name]


@pytest.mark.parametrize("case", moving, ids=str)
@pytest.mark.parametrize("gauge", [0.0, 0.5, 1.0])
def test_the_trajectory_is_the_same_from_every_equivalent_start(case: Case, gauge):
    model = mlp()
    assert divergence(lambda net: case.build(net, gauge=gauge), model, samples(model, 12), std=1.0) < 1e-9


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_the_trajectory_law_holds_around_other_base_optimizers(kind):
    model = mlp()
    build = lambda net: ms_optim.MSSAM(net, kind, rho=0.1, lr=0.01, weight_decay=1e-2, refresh_every=4)  # noqa: E731
    assert divergence(build, model, samples(model, 12), std=1.0) < 1e-7


def test_sam_follows_another_trajectory_from_an_equivalent_start():
    model = mlp()
    build = lambda net: ms_optim.SAM(net, rho=0.1, lr=0.05, momentum=0.9)  # noqa: E731
    assert divergence(build, model, samples(model, 12), std=1.0) > 1e-2


@hypothesis.given(
    widths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    bias=st.booleans(),
    std=st.floats(0.1, 2.0),
    seed=st.integers(0, 2**16),
    trace=st.booleans(),
)
def test_the_law_holds_on_random_networks(widths, bias, std, seed, trace):
    torch.manual_seed(seed)
    sizes = [6, *widths, 4]
    layers: list[nn.Module] = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(i, o, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])

    def build(net):
        if trace:
            return ms_optim.MSRegularizedSGD(net, lr=0.02, strength=0.01, refresh_every=2, columns=None)
        return ms_optim.MSSAM(net, rho=0.05, lr=0.02, refresh_every=2, columns=None)

    assert divergence(build, model, samples(model, 5, seed), std, seed) < 1e-6


def test_from_the_rows_the_same_network_is_perturbed_as_from_the_representative_itself():
    """ε is drawn in one ball, that of the representative, wherever the weights stand."""
    model, losses = mlp(), []
    (x, y), _ = samples(model, 2)
    for rebalance in ("move", "rows"):
        net = copy.deepcopy(model)
        optimizer = ms_optim.MSSAM(net, rho=0.1, lr=0.05, rebalance=rebalance, columns=None)
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
    clean, perturbed, same_clean, same_perturbed = losses
    assert same_clean == pytest.approx(clean, rel=1e-12)
    assert same_perturbed == pytest.approx(perturbed, rel=1e-10) and perturbed > clean


@pytest.mark.parametrize("rebalance", ["move", "rows"])
@pytest.mark.parametrize("columns", [None, 2])
def test_with_batch_norm_the_law_holds_too(columns, rebalance):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 8, 1, 6, 6, generator=stream)
    batches = list(zip(inputs, torch.randint(0, 4, (6, 8), generator=stream), strict=True))

    def build(net):
        own = {"rho": 0.05, "refresh_every": 3, "columns": columns, "rebalance": rebalance}
        return ms_optim.MSSAM(net, **own, lr=0.05, momentum=0.9)

    # In training mode BatchNorm's ε makes the two starts differ by more than this; the first refresh heals it.
    assert divergence(build, model, batches, std=1.0) < 1e-8
