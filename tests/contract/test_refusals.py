"""What every optimizer refuses, with a message, and without having changed anything."""

from __future__ import annotations

import re

import pytest
import torch
from cases import CASES, Case, everything, mlp, same, samples, train
from torch import nn

import ms_optim
from ms_optim.errors import OptimizerError, StateError, UnsupportedError

every_case = pytest.mark.parametrize("case", CASES, ids=str)
cross_entropy = nn.functional.cross_entropy


@every_case
def test_a_state_dict_of_another_model_or_optimizer_is_refused_and_changes_nothing(case: Case):
    model = mlp()
    optimizer = case.build(model)
    list(train(model, optimizer, samples(model, 2)))
    before = everything(model, optimizer)
    wider = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
    shallower = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    other = ms_optim.SAM if case.kind is not ms_optim.SAM else ms_optim.MSSAM
    wrong = [
        (case.build(wider).state_dict(), r"0\.weight \(9, 6\).*0\.weight \(8, 6\)"),
        (case.build(shallower).state_dict(), "4 parameters there and 6 here"),
        (case.build([{"params": [p]} for p in model.parameters()], model=model).state_dict(), "6 parameter groups"),
        (other(mlp(), lr=0.1).state_dict(), f"not version 1 of {case.kind.__name__}"),
        (torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), "no 'ms_optim' entry"),
    ]
    for state, message in wrong:
        with pytest.raises(StateError, match=message):
            optimizer.load_state_dict(state)
    assert same(before, everything(model, optimizer))
    assert len(optimizer.param_groups) == 1


@every_case
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -0.1, "strength": -0.1}, ValueError, "must be >= 0 and finite, got -0.1"),
        ({"rho": float("nan"), "strength": float("nan")}, ValueError, "must be >= 0 and finite, got nan"),
        ({"gauge": 1.5}, ValueError, r"gauge must lie in \[0, 1\], got 1.5"),
        ({"refresh_every": 0}, ValueError, "refresh_every must be >= 1"),
        ({"columns": -1}, ValueError, "columns must be >= 0 or None, got -1"),
        ({"rebalance": "yes"}, ValueError, "rebalance must be 'move', 'rows', 'metric' or None, got 'yes'"),
        ({"buffers": "second"}, ValueError, "buffers must be 'first' or 'last'.*'second'"),
        ({"m": 0}, ValueError, "m must be 'global', 'local' or a number of samples >= 1, got 0"),
        ({"m": "rank"}, ValueError, "m must be .* got 'rank'"),
        ({"every": 0}, ValueError, "every must be >= 1 step, got 0"),
        ({"start": -1}, ValueError, "start must be >= 0 steps, got -1"),
        ({"start": 5, "end": 5}, ValueError, "from step 5 to step 5 never opens"),
        ({"start": 5, "total_steps": 5}, ValueError, "start=5 lies beyond the run's 5 steps"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_bad_settings_are_refused(case: Case, options, error, message):
    own = next(iter(case.off))
    options = {key: value for key, value in options.items() if key not in ("rho", "strength") or key == own}
    with pytest.raises(error, match=message):
        case.build(mlp(), **options)


@every_case
def test_bad_groups_are_refused(case: Case):
    model = mlp()
    own = next(iter(case.off))
    with pytest.raises(ValueError, match=re.escape(f"{own} must be >= 0")):
        case.build([{"params": list(model.parameters()), own: -1.0}], model=model)
    with pytest.raises(OptimizerError, match="not one of Sequential's"):
        case.build(mlp().parameters(), model=model)
    with pytest.raises(UnsupportedError, match="DataParallel"):
        case.build(nn.DataParallel(model))


@every_case
def test_a_step_without_gradient_passes_is_refused(case: Case):
    model = mlp()
    optimizer = case.build(model)
    (x, y), *_ = samples(model, 1)
    if case.passes > 1:  # one is what a loop makes anyway
        cross_entropy(model(x), y).backward()
    with pytest.raises(OptimizerError, match="call step"):
        optimizer.step()
    unfinished = optimizer.passes()
    next(unfinished)
    with pytest.raises(OptimizerError, match="not entered"):
        next(unfinished)


def test_a_due_refresh_that_cannot_run_is_an_error():
    model = mlp()
    optimizer = ms_optim.MSSAM(model, lr=0.1)
    (x, y), *_ = samples(model, 1)

    def closure():
        loss = cross_entropy(model.forward(x), y)  # bypasses the module's hooks
        loss.backward()
        return loss

    with pytest.raises(OptimizerError, match="was not called inside the gradient pass"):
        optimizer.step(closure)
    assert optimizer.refresh(x) is not None
    optimizer.step(closure)


@every_case
def test_a_schedule_that_makes_a_setting_negative_is_refused(case: Case):
    model = mlp()
    optimizer = case.build(model)
    optimizer.param_groups[0][next(iter(case.off))] = -1e-3
    with pytest.raises(ValueError, match="must be >= 0 and finite, got -0.001"):
        next(train(model, optimizer, samples(model, 1)))
