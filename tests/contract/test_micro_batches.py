"""m: how many samples share a perturbation."""

import copy

import pytest
import torch
from cases import CASES, Case, everything, known_group, mlp, same, samples
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import OptimizerError, UnsupportedError

every_case = pytest.mark.parametrize("case", CASES, ids=str)
gradient_ascents = pytest.mark.parametrize(
    "case", [c for c in CASES if c.passes == 2 and "noise" not in c.name], ids=str
)


def passes(model, optimizer, batches):
    for x, y in batches:
        for gradient_pass in optimizer.passes(samples=len(x)):
            with gradient_pass:
                cross_entropy(model(x[gradient_pass.samples]), y[gradient_pass.samples]).backward()
        optimizer.step()


def closures(model, optimizer, batches):
    losses = []
    for x, y in batches:

        def closure(part, x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[part]), y[part])
            loss.backward()
            return loss

        losses.append(optimizer.step(closure, samples=len(x)).item())
    return losses


@every_case
@pytest.mark.parametrize("m", [3, 4, 8, 100])
def test_closures_and_passes_give_the_same_bits_and_the_clean_loss(case: Case, m):
    model = mlp()
    other = copy.deepcopy(model)
    batches = samples(model, 4)
    by_closure, by_passes = case.build(model, m=m), case.build(other, m=m)
    with torch.no_grad():
        clean = cross_entropy(model(batches[0][0]), batches[0][1]).item()
    losses = closures(model, by_closure, batches)
    passes(other, by_passes, batches)
    assert same(everything(model, by_closure), everything(other, by_passes))
    if "noise" not in case.name:
        assert losses[0] == pytest.approx(clean, rel=1e-12)


@every_case
def test_as_many_samples_as_there_are_is_the_whole_batch(case: Case):
    model = mlp()
    other = copy.deepcopy(model)
    whole, all_of_them = case.build(model), case.build(other, m=8)
    batches = samples(model, 4)
    passes(model, whole, batches)
    passes(other, all_of_them, batches)
    assert same(everything(model, whole), everything(other, all_of_them))


@gradient_ascents
@pytest.mark.parametrize("m", [3, 4])
def test_it_is_the_mean_of_the_gradients_at_each_parts_own_perturbation(case: Case, m):
    """Against single steps of SGD on each part: their mean, by the size of the parts."""
    model = mlp()
    group = known_group(model)
    (x, y), *_ = samples(model, 1)
    optimizer = case.build(model, m=m, momentum=0.0, refresh_every=1000)
    if optimizer.refresh_due:
        optimizer.refresh(x)
    start = [p.detach().clone() for p in model.parameters()]
    total = [torch.zeros_like(p) for p in start]
    for part in torch.arange(8).split(m):
        twin = copy.deepcopy(model)
        alone = case.build(twin, momentum=0.0, refresh_every=1000, group=group)
        alone.representative.balance, alone.representative.due = optimizer.balance, 1000
        passes(twin, alone, [(x[part], y[part])])
        for t, p, w in zip(total, twin.parameters(), start, strict=True):
            t += (p.detach() - w) * len(part) / 8
    passes(model, optimizer, [(x, y)])
    for p, w, t in zip(model.parameters(), start, total, strict=True):
        torch.testing.assert_close(p.detach(), w + t, rtol=1e-12, atol=1e-14)


def test_a_number_needs_the_size_of_the_batch():
    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1, m=4)
    (x, y), *_ = samples(model, 1)
    with pytest.raises(OptimizerError, match=r"m=4 samples share a perturbation.*passes\(samples=len\(x\)\)"):
        next(optimizer.passes())
    with pytest.raises(OptimizerError, match="got samples=0"):
        next(optimizer.passes(samples=0))
    passes(model, optimizer, [(x, y)])


@gradient_ascents
def test_on_one_process_local_and_global_are_the_same(case: Case):
    models = [mlp() for _ in range(2)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    optimizers = [case.build(model, m=m) for model, m in zip(models, ("local", "global"), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        passes(model, optimizer, samples(model, 3))
    assert same(*(everything(m, o) for m, o in zip(models, optimizers, strict=True)))


@every_case
def test_unmodified_loops_have_micro_batches_of_their_own(case: Case):
    model = mlp()
    optimizer = case.build(model, m=4)
    if case.passes == 1:
        with pytest.raises(UnsupportedError, match="accumulate over micro-batches of that size with m='local'"):
            model(samples(model, 1)[0][0])
    else:
        with pytest.raises(UnsupportedError, match="m=4 samples are to share a perturbation"):
            optimizer.attach(model)
