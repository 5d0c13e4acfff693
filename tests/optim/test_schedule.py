"""The window in which an optimizer takes its own part, and what is said when it never opens."""

import copy
import gc
import warnings

import pytest
import torch
from cases import CASES, Case, everything, mlp, same, samples, train
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import NoEffectWarning
from ms_optim.optim.schedule import Schedule


@pytest.mark.parametrize(
    ("schedule", "active"),
    [
        (Schedule(), range(20)),
        (Schedule(every=3), range(0, 20, 3)),
        (Schedule(start=4), range(4, 20)),
        (Schedule(start=4, end=9), range(4, 9)),
        (Schedule(every=2, start=3, end=9), (3, 5, 7)),
        (Schedule(total=20, start=19), (19,)),
    ],
)
def test_which_steps_are_ours(schedule, active):
    assert [step for step in range(20) if schedule.active(step)] == list(active)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outside_of_the_window_it_is_the_base_optimizer(case: Case):
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = case.build(model, start=3, end=5, rebalance=None)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    batches = samples(model, 7)
    for step, (x, y) in enumerate(batches):
        list(train(model, optimizer, [(x, y)]))
        if step == 4:  # where the window closed
            twin.load_state_dict(model.state_dict())
            plain.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
        elif step != 3:
            plain.zero_grad()
            cross_entropy(twin(x), y).backward()
            plain.step()
            assert same(list(model.parameters()), list(twin.parameters())), step


def test_a_run_that_ends_before_the_window_opens_is_told():
    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1, start=100)
    list(train(model, optimizer, samples(model, 3)))
    with pytest.warns(NoEffectWarning, match="SAM was dropped after 3 steps, .* to begin at step 100"):
        del optimizer
        gc.collect()


def test_a_run_that_got_there_is_not():
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = ms_optim.SAM(model, lr=0.1, start=2)
        list(train(model, optimizer, samples(model, 3)))
        twin = copy.deepcopy(optimizer)
        del optimizer, twin
        gc.collect()
        ms_optim.SAM(model, lr=0.1, start=2)  # and never used
        gc.collect()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_goes_on_in_the_window(case: Case):
    model = mlp()
    optimizer = case.build(model, start=2, every=2)
    batches = samples(model, 8)
    list(train(model, optimizer, batches[:3]))
    again = mlp()
    resumed = case.build(again, start=2, every=2)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    list(train(model, optimizer, batches[3:]))
    list(train(again, resumed, batches[3:]))
    assert same(everything(model, optimizer), everything(again, resumed))


def test_rho_follows_a_scheduler_that_is_told_to():
    """torch's schedulers drive `lr` alone; a group's rho is an entry like any other."""
    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1, rho=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms = []
    for x, y in samples(model, 4):
        for entry in optimizer.param_groups:
            entry["rho"] = 2 * entry["lr"]
        weights = [p.detach().clone() for p in model.parameters()]
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                cross_entropy(model(x), y).backward()
                shift = [p.detach() - w for p, w in zip(model.parameters(), weights, strict=True)]
        norms.append(float(sum(s.square().sum() for s in shift).sqrt()))
        optimizer.step()
        schedule.step()
    assert norms == pytest.approx([0.2 / (1 + step) for step in range(4)], rel=1e-10)
