"""Checkpoints of a SAM that saved too little: what is in them is taken, and what is not is said."""

import pytest
import torch
from cases import mlp, samples, train

import ms_optim
from ms_optim.errors import LostStateWarning, StateError


def two_step(model, **changes):
    """What ``davda54/sam`` writes: its groups, and of each parameter the weights before the last ascent."""
    count = len(list(model.parameters()))
    group = {"rho": 0.2, "adaptive": False, "lr": 0.03, "momentum": 0.8, "weight_decay": 1e-4, "dampening": 0}
    group |= {"nesterov": False, "params": list(range(count))} | changes
    state = {i: {"old_p": p.detach().clone()} for i, p in enumerate(model.parameters())}
    return {"state": state, "param_groups": [group]}


def test_groups_are_taken_and_what_is_lost_is_said():
    model = mlp()
    optimizer = ms_optim.SAM(model, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    list(train(model, optimizer, samples(model, 2)))
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(LostStateWarning, match=r"no state of its base optimizer: SGD \(momentum\) starts anew"):
        optimizer.load_state_dict(two_step(model))
    (group,) = optimizer.param_groups
    assert (group["rho"], group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.03, 0.8, 1e-4)
    assert group["params"] == list(model.parameters()) and not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    list(train(model, optimizer, samples(model, 2)))
    optimizer.load_state_dict(optimizer.state_dict())  # and from now on nothing is lost


def test_the_adaptive_one_is_named():
    model = mlp()
    optimizer = ms_optim.ASAM(model, torch.optim.SGD, operator="elementwise", lr=0.1)
    with pytest.warns(LostStateWarning, match="operator='elementwise'"):
        optimizer.load_state_dict(two_step(model, adaptive=True))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = mlp()
    optimizer = ms_optim.SAM(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(StateError, match=r"have \[1\] and \[6\]"):
        optimizer.load_state_dict(two_step(model, params=[0]))
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(StateError, match="has no rho"):
        ms_optim.MSRegularizedSGD(model, lr=0.1).load_state_dict(two_step(model))
    with pytest.raises(StateError, match="no 'ms_optim' entry"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
