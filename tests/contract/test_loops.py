"""An optimizer of one pass in a loop that knows nothing of it: `loss.backward(); optimizer.step()`."""

import copy
import warnings

import pytest
import torch
from cases import CASES as OWN
from cases import OTHERS, Case, convnet, everything, mlp, same, samples
from contract.faults import WithLoss
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import OptimizerError

CASES = OWN + OTHERS

one_pass = pytest.mark.parametrize("case", [case for case in CASES if case.passes == 1], ids=str)
perturbed = pytest.mark.parametrize(
    "case", [case for case in CASES if case.passes == 1 and case.perturbs], ids=str
)
every_network = pytest.mark.parametrize("network", [mlp, convnet])


def loop(model, optimizer, batches, between=lambda x: None, parts=1):
    """An ordinary loop, with something in the way of every step."""
    for x, y in batches:
        optimizer.zero_grad()
        for part in torch.arange(len(x)).chunk(parts):
            loss = cross_entropy(model(x[part]), y[part]) / parts
            loss.backward()
        between(x)
        optimizer.step()


def explicit(model, optimizer, batches, parts=1):
    """The same as passes."""
    for x, y in batches:
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                for part in torch.arange(len(x)).chunk(parts):
                    (cross_entropy(model(x[part]), y[part]) / parts).backward()
        optimizer.step()


def after(drive, case, network, **how):
    torch.manual_seed(0)
    model = network()
    optimizer = case.build(model, refresh_every=2)
    torch.manual_seed(1)
    drive(model, optimizer, samples(model, 5), **how)
    return everything(model, optimizer)


@one_pass
@every_network
@pytest.mark.parametrize("parts", [1, 2])
def test_an_unmodified_loop_gives_the_same_bits(case: Case, network, parts):
    assert same(after(loop, case, network, parts=parts), after(explicit, case, network, parts=parts))


@perturbed
def test_between_forward_and_step_the_weights_are_perturbed_and_nobody_else_sees_it(case: Case):
    torch.manual_seed(0)
    model = mlp()
    optimizer = case.build(model, refresh_every=1000)
    batches = samples(model, 3)
    loop(model, optimizer, batches[:1])
    clean = [p.detach().clone() for p in model.parameters()]
    x, y = batches[1]
    looks = {
        "state_dict": lambda: list(model.state_dict().values()),
        "evaluation": lambda: (model.eval()(x), model.train(), list(model.parameters()))[2],
        "no gradient": lambda: (torch.no_grad()(model)(x), list(model.parameters()))[1],
        "a measurement": lambda: (ms_optim.hessian_trace(model, x), list(model.parameters()))[1],
        "the step": lambda: (optimizer.step(), clean)[1],
    }
    for look in looks.values():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        assert not same(clean, list(model.parameters()))
        assert same(clean, look())


@one_pass
def test_looking_at_the_model_in_between_changes_nothing(case: Case):
    model_of = {}

    def look(x):
        model_of["now"].eval()
        with torch.no_grad():
            model_of["now"](x)
        model_of["now"].train()
        model_of["now"].state_dict()

    def looking(model, optimizer, batches):
        model_of["now"] = model
        loop(model, optimizer, batches, between=look)

    assert same(after(looking, case, mlp), after(loop, case, mlp))


@one_pass
@every_network
@pytest.mark.parametrize("buffers", ["first", "last"])
def test_looking_at_the_model_between_micro_batches_changes_nothing(case: Case, network, buffers):
    def drive(looks):
        torch.manual_seed(0)
        model = network()
        optimizer = case.build(model, refresh_every=2, buffers=buffers)
        torch.manual_seed(1)
        perturbed = []
        for x, y in samples(model, 5):
            optimizer.zero_grad()
            for part in torch.arange(len(x)).chunk(4):
                (cross_entropy(model(x[part]), y[part]) / 4).backward()
                perturbed.append([p.detach().clone() for p in model.parameters()])
                for look in looks if part[0] != 4 else []:  # (and a micro-batch with nothing before it)
                    look(model, x)
            optimizer.step()
        return everything(model, optimizer) + [p for weights in perturbed for p in weights]

    looks = [
        lambda model, x: (model.eval(), torch.no_grad()(model)(x), model.train()),
        lambda model, x: model.state_dict(),
        lambda model, x: copy.deepcopy(model),
    ]
    assert same(drive(looks), drive([]))


