"""Limits: with its own part switched off, every optimizer is a simpler one, bit for bit where that can be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import EVERY, Case, convnet, known_group, mlp, same, samples, train
from torch import nn

import ms_optim
from ms_optim.curvature.weighted import weighted_trace

cross_entropy = nn.functional.cross_entropy


@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize("network", [mlp, convnet])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_switched_off_it_is_the_base_optimizer_bit_for_bit(case: Case, network, momentum):
    model = network()
    plain = copy.deepcopy(model)
    ours = case.build(model, **case.off, rebalance=None, momentum=momentum, weight_decay=1e-3)
    momentum = ours.param_groups[0]["momentum"]  # some cannot do without
    base = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3)
    batches = samples(model, 5)
    torch.manual_seed(4)
    losses = [loss for loss, _ in train(model, ours, batches)]
    stream = torch.get_rng_state()
    torch.manual_seed(4)
    assert losses == [loss for loss, _ in train(plain, base, batches)]
    assert torch.equal(stream, torch.get_rng_state())
    assert same(list(model.state_dict().values()), list(plain.state_dict().values()))


def step_by_hand(model, x, y, lr, perturbation):
    """One step of plain SGD along the gradient at W + ε, for ε = perturbation(name, W, g)."""
    parameters = dict(model.named_parameters())
    grads = dict(zip(parameters, torch.autograd.grad(cross_entropy(model(x), y), parameters.values()), strict=True))
    eps = perturbation(parameters, grads)
    moved = {name: p.detach() + eps[name] for name, p in parameters.items()}
    for p in moved.values():
        p.requires_grad_()
    loss = cross_entropy(torch.func.functional_call(model, moved, (x,)), y)
    for p, g in zip(parameters.values(), torch.autograd.grad(loss, moved.values()), strict=True):
        with torch.no_grad():
            p.sub_(lr * g)


def sam_by_hand(parameters, grads):
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    return {name: 0.3 * g / norm for name, g in grads.items()}


def asam_by_hand(eta, only_weights):
    def perturbation(parameters, grads):
        t = {
            name: p.detach().abs() + eta if "weight" in name or not only_weights else torch.ones_like(p)
            for name, p in parameters.items()
        }
        norm = math.sqrt(sum(float(((t[name] * g) ** 2).sum()) for name, g in grads.items()))
        return {name: 0.3 * t[name] ** 2 * g / norm for name, g in grads.items()}

    return perturbation


@pytest.mark.parametrize(
    ("optimizer", "options", "by_hand"),
    [
        (ms_optim.SAM, {}, sam_by_hand),
        (ms_optim.MSSAM, {"rebalance": None}, sam_by_hand),
        (ms_optim.ASAM, {"operator": "official"}, asam_by_hand(0.01, True)),
        (ms_optim.ASAM, {"operator": "official", "eta": 0.2}, asam_by_hand(0.2, True)),
        (ms_optim.ASAM, {"operator": "elementwise"}, asam_by_hand(0.0, False)),
    ],
)
def test_a_step_equals_the_formula_of_the_paper(optimizer, options, by_hand):
    model = mlp()
    twin = copy.deepcopy(model)
    ours = optimizer(model, rho=0.3, lr=0.1, **options)
    for x, y in samples(model, 4):
        list(train(model, ours, [(x, y)]))
        step_by_hand(twin, x, y, 0.1, by_hand)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_the_metric_is_sam_at_the_rescaled_network_mapped_back():
    model = mlp()
    (x, y), *_ = samples(model, 1)
    optimizer = ms_optim.MSSAM(model, rho=0.2, lr=0.1, rebalance="metric", columns=None)
    balance = optimizer.refresh(x)
    group = optimizer.group
    twin = copy.deepcopy(model)
    group.rescale_(twin, balance.t)
    gradient = {}
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            cross_entropy(model(x), y).backward()
    sam = ms_optim.SAM(twin, rho=0.2, lr=0.1)
    for gradient_pass in sam.passes():
        with gradient_pass:
            cross_entropy(twin(x), y).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        gradient[name] = p.grad
        torch.testing.assert_close(p.grad, q.grad * math.exp(balance.log_scale[name]), rtol=1e-10, atol=1e-13)
    assert max(abs(a) for a in balance.log_scale.values()) > 1e-2


@pytest.mark.parametrize("network", [mlp, convnet])
def test_move_and_metric_perturb_to_the_same_function(network):
    model = network().train()
    other = copy.deepcopy(model)
    (x, y), *_ = samples(model, 1)
    outputs = []
    for net, rebalance in ((model, "move"), (other, "metric")):
        torch.manual_seed(6)
        optimizer = ms_optim.MSSAM(net, rho=0.2, lr=0.1, rebalance=rebalance, columns=None)
        seen = []
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                logits = net.eval()(x)
                cross_entropy(logits, y).backward()
                seen.append(logits.detach())
        outputs.append(seen)
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("network", [mlp, convnet])
def test_a_balanced_network_is_a_fixed_point(network):
    model = network()
    data = torch.cat([x for x, _ in samples(model, 4)])
    ms_optim.rebalance_(model, data)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    again = ms_optim.rebalance_(model, data)
    assert max(abs(a) for a in again.log_scale.values()) < 1e-9
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("rebalance", ["move", "metric", None])
def test_the_trace_gradient_is_the_gradient_of_loss_plus_weighted_trace(rebalance):
    model = mlp()
    (x, y), *_ = samples(model, 1)
    optimizer = ms_optim.MSRegularizedSGD(model, lr=0.0, momentum=0.0, strength=0.3, rebalance=rebalance)
    if rebalance:
        optimizer.refresh(x)
    stream = optimizer.generator.get_state()
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            cross_entropy(model(x), y).backward()
    weights = dict(zip(optimizer.names(), optimizer.scales("trace_weights"), strict=True))

    def objective(values: dict[str, torch.Tensor]) -> float:
        """L + λ Σ w c by the same signs; pulls vanish without normalisers."""
        net = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(values[name])
        generator = torch.Generator()
        generator.set_state(stream)
        value = weighted_trace(net, ms_optim.batch.Batch((x,)), weights, generator)
        return cross_entropy(net(x), y).item() + 0.3 * value.item()

    step = 1e-6
    for name, p in model.named_parameters():
        for index in range(0, p.numel(), max(1, p.numel() // 4)):
            # A step this small crosses no kink of ReLU unless a preactivation is within 1e-5 of one.
            nudge = torch.zeros(p.numel())
            nudge[index] = step
            up, down = (
                {n: q.detach() + (sign * nudge.view_as(q) if n == name else 0) for n, q in model.named_parameters()}
                for sign in (1, -1)
            )
            numeric = (objective(up) - objective(down)) / (2 * step)
            assert float(p.grad.reshape(-1)[index]) == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def test_noise_has_the_variance_it_says():
    model = mlp()
    (x, _), *_ = samples(model, 1)
    optimizer = ms_optim.MSRegularizedSGD(model, strength=0.02, gradient="noise", rebalance="metric")
    balance = optimizer.refresh(x)
    draws = [optimizer.noise(optimizer.setting("strength")) for _ in range(2000)]
    for i, name in enumerate(optimizer.names()):
        values = torch.stack([draw[i] for draw in draws])
        variance, count = float(values.square().mean()), values.numel()
        expected = 2 * 0.02 * balance.weights[name]
        assert abs(variance / expected - 1) < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("rebalance", [None, "metric"])
def test_the_antithetic_gradient_is_the_mean_at_both_points(rebalance):
    torch.manual_seed(0)
    model = mlp()
    batches = samples(model, 3)
    optimizer = ms_optim.MSRegularizedSGD(
        model, lr=0.1, momentum=0.0, strength=0.01, gradient="antithetic", rebalance=rebalance, group=known_group(model)
    )
    if rebalance:
        optimizer.refresh(batches[0][0])
    for x, y in batches:
        stream = torch.Generator()
        stream.set_state(optimizer.generator.get_state())
        twin, weights = copy.deepcopy(model), optimizer.scales("weights")
        deviations = [(2 * 0.01 * w) ** 0.5 for w in weights]
        z = [torch.randn(p.shape, generator=stream) * d for p, d in zip(model.parameters(), deviations, strict=True)]
        found = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, q, e in zip(twin.parameters(), model.parameters(), z, strict=True):
                    p.copy_(q + sign * e)
            loss = torch.nn.functional.cross_entropy(twin(x), y)
            found.append(torch.autograd.grad(loss, list(twin.parameters())))
        expected = [p - 0.1 * (a + b) / 2 for p, a, b in zip(model.parameters(), *found, strict=True)]
        list(train(model, optimizer, [(x, y)]))
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p, e, rtol=1e-12, atol=1e-14)


def test_of_an_affine_gradient_antithetic_noise_leaves_nothing():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    plain = copy.deepcopy(model)
    optimizer = ms_optim.MSRegularizedSGD(
        model, lr=0.1, momentum=0.9, strength=0.5, gradient="antithetic", rebalance=None
    )
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        x, y = torch.randn(8, 5), torch.randn(8, 3)
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        base.zero_grad()
        torch.nn.functional.mse_loss(plain(x), y).backward()
        base.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
