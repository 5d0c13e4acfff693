"""The two-step SAM: the original's interface and update, without its defects."""

import warnings

import pytest
import torch
from cases import mlp, same, samples
from torch.nn.functional import cross_entropy
from two_steps import (
    SGD,
    closure_alone,
    closure_of,
    driven,
    every_network,
    gradient_first,
    state_of,
    trained,
    two_steps,
)

import ms_optim
from ms_optim.compat import SAM
from ms_optim.testing import LAWS, Subject, check, euclidean

# The laws of every sharpness-aware optimizer.


def in_length_of_weights(optimizer, weights, perturbation):
    return euclidean(optimizer, weights, {name: e / weights[name].abs() for name, e in perturbation.items()})


def scaled_two_steps(optimizer, model, closure, scaler):
    closure()
    optimizer.first_step(zero_grad=True)
    closure()
    scaler.step(optimizer)
    scaler.update()


def build(given):
    return lambda model, params, base, **options: SAM(params, base, model=model if given else None, **options)


UNSEEN = "in two steps, nobody sees an exception in the caller's backward pass; the next first_step() does"
SUBJECTS = [
    Subject(
        f"{drive.__name__}, {'adaptive' if adaptive else 'plain'}",
        build(given),
        drive,
        options={"rho": 0.5 if adaptive else 0.05, "adaptive": adaptive},
        norm=in_length_of_weights if adaptive else euclidean,
        scaled_step=scaled_two_steps,
        excluded=dict.fromkeys(["an_exception_restores_the_model", "a_keyboard_interrupt_restores_the_model"], UNSEEN)
        if drive is two_steps
        else {},
    )
    for drive, adaptive, given in [
        (two_steps, False, False),
        (two_steps, True, True),
        (gradient_first, False, True),
        (gradient_first, True, False),
        (closure_alone, False, False),
    ]
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_every_law_is_kept(subject, law):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = check(subject, [law])[law]
    assert not outcome.broken, outcome


# The update is the original's.


def by_hand(network, steps, rho, adaptive, lr, momentum):
    """w ← w − lr m, m ← μ m + ∇L(w + ε), written out."""
    torch.manual_seed(0)
    model = network()
    parameters = list(model.parameters())
    buffers = [torch.zeros_like(p) for p in parameters]
    for x, y in samples(model, steps):
        g = torch.autograd.grad(cross_entropy(model(x), y), parameters)
        metric = [p.detach() ** 2 if adaptive else torch.ones_like(p) for p in parameters]
        norm = sum((m * d * d).sum() for m, d in zip(metric, g, strict=True)).sqrt()
        there = [p.detach() + rho * m * d / norm for p, m, d in zip(parameters, metric, g, strict=True)]
        names = dict(zip(dict(model.named_parameters()), (t.requires_grad_() for t in there), strict=True))
        g = torch.autograd.grad(cross_entropy(torch.func.functional_call(model, names, x), y), there)
        with torch.no_grad():
            for p, b, d in zip(parameters, buffers, g, strict=True):
                p -= lr * b.mul_(momentum).add_(d)
    return parameters


@driven
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_update_is_that_of_the_definition(drive, adaptive):
    model, _ = trained(drive, steps=5, rho=0.3, adaptive=adaptive)
    expected = by_hand(mlp, 5, 0.3, adaptive, lr=0.05, momentum=0.9)
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@every_network
@driven
@pytest.mark.parametrize("given", [True, False], ids=["model given", "model found"])
def test_all_ways_to_drive_it_are_one_step_of_sam(network, drive, given):
    torch.manual_seed(0)
    model = network()
    optimizer = ms_optim.SAM(model, lr=0.05, momentum=0.9, rho=0.1)
    torch.manual_seed(1)
    for x, y in samples(model, 4):
        optimizer.step(closure_of(model, x, y))
    assert same(state_of(*trained(drive, network, rho=0.1, given=given)), state_of(model, optimizer))


def test_adaptive_is_the_elementwise_operator():
    torch.manual_seed(0)
    model = mlp()
    optimizer = ms_optim.ASAM(model, lr=0.05, momentum=0.9, rho=0.5, operator="elementwise")
    for x, y in samples(model, 4):
        optimizer.step(closure_of(model, x, y))
    mine, _ = trained(two_steps, rho=0.5, adaptive=True)
    for p, q in zip(mine.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_rho_and_adaptive_may_differ_between_groups():
    model = mlp()
    groups = [
        {"params": model[0].parameters(), "rho": 0.3, "adaptive": True},
        {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.01},
    ]
    optimizer = SAM(groups, rho=0.1, **SGD)
    assert [g["rho"] for g in optimizer.param_groups] == [0.3, 0.1]
    assert [g["adaptive"] for g in optimizer.param_groups] == [True, False]
    (x, y), *_ = samples(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    closure_of(model, x, y)()
    g = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step()
    metric = [w * w if i < 2 else torch.ones_like(w) for i, w in enumerate(before)]
    norm = sum((m * d * d).sum() for m, d in zip(metric, g, strict=True)).sqrt()
    for i, (p, w, m, d) in enumerate(zip(model.parameters(), before, metric, g, strict=True)):
        torch.testing.assert_close(p - w, (0.3 if i < 2 else 0.1) * m * d / norm)
