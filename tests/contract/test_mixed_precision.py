"""Autocast and GradScaler change how numbers are rounded, and nothing else; all passes draw the same random numbers."""

import contextlib
import warnings

import pytest
import torch
from cases import CASES, EVERY, Case, by_passes, convnet, everything, mlp, same, samples
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import NonFiniteWarning, OptimizerError

every_case = pytest.mark.parametrize("case", EVERY, ids=str)
ascents = [case for case in CASES if case.passes == 2 and "noise" not in case.name]
SCALE = 2.0**10


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def run(case, network, steps, around=contextlib.nullcontext, inside=contextlib.nullcontext, scaler=None, **options):
    """Train in float32 with a context around all passes of a step, or inside each of them; all that has changed."""
    torch.manual_seed(0)
    model = network().float()
    optimizer = case.build(model, **options)
    torch.manual_seed(1)
    batches = [(x.float(), y) for x, y in samples(model, steps)]
    by_passes(model, optimizer, batches, around, inside, scaler)
    return everything(model, optimizer)


@every_case
@pytest.mark.parametrize("network", [mlp, convnet])
def test_one_autocast_block_around_all_passes_is_one_in_each(case: Case, network):
    each = run(case, network, 4, inside=autocast)
    assert same(run(case, network, 4, around=autocast, inside=autocast), each)
    # (With the block around backward passes as well, those round otherwise: only that they see the weights is equal.)


@pytest.mark.parametrize("case", ascents, ids=str)
def test_a_perturbation_has_an_effect_inside_one_autocast_block(case: Case):
    torch.manual_seed(0)
    model = mlp().float()
    optimizer = case.build(model)
    (x, y), *_ = samples(model, 1)
    found = []

    def look():
        logits = model(x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), torch.no_grad():
            assert torch.equal(logits, model(x.float()))
        found.append(logits.detach())
        return logits

    with autocast():
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                cross_entropy(look(), y).backward()
        look()
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@every_case
def test_the_loss_scale_changes_nothing(case: Case):
    # A power of two changes no digit.
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    assert same(run(case, mlp, 5, scaler=scaler), run(case, mlp, 5))
    assert scaler.get_scale() == 4 * SCALE


@every_case
@pytest.mark.parametrize("overflow", [0, 1], ids=["first pass", "second pass"])
def test_an_overflow_in_any_pass_skips_the_step_and_halves_the_scale(case: Case, overflow):
    if overflow >= case.passes:
        pytest.skip("one pass only")
    model = mlp().float()
    optimizer = case.build(model, refresh_every=1000)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    batches = samples(model, 3)

    def step(factors):
        for index, gradient_pass in enumerate(optimizer.passes(scaler=scaler)):
            with gradient_pass:
                loss = factors[index] * cross_entropy(model(batches[0][0].float()), batches[0][1])
                gradient_pass.loss = loss.detach()
                scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step([1.0] * case.passes)
    weights, state = [p.clone() for p in model.parameters()], everything(model, optimizer)
    factors = [1.0] * case.passes
    factors[overflow] = 1e38  # times the scale it is infinite
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(factors)
    assert same(weights, list(model.parameters())) and scaler.get_scale() == SCALE / 2
    if "noise" not in case.name and "MSReg[trace" not in case.name:  # whose stream has gone on
        assert same(state, everything(model, optimizer))
    step([1.0] * case.passes)
    assert not same(weights, list(model.parameters()))


def test_an_overflow_is_warned_of_where_the_scaler_is_not_named():
    model = mlp().float()
    optimizer = ms_optim.SAM(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    (x, y), *_ = samples(model, 1)
    with pytest.warns(NonFiniteWarning):
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                scaler.scale(1e38 * cross_entropy(model(x.float()), y)).backward()


@every_case
def test_a_closure_through_a_scaler_is_refused_and_changes_nothing(case: Case):
    model = mlp().float()
    optimizer = case.build(model, refresh_every=1000)
    (x, y), *_ = samples(model, 1)

    def closure():
        loss = cross_entropy(model(x.float()), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for gradient_pass in optimizer.passes(scaler=scaler):
        with gradient_pass:
            loss = cross_entropy(model(x.float()), y)
            gradient_pass.loss = loss.detach()
            scaler.scale(loss).backward()
    before = everything(model, optimizer)
    with pytest.raises(OptimizerError, match=r"still multiplied by the loss scale; run `for gradient_pass in"):
        scaler.step(optimizer, closure)
    assert same(before, everything(model, optimizer))
    optimizer.step(closure)  # by itself it is what it was


def test_a_penalty_needs_the_scale():
    model = mlp().float()
    optimizer = ms_optim.MSRegularizedSGD(model, lr=0.1, strength=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    (x, y), *_ = samples(model, 1)
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            loss = cross_entropy(model(x.float()), y)
            gradient_pass.loss = loss.detach()
            scaler.scale(loss).backward()
    before = everything(model, optimizer)
    with pytest.raises(OptimizerError, match=r"passes\(scaler=scaler\)"):
        scaler.step(optimizer)
    assert same(before, everything(model, optimizer))


@every_case
def test_all_passes_draw_the_same_masks_and_a_step_draws_what_one_pass_draws(case: Case):
    torch.manual_seed(0)
    model = nn.Sequential(*convnet()[:3], nn.Dropout(0.5), *convnet()[4:])
    batches = samples(model, 3)
    group = ms_optim.scale_symmetries(model, batches[0][0]) if case.rebalances else None
    optimizer = case.build(model, refresh_every=2, group=group)
    masks = []
    model[3].register_forward_hook(lambda module, args, output: masks.append((args[0] != 0, output != 0)))
    torch.manual_seed(7)
    for x, y in batches:
        masks.clear()
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                loss = cross_entropy(model(x), y)
                gradient_pass.loss = loss.detach()
                loss.backward()
        optimizer.step()
        dropped = [(alive, kept) for alive, kept in masks if bool((alive & ~kept).any())]  # a refresh drops nothing
        assert len(dropped) == case.passes
        (alive, kept), (other, also) = dropped[0], dropped[-1]
        assert not bool((kept ^ also)[alive & other].any())
    after = torch.rand(3)
    torch.manual_seed(7)
    for x, _ in batches:
        nn.functional.dropout(torch.ones(len(x), 4, 4, 4), 0.5)
    assert torch.equal(after, torch.rand(3))


def test_an_exception_puts_the_random_streams_back():
    model = convnet()
    optimizer = ms_optim.SAM(model, lr=0.1)
    (x, _), *_ = samples(model, 1)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                model(x).sum().backward()
                _ = 1 / 0 if gradient_pass.first is False else None
    assert torch.equal(state, torch.get_rng_state())