@perturbed
@every_network
@pytest.mark.parametrize("where", ["the forward pass", "the perturbation"])
def test_a_failure_after_looking_between_micro_batches_puts_everything_back(case: Case, network, where, monkeypatch):
    def fail(*args):
        raise RuntimeError("planted")

    torch.manual_seed(0)
    model = network()
    optimizer = case.build(model, refresh_every=2)
    batches = samples(model, 4)
    loop(model, optimizer, batches[:2])
    before, (x, y) = everything(model, optimizer), batches[2]
    cross_entropy(model(x[:4]), y[:4]).backward()
    model.state_dict()
    if where == "the perturbation":
        monkeypatch.setattr("ms_optim.optim.gradient_pass.add_scaled", fail)
    with pytest.raises(RuntimeError):
        model(x[4:] if where == "the perturbation" else x[..., :2])
    monkeypatch.undo()
    assert same(before, everything(model, optimizer))
    loop(model, optimizer, batches[3:])


@one_pass
def test_copies_of_the_model_and_of_the_optimizer_go_their_own_ways(case: Case):
    torch.manual_seed(0)
    model = mlp()
    optimizer = case.build(model)
    batches = samples(model, 4)
    loop(model, optimizer, batches[:2])
    average = torch.optim.swa_utils.AveragedModel(model)
    before = everything(model, optimizer)
    average.train()(batches[0][0]).sum().backward()  # a training forward of the copy
    assert same(before, everything(model, optimizer))
    twin, its_model = copy.deepcopy((optimizer, model))
    loop(its_model, twin, batches[2:])
    assert same(before, everything(model, optimizer))
    loop(model, optimizer, batches[2:])
    assert same(everything(its_model, twin), everything(model, optimizer))


@perturbed
def test_a_step_that_a_scaler_skips_restores_the_weights(case: Case):
    model = mlp().float()
    optimizer = case.build(model, refresh_every=1000)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    (x, y), *_ = samples(model, 1)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(factor * cross_entropy(model(x.float()), y)).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(1e38)
        assert same(weights, list(model.parameters()))
        step(1.0)
    assert not same(weights, list(model.parameters()))


@one_pass
def test_the_step_after_one_that_a_scaler_skips_is_another(case: Case):
    def weights(skipped):
        torch.manual_seed(0)
        model = mlp().float()
        optimizer = case.build(model, refresh_every=1000)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        first, second, third = ((x.float(), y) for x, y in samples(model, 3))
        for x, y, factor in [(*first, 1.0), *([(*second, float("inf"))] if skipped else []), (*third, 1.0)]:
            stream = optimizer.generator.get_state()
            optimizer.zero_grad()
            scaler.scale(factor * cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
            if factor != 1.0:
                optimizer.generator.set_state(stream)
        return list(model.parameters())

    assert same(weights(skipped=True), weights(skipped=False))


@one_pass
def test_a_failing_refresh_puts_everything_back(case: Case, monkeypatch):
    if not case.rebalances:
        pytest.skip("no refresh")
    model = mlp()
    optimizer = case.build(model)
    batches = samples(model, 1)
    before = everything(model, optimizer)
    original = optimizer.representative._move

    def fail(*args):
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer.representative, "_move", fail)
    with pytest.raises(KeyboardInterrupt):
        loop(model, optimizer, batches)
    assert same(before, everything(model, optimizer))
    monkeypatch.setattr(optimizer.representative, "_move", original)
    loop(model, optimizer, batches)


@one_pass
def test_a_training_forward_between_explicit_passes_and_the_step_is_none_of_the_loops(case: Case):
    def looking(model, optimizer, batches):
        for x, y in batches:
            for gradient_pass in optimizer.passes():
                with gradient_pass:
                    cross_entropy(model(x), y).backward()
            model(x)
            optimizer.step()

    assert same(after(looking, case, mlp), after(explicit, case, mlp))


