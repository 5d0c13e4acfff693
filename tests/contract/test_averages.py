"""An average of the weights is carried along when the weights are rescaled."""

import copy

import pytest
import torch
from cases import CASES, Case, convnet, everything, mlp, same, samples, train
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

moving = pytest.mark.parametrize("case", [c for c in CASES if c.rebalances and "metric" not in c.name], ids=str)
AVERAGES = {
    "AveragedModel": (lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7)), "update_parameters"),
    "AveragedModel with buffers": (
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True),
        "update_parameters",
    ),
    "ModelEmaV2": (lambda model: ModelEmaV2(model, decay=0.7), "update"),
    "ModelEmaV3": (lambda model: ModelEmaV3(model, decay=0.7), "update"),
}


def carry(average):
    return lambda group, t: group.rescale_(average.module, t, clamp=True)


@moving
@pytest.mark.parametrize("kind", AVERAGES)
def test_it_computes_what_an_average_of_equivalent_weights_computes(case: Case, kind):
    """Rescaled with the weights, an average of W and of its rescaled successors is the average in one scale."""
    build, update = AVERAGES[kind]
    model = mlp()
    optimizer = case.build(model, refresh_every=2, columns=None)
    average = build(model)
    optimizer.register_rescale_hook(carry(average))
    moves = []
    optimizer.register_rescale_hook(lambda group, t: moves.append(group.log_scale(t)))
    history = []
    batches = samples(model, 6)
    for _ in train(model, optimizer, batches):
        getattr(average, update)(model)
        history.append(({n: p.detach().clone() for n, p in model.named_parameters()}, len(moves)))
    assert len(moves) == 3 and any(abs(a) > 1e-4 for move in moves for a in move.values())
    # The slow twin: every snapshot brought to the last scale, and then averaged.
    expected = {n: p.detach().clone() for n, p in mlp_as_started(model, moves, batches, case).items()}
    first = kind.startswith("AveragedModel")
    for index, (weights, count) in enumerate(history):
        later = moves[count:]
        for n, w in weights.items():
            at_the_end = w * torch.tensor([move[n] for move in later]).sum().exp() if later else w
            keep = 0.0 if first and index == 0 else 0.7
            expected[n] = keep * expected[n] + (1 - keep) * at_the_end
    for n, p in average.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-10, atol=1e-12)


def mlp_as_started(model, moves, batches, case):
    """The weights before the first step, in the last scale."""
    torch.manual_seed(0)  # as the fixture does before the test builds its network
    start = dict(mlp().named_parameters())
    return {n: p * torch.tensor([move[n] for move in moves]).sum().exp() for n, p in start.items()}


@moving
def test_without_being_carried_along_it_would_be_another_network(case: Case):
    results = []
    for carried in (True, False):
        torch.manual_seed(0)
        model = mlp()
        with torch.no_grad():  # an equivalent start far from its representative
            model[0].weight.mul_(20), model[0].bias.mul_(20), model[2].weight.div_(20)
        optimizer = case.build(model, refresh_every=1000, lr=0.0)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        average.update_parameters(model)
        if carried:
            optimizer.register_rescale_hook(carry(average))
        (x, y), *_ = samples(model, 1)
        before = average(x).detach()
        list(train(model, optimizer, [(x, y)]))
        average.update_parameters(model)
        results.append(float(((average(x) - before).abs().max() / before.abs().max()).detach()))
    assert results[0] < 1e-10 and results[1] > 1e-2


@moving
def test_running_statistics_of_the_average_move_along(case: Case):
    model = convnet()
    with torch.no_grad():
        model[0].weight.mul_(5)
    optimizer = case.build(model, refresh_every=1000)
    batches = samples(model, 4)
    for x, _ in batches:
        model(x)
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    optimizer.register_rescale_hook(carry(average))
    x = batches[0][0]
    before = average.eval()(x).detach()
    optimizer.refresh(batches[0])
    torch.testing.assert_close(average(x).detach(), before, rtol=1e-9, atol=1e-11)


@moving
def test_a_step_that_is_undone_takes_the_average_back(case: Case):
    model = mlp()
    optimizer = case.build(model, refresh_every=1000)
    average = AveragedModel(model)
    average.update_parameters(model)
    optimizer.register_rescale_hook(carry(average))
    (x, y), *_ = samples(model, 1)
    before = [p.detach().clone() for p in average.parameters()]

    def closure():
        model(x)
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(closure)
    for a, b in zip(before, average.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-14, atol=0)


@moving
def test_a_hook_can_be_removed_and_is_not_copied(case: Case):
    model = mlp()
    optimizer = case.build(model, refresh_every=1)
    calls = []
    handle = optimizer.register_rescale_hook(lambda group, t: calls.append(t))
    batches = samples(model, 3)
    list(train(model, optimizer, batches[:1]))
    its_model, twin = copy.deepcopy((model, optimizer))
    list(train(its_model, twin, batches[1:]))
    assert len(calls) == 1
    handle.remove()
    list(train(model, optimizer, batches[1:]))
    assert len(calls) == 1
    assert same(everything(model, optimizer), everything(its_model, twin))


def test_a_clamped_variance_is_zero_and_not_negative():
    import ms_optim

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    group = ms_optim.scale_symmetries(model, torch.randn(8, 6))
    row = next(s.row for s in group.statistics)
    with torch.no_grad():
        model[1].running_var.fill_(1e-6)
    t = -row.sign() * 2.0
    with pytest.raises(ms_optim.errors.SymmetryError, match="would become"):
        group.rescale_(model, t)
    group.rescale_(model, t, clamp=True)
    assert bool((model[1].running_var == 0).all())
