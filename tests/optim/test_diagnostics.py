"""What a step saw, on request: held against what can be seen from outside."""

import copy
import math

import pytest
import torch
from cases import CASES, Case, everything, mlp, same, samples, train
from contract.faults import WithLoss
from torch.nn.functional import cross_entropy

import ms_optim

every_case = pytest.mark.parametrize("case", CASES, ids=str)
ascents = pytest.mark.parametrize("case", [c for c in CASES if c.passes == 2 and "noise" not in c.name], ids=str)


@ascents
def test_loss_gap_cosine_and_perturbation_are_what_they_are(case: Case):
    model = mlp()
    optimizer = case.build(model, diagnose=True, refresh_every=1000)
    for x, y in samples(model, 3):
        losses, grads, names = [], [], [name for name, _ in model.named_parameters()]
        weights = None
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                loss = cross_entropy(model(x), y)
                loss.backward()
                gradient_pass.loss = loss.detach()
                losses.append(loss.item())
                at = [p.detach().clone() for p in model.parameters()]
                weights = weights or at
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        found = optimizer.diagnostics
        assert (found.loss, found.perturbed_loss) == tuple(losses)
        assert found.loss_gap == losses[1] - losses[0]
        cosine = float(grads[0] @ grads[1] / grads[0].norm() / grads[1].norm())
        assert found.cosine == pytest.approx(cosine, rel=1e-10)
        if optimizer.steps:  # the first one may begin with a refresh, which moves the weights
            shifts = {n: float((a - w).norm()) for n, a, w in zip(names, at, weights, strict=True)}
            assert found.perturbation == pytest.approx(shifts, rel=1e-9)
            assert found.norm == pytest.approx(math.hypot(*shifts.values()), rel=1e-9)
        assert found.step == optimizer.steps
        optimizer.step()
    log_scale = optimizer.representative.log_scale
    assert found.scale == {name: math.exp(a) for name, a in log_scale.items()}
    assert bool(found.scale) == case.rebalances


@every_case
def test_looking_changes_nothing(case: Case):
    model = mlp()
    other = copy.deepcopy(model)
    seen, unseen = case.build(model, diagnose=True), case.build(other)
    batches = samples(model, 4)
    list(train(model, seen, batches))
    list(train(other, unseen, batches))
    assert same(everything(model, seen), everything(other, unseen))
    assert unseen.diagnostics is None
    assert seen.diagnostics.step == 3 and math.isfinite(seen.diagnostics.loss)
    if case.passes == 1:
        assert math.isnan(seen.diagnostics.cosine) and math.isnan(seen.diagnostics.loss_gap)


@ascents
def test_a_closure_and_an_attached_loop_see_the_same(case: Case):
    model = mlp()
    other = copy.deepcopy(model)
    by_closure, by_loop = case.build(model, diagnose=True), case.build(other, diagnose=True)
    module = by_loop.attach(WithLoss(other))
    for batch in samples(model, 3):
        list(train(model, by_closure, [batch]))
        by_loop.zero_grad()
        module(*batch).backward()
        by_loop.step()
        assert by_loop.diagnostics == by_closure.diagnostics


def test_the_scale_says_how_far_the_representative_was():
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(10), model[0].bias.mul_(10), model[2].weight.div_(10)
    for rebalance in ("move", "metric"):
        twin = copy.deepcopy(model)
        optimizer = ms_optim.MSSAM(twin, lr=0.1, rebalance=rebalance, diagnose=True)
        list(train(twin, optimizer, samples(twin, 1)))
        assert optimizer.diagnostics.scale["0.weight"] < 0.2 and optimizer.diagnostics.scale["2.weight"] > 1


def test_the_metric_weighs_each_layers_perturbation():
    """ε_p ∝ α_p^{-2} g_p: where the first layer is ten times too large, its perturbation is, too."""
    model = mlp()
    found = {}
    for factor in (1.0, 10.0):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].weight.mul_(factor), twin[0].bias.mul_(factor), twin[2].weight.div_(factor)
        optimizer = ms_optim.MSSAM(twin, lr=0.1, rebalance="metric", columns=None, diagnose=True)
        list(train(twin, optimizer, samples(twin, 1)))
        found[factor] = optimizer.diagnostics.perturbation
    assert found[10.0]["0.weight"] == pytest.approx(10 * found[1.0]["0.weight"], rel=1e-9)
    assert found[10.0]["2.weight"] == pytest.approx(found[1.0]["2.weight"] / 10, rel=1e-9)