@perturbed
@every_network
def test_a_backward_pass_that_fails_leaves_the_weights_as_they_are_without_a_perturbation(case: Case, network):
    torch.manual_seed(0)
    model = network()
    optimizer = case.build(model, refresh_every=1000)
    batches = samples(model, 4)
    loop(model, optimizer, batches[:1])
    clean = [p.detach().clone() for p in model.parameters()]
    x, y = batches[1]
    loss = cross_entropy(model(x), y)
    loss.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert not same(clean, list(model.parameters()))
    model.eval()(x)
    assert same(clean, list(model.parameters()))
    model.train()
    loop(model, optimizer, batches[2:])


def test_two_passes_cannot_be_taken_from_one():
    model = mlp()
    with pytest.raises(OptimizerError, match="no gradient passes"):
        loop(model, ms_optim.SAM(model, lr=0.1), samples(model, 1))


def test_momentum_sam_is_the_papers_update_step_by_step():
    torch.manual_seed(0)
    model = mlp()
    twin = copy.deepcopy(model)
    rho, lr, mu = 0.3, 0.05, 0.9
    optimizer = ms_optim.SAM(model, torch.optim.SGD, rho=rho, ascent="momentum", lr=lr, momentum=mu)
    batches = samples(model, 5)
    loop(model, optimizer, batches)
    weights = list(twin.parameters())
    v = [torch.zeros_like(w) for w in weights]
    for x, y in batches:
        norm = torch.sqrt(sum(u.square().sum() for u in v))
        step = [-rho * u / norm if norm > 0 else 0 * u for u in v]
        shifted = copy.deepcopy(twin)
        with torch.no_grad():
            for p, e in zip(shifted.parameters(), step, strict=True):
                p += e
        grads = torch.autograd.grad(cross_entropy(shifted(x), y), list(shifted.parameters()))
        v = [mu * u + g for u, g in zip(v, grads, strict=True)]
        with torch.no_grad():
            for w, u in zip(weights, v, strict=True):
                w -= lr * u
    for found, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_momentum_has_to_be_there():
    with pytest.raises(ValueError, match="ascent='momentum' needs a running average"):
        ms_optim.SAM(mlp(), torch.optim.SGD, ascent="momentum", lr=0.1)
    with pytest.raises(ValueError, match="ascent must be"):
        ms_optim.MSSAM(mlp(), torch.optim.SGD, ascent="velocity", lr=0.1)
    optimizer = ms_optim.SAM(nn.Sequential(nn.Linear(6, 4)), torch.optim.AdamW, ascent="momentum", lr=0.01)
    loop(optimizer.model, optimizer, samples(optimizer.model, 3))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_after_a_forward_pass_in_evaluation_mode_says_so(case: Case):
    model = mlp().eval()
    optimizer = case.build(model)
    module = WithLoss(model).eval()
    if case.passes > 1 and not optimizer.combines_passes:
        optimizer.attach(module)
    (x, y), *_ = samples(model, 1)
    module(x, y).backward()
    message = r"no gradient passes .*Sequential was called in evaluation mode.*model\.train"
    with pytest.raises(OptimizerError, match=message):
        optimizer.step()
    module.train()
    if "antithetic" not in case.name:
        module(x, y).backward()
        optimizer.step()
    with pytest.raises(OptimizerError, match="no gradient passes") as raised:
        optimizer.step()
    assert "antithetic" in case.name or "evaluation" not in str(raised.value)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_look_between_forward_and_backward_fails_loudly_but_where_autocast_keeps_copies(autocast):
    model = mlp().float()
    optimizer = ms_optim.MSRegularizedSGD(model, gradient="noise", rebalance=None)
    (x, y), *_ = samples(model, 1)

    def backward(look):
        optimizer.drop()
        optimizer.zero_grad()
        optimizer.generator.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(model(x.float()), y)
        if look:
            with torch.no_grad():
                model(x.float())
        loss.backward()
        return [p.grad for p in model.parameters()]

    if autocast:
        assert same(backward(look=True), backward(look=False))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(look=True)
