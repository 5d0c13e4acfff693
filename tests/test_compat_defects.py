"""The two-step SAM: what the original gets wrong, and where it ends."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from cases import convnet, mlp, same, samples
from torch import nn
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
from ms_optim.errors import LostStateWarning, NonFiniteWarning, OptimizerError


@every_network
@driven
@pytest.mark.parametrize("base", [{}, {"base_optimizer": torch.optim.AdamW, "momentum": None}], ids=["SGD", "AdamW"])
def test_a_resumed_run_is_the_uninterrupted_one(network, drive, base):
    options = {k: v for k, v in {**SGD, **base}.items() if v is not None}
    torch.manual_seed(0)
    model = network()
    optimizer = SAM(model.parameters(), **options)
    batches = samples(model, 6)

    def run(model, optimizer, batches):
        torch.manual_seed(2)
        for x, y in batches:
            drive(optimizer, model, closure_of(model, x, y))

    run(model, optimizer, batches[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, batches[3:])
    again = network()
    resumed = SAM(again.parameters(), **options)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, batches[3:])
    assert same(state_of(model, optimizer), state_of(again, resumed))


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("copier", [copy.deepcopy, pickled], ids=lambda copier: copier.__name__)
def test_a_copy_keeps_its_base_optimizer_and_goes_its_own_way(copier):
    model, optimizer = trained(two_steps, convnet)
    twin, its = copier((model, optimizer))
    assert its.base_optimizer.param_groups is its.param_groups and its.base_optimizer is not optimizer.base_optimizer
    (x, y), *_ = samples(model, 1, seed=3)
    found = []
    for net, opt in ((twin, its), (model, optimizer)):
        torch.manual_seed(4)
        two_steps(opt, net, closure_of(net, x, y))
        found.append(state_of(net, opt))
    assert same(*found)


@pytest.mark.parametrize("drive", [gradient_first, closure_alone], ids=lambda drive: drive.__name__)
@pytest.mark.parametrize("where", ["forward", "after backward"])
def test_an_exception_in_the_closure_leaves_everything_as_before_the_step(drive, where):
    model, optimizer = trained(drive, convnet)
    (x, y), *_ = samples(model, 1)
    before, stream = state_of(model, optimizer), torch.get_rng_state()
    calls = []

    def closure():
        calls.append(1)
        failing = len(calls) == 2
        loss = cross_entropy(model(x[:, :, :1] if failing and where == "forward" else x), y)
        loss.backward()
        if failing:
            raise RuntimeError("on purpose")
        return loss

    with pytest.raises(RuntimeError):
        drive(optimizer, model, closure)
    assert same(before, state_of(model, optimizer)) and torch.equal(stream, torch.get_rng_state())
    optimizer.zero_grad()
    drive(optimizer, model, closure_of(model, x, y))


def test_after_an_exception_between_two_steps_the_next_first_step_restores_and_says_so():
    model, optimizer = trained(two_steps)
    (x, y), *_ = samples(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    closure_of(model, x, y)()
    optimizer.first_step(zero_grad=True)
    closure_of(model, x, y)()  # and then something fails, and is caught
    closure_of(model, x, y)()
    with pytest.raises(OptimizerError, match="restored"):
        optimizer.first_step()
    assert same(before, list(model.parameters()))
    optimizer.zero_grad()
    two_steps(optimizer, model, closure_of(model, x, y))


def test_saving_the_model_between_the_steps_saves_its_weights():
    model, optimizer = trained(two_steps)
    (x, y), *_ = samples(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    closure_of(model, x, y)()
    optimizer.first_step(zero_grad=True)
    closure_of(model, x, y)()
    assert not same(before, list(model.parameters()))
    assert same(before, list(model.state_dict().values()))
    optimizer.second_step()


def test_a_gradient_that_is_not_finite_perturbs_nothing():
    model, optimizer = trained(two_steps)
    (x, y), *_ = samples(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    closure_of(model, x, y)()
    model[0].weight.grad[0, 0] = float("nan")
    with pytest.warns(NonFiniteWarning):
        optimizer.first_step(zero_grad=True)
    assert same(before, list(model.parameters()))
    closure_of(model, x, y)()
    optimizer.second_step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_without_any_gradient_nothing_happens():
    model = mlp()
    optimizer = SAM(model.parameters(), **SGD)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.first_step()
    optimizer.second_step()
    assert same(before, list(model.parameters()))


@pytest.mark.parametrize("part", [0, 1], ids=["first", "second"])
def test_a_gradient_in_one_pass_only_is_no_trouble(part):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SAM([a, b], torch.optim.SGD, lr=0.1, rho=0.5)
    losses = [lambda: (a * a).sum(), lambda: (a * a).sum() + b.sum()]
    losses[1 - part]().backward()
    optimizer.first_step(zero_grad=True)
    losses[part]().backward()
    optimizer.second_step()
    torch.testing.assert_close(b.detach(), torch.full((3,), 0.9 if part == 1 else 1.0))
    assert not torch.equal(a.detach(), torch.ones(3))


def test_a_parameter_that_is_frozen_later_stands_still():
    model, optimizer = trained(two_steps)
    model[0].weight.requires_grad_(False)
    optimizer.zero_grad()
    before = model[0].weight.clone()
    for x, y in samples(model, 3):
        two_steps(optimizer, model, closure_of(model, x, y))
    assert torch.equal(before, model[0].weight)


@every_network
@driven
@pytest.mark.parametrize("given", [True, False], ids=["model given", "model found"])
def test_without_radius_it_is_the_base_optimizer_bit_for_bit(network, drive, given):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1)
    for x, y in samples(model, 4):
        optimizer.zero_grad()
        closure_of(model, x, y)()
        optimizer.step()
    stream = torch.get_rng_state()
    mine, _ = trained(drive, network, rho=0.0, given=given)
    assert same(list(model.state_dict().values()), list(mine.state_dict().values()))
    assert torch.equal(stream, torch.get_rng_state())


@driven
@pytest.mark.parametrize("which", ["optimizer", "base_optimizer"])
def test_hooks_and_schedulers_see_a_step(drive, which):
    model, optimizer = trained(drive, steps=1)
    seen = []

    def weights():
        return [p.detach().clone() for p in model.parameters()]

    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", weights())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", weights())))
    of = optimizer if which == "optimizer" else optimizer.base_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(of, step_size=1, gamma=0.5)
    (x, y), *_ = samples(model, 1)
    before = weights()
    drive(optimizer, model, closure_of(model, x, y))
    scheduler.step()  # warns if it saw no step
    assert [when for when, _ in seen] == ["before", "after"]
    if drive is not gradient_first:  # whose closure runs inside the step, and whose first pass before
        assert same(before, seen[0][1])
    assert same(weights(), seen[1][1])
    assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == 0.025


def test_maximize_turns_the_ascent_around():
    def run(sign, **options):
        torch.manual_seed(0)
        model = mlp()
        optimizer = SAM(model.parameters(), rho=0.3, **SGD, **options)
        for x, y in samples(model, 3):
            for step in (optimizer.first_step, optimizer.second_step):
                (sign * cross_entropy(model(x), y)).backward()
                step(zero_grad=True)
        return list(model.parameters())

    for p, q in zip(run(1.0), run(-1.0, maximize=True), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_closure_runs_for_both_gradients_or_for_the_second():
    model, optimizer = trained(two_steps)
    (x, y), *_ = samples(model, 1)
    calls = []

    def closure():
        calls.append(closure_of(model, x, y)())
        return calls[-1]

    assert optimizer.step(closure) is calls[0] and len(calls) == 2
    # What is left in `.grad` is the step's before, and a training forward alone makes no gradient.
    assert model[0].weight.grad is not None
    model(x)
    assert optimizer.step(closure) is calls[2] and len(calls) == 4
    closure_of(model, x, y)()
    assert optimizer.step(closure) is calls[4] and len(calls) == 5  # the first gradient was there
    loss = cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    assert optimizer.step(closure) is calls[5] and len(calls) == 6


def test_gradients_may_be_zeroed_in_place():
    model, optimizer = trained(two_steps)
    other, its = trained(two_steps)
    (x, y), *_ = samples(model, 1)
    for net, opt, to_none in ((model, optimizer, False), (other, its, True)):
        opt.zero_grad(set_to_none=to_none)
        closure_of(net, x, y)()
        opt.first_step()
        opt.zero_grad(set_to_none=to_none)
        closure_of(net, x, y)()
        opt.second_step()
    assert same(state_of(model, optimizer), state_of(other, its))


def test_a_pass_may_be_several_backward_passes():
    def run(parts):
        torch.manual_seed(0)
        model = mlp()
        optimizer = SAM(model.parameters(), rho=0.1, **SGD)
        for x, y in samples(model, 3):
            for step in (optimizer.first_step, optimizer.second_step):
                for part in torch.arange(len(x)).chunk(parts):
                    (cross_entropy(model(x[part]), y[part]) * len(part) / len(x)).backward()
                step(zero_grad=True)
        return list(model.parameters())

    for p, q in zip(run(1), run(4), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def test_both_passes_have_the_same_dropout_masks_in_each_of_their_parts():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    optimizer = SAM(model.parameters(), rho=0.0, **SGD)
    (x, _), *_ = samples(model, 1)
    seen = [[], []]
    for outputs, step in zip(seen, (optimizer.first_step, optimizer.second_step), strict=True):
        for part in x.chunk(2):
            outputs.append(model(part))
            outputs[-1].sum().backward()
            with torch.no_grad():
                torch.rand(3)  # and what else draws in between
        step(zero_grad=True)
    assert same(*seen)


def test_a_scaler_unscales_and_skips():
    model, optimizer = trained(two_steps, lambda: mlp().float(), steps=0)
    twin, its = copy.deepcopy((model, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batches = [(x.float(), y) for x, y in samples(model, 4)]

    def scaled(x, y, factor=1.0):
        for _ in range(2):
            scaler.scale(factor * cross_entropy(model(x), y)).backward()
            if not optimizer.loop.in_second:
                optimizer.first_step(zero_grad=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for x, y in batches:
        scaled(x, y)
        two_steps(its, twin, closure_of(twin, x, y))
    assert same(state_of(model, optimizer), state_of(twin, its))
    before = state_of(model, optimizer)
    with pytest.warns(NonFiniteWarning):
        scaled(*batches[0], factor=1e38)
    assert same(before, state_of(model, optimizer)) and scaler.get_scale() == 2.0**9
    scaled(*batches[0])
    assert not same(before, state_of(model, optimizer))
    closure_of(model, *batches[0])()
    with pytest.raises(OptimizerError, match="scaler"):
        scaler.scale(torch.ones(()))
        scaler.step(optimizer, closure_of(model, *batches[0]))


def test_the_second_pass_is_at_the_perturbed_weights_inside_one_autocast_block():
    model, optimizer = trained(two_steps, lambda: mlp().float(), steps=0, rho=2.0)
    (x, y), *_ = samples(model, 1)
    losses = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in (optimizer.first_step, optimizer.second_step):
            losses.append(cross_entropy(model(x.float()), y))
            losses[-1].backward()
            step(zero_grad=True)
    assert losses[1] > losses[0]


def test_a_model_that_is_trained_in_evaluation_mode_is_perturbed_as_well():
    def run(mode, given):
        torch.manual_seed(0)
        model = mlp().train(mode)
        optimizer = SAM(model.parameters(), rho=0.3, model=model if given else None, **SGD)
        for x, y in samples(model, 3):
            two_steps(optimizer, model, closure_of(model, x, y))
        return list(model.parameters())

    assert same(run(True, True), run(False, True)) and same(run(True, True), run(False, False))


def test_forward_passes_of_other_kinds_are_part_of_the_second_pass():
    model, optimizer = trained(two_steps, rho=0.5)
    (x, y), *_ = samples(model, 1)
    closure_of(model, x, y)()
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        targets = model(x).argmax(1)  # labels of its own, say
    there = [p.detach().clone() for p in model.parameters()]
    cross_entropy(model(x), targets).backward()
    assert same(there, list(model.parameters()))
    optimizer.second_step()


def test_a_model_found_in_the_second_pass_changes_nothing():
    def run(call):
        torch.manual_seed(0)
        model = mlp()
        optimizer = SAM(model.parameters(), rho=0.3, **SGD)
        (x, y), *_ = samples(model, 1)
        cross_entropy(call(model, x), y).backward()
        optimizer.first_step(zero_grad=True)
        cross_entropy(model(x), y).backward()
        optimizer.second_step()
        return state_of(model, optimizer)

    assert same(run(lambda model, x: model(x)), run(lambda model, x: model.forward(x)))


def test_parameters_of_no_module_are_trained():
    def run(drive):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 6))
        optimizer = SAM([weight], rho=0.3, **SGD)
        for x, y in samples(mlp(), 4):
            drive(optimizer, None, closure_of(lambda x: x @ weight.T, x, y))
        return [weight]

    assert same(run(two_steps), run(closure_alone)) and same(run(two_steps), run(gradient_first))


def test_parameters_of_no_module_are_trained_after_a_step_that_a_scaler_skips():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float32))
    optimizer = SAM([weight], rho=0.3, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, moves in ((1.0, True), (1e38, False), (1.0, True)):
        before = weight.detach().clone()
        for step in (optimizer.first_step, None):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NonFiniteWarning)
                scaler.scale(factor * weight.square().sum()).backward()
                if step is not None:
                    step(zero_grad=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, weight) is not moves


def test_steps_out_of_order_are_refused():
    model, optimizer = trained(two_steps)
    (x, y), *_ = samples(model, 1)
    with pytest.raises(OptimizerError, match="without first_step"):
        optimizer.second_step()
    closure_of(model, x, y)()
    with pytest.raises(OptimizerError, match="without first_step"):
        optimizer.second_step()
    with pytest.raises(OptimizerError, match="no gradient passes"):
        optimizer.step()
    optimizer.zero_grad()
    two_steps(optimizer, model, closure_of(model, x, y))


def test_arguments_are_the_base_optimizers():
    model = mlp()
    with pytest.raises(TypeError, match="every"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, every=2)
    with pytest.raises(OptimizerError, match="instance"):
        SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        SAM(model.parameters(), torch.optim.SGD, rho=-1.0, lr=0.1)
    assert isinstance(SAM(model.parameters(), torch.optim.SGD, 0.1, True, lr=0.1), torch.optim.Optimizer)


def test_a_checkpoint_of_the_original_loads():
    model = mlp()
    optimizer = SAM(model.parameters(), **SGD)
    count = len(list(model.parameters()))
    entry = {"rho": 0.2, "adaptive": True, "lr": 0.01, "momentum": 0.5, "weight_decay": 1e-4, "dampening": 0}
    old = {i: {"old_p": torch.zeros(1)} for i in range(count)}
    with pytest.warns(LostStateWarning):
        optimizer.load_state_dict({"state": old, "param_groups": [{**entry, "params": list(range(count))}]})
    (found,) = optimizer.param_groups
    assert {key: found[key] for key in entry} == entry and found is optimizer.base_optimizer.param_groups[0]
    (x, y), *_ = samples(model, 1)
    two_steps(optimizer, model, closure_of(model, x, y))


def test_checkpoints_of_our_other_sam_are_told_apart():
    _, optimizer = trained(two_steps)
    with pytest.raises(ms_optim.errors.StateError, match="TwoStepSAM"):
        ms_optim.SAM(mlp(), lr=0.1).load_state_dict(optimizer.state_dict())
