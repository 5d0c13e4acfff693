"""The compiled steps of the XOR benchmark are autograd's and `ms_optim.MSSAM`'s; the constructed minima are least."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ms_optim
from benchmarks import flat_minima, two_layer, xor_training
from benchmarks.two_layer import BIAS, KINDS, NO_BIAS, SIM_BN, SIM_LN, Rule

compiled = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
N, D, WIDTH = 12, 5, 9


def problem(kind, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, y = two_layer.xor(N, D, draw)
    net = two_layer.initial(kind, WIDTH, D, draw)
    return two_layer.Network(kind, net.first.to(dtype), net.second.to(dtype), 1.3), x, y


class Twin(nn.Module):
    """The same network written for autograd, step by step as the formulas stand; two logits, the second always 0."""

    def __init__(self, net, training):
        super().__init__()
        self.kind, self.training_inputs = net.kind, training
        self.first = nn.Linear(D, len(net.first), bias=net.kind != NO_BIAS, dtype=net.first.dtype)
        self.second = nn.Linear(len(net.first), 1, bias=False, dtype=net.first.dtype)
        with torch.no_grad():
            self.first.weight.copy_(net.first[:, :-1])
            self.second.weight.copy_(net.second[None])
            if self.first.bias is not None:
                self.first.bias.copy_(net.first[:, -1])
        if net.kind == SIM_BN:
            self.gamma = nn.Parameter(torch.tensor(net.gamma, dtype=net.first.dtype))

    def forward(self, x):
        h = self.first(x).relu()
        if self.kind == SIM_LN:
            h = h / h.norm(dim=1, keepdim=True)
        if self.kind == SIM_BN:
            h = self.gamma * h / self.first(self.training_inputs).relu().square().mean(0).sqrt()
        return F.pad(self.second(h), (0, 1))

    def network(self):
        bias = self.first.bias if self.first.bias is not None else torch.zeros(len(self.first.weight))
        first = torch.cat([self.first.weight, bias.to(self.first.weight)[:, None]], 1).detach()
        gamma = self.gamma.item() if self.kind == SIM_BN else 1.0
        return two_layer.Network(self.kind, first, self.second.weight[0].detach(), gamma)

    def assert_is(self, net, rtol=1e-9):
        mine = self.network()
        torch.testing.assert_close(net.first, mine.first, rtol=rtol, atol=rtol)
        torch.testing.assert_close(net.second, mine.second, rtol=rtol, atol=rtol)
        if self.kind == SIM_BN:
            assert net.gamma == pytest.approx(mine.gamma, rel=rtol)


def gradients(twin, loss):
    return torch.autograd.grad(loss, list(twin.parameters()))


def add(twin, directions, factor):
    with torch.no_grad():
        for p, direction in zip(twin.parameters(), directions, strict=True):
            p.add_(direction, alpha=factor)


def squared(twin, x, y):
    return (twin(x)[:, 0] - y).square().mean()


def sam_step(twin, x, y, lr, rho):
    """Algorithm 1 of arXiv 2010.01412."""
    first = gradients(twin, squared(twin, x, y))
    norm = torch.stack([g.square().sum() for g in first]).sum().sqrt()
    add(twin, first, rho / norm)
    second = gradients(twin, squared(twin, x, y))
    add(twin, first, -rho / norm)
    add(twin, second, -lr)


def squared_gradients(twin, x, create_graph=False):
    """‖∂f(x_i)/∂W_p‖², ``[n, P]``."""
    rows = []
    for f in twin(x)[:, 0]:
        found = torch.autograd.grad(f, list(twin.parameters()), retain_graph=True, create_graph=create_graph)
        rows.append(torch.stack([g.square().sum() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_traces_are_autograds(kind):
    net, x, _ = problem(kind)
    twin = Twin(net, x)
    torch.testing.assert_close(two_layer.outputs(net, x, x), twin(x)[:, 0].detach())
    fresh = -x[:3]
    torch.testing.assert_close(two_layer.outputs(net, fresh, x), twin(fresh)[:, 0].detach())
    names = [name for name, _ in twin.named_parameters()]
    expected = dict(zip(names, (2 * squared_gradients(twin, x).mean(0)).tolist(), strict=True))
    found = two_layer.traces(net, x)
    assert found["first"] == pytest.approx(expected["first.weight"] + expected.get("first.bias", 0.0))
    assert found["second"] == pytest.approx(expected["second.weight"])
    assert found.get("gamma", 0.0) == pytest.approx(expected.get("gamma", 0.0))


@pytest.mark.parametrize("kind", [NO_BIAS, BIAS])
def test_the_trace_of_a_network_that_fits_is_that_of_its_hessian(kind):
    net, x, _ = problem(kind)
    twin = Twin(net, x)
    y = twin(x)[:, 0].detach()  # Lemma 4.1: every residual is 0
    grads = torch.autograd.grad(squared(twin, x, y), list(twin.parameters()), create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    total = 0.0
    start = 0
    for p, g in zip(twin.parameters(), grads, strict=True):
        for i in range(g.numel()):
            (row,) = torch.autograd.grad(flat[start + i], p, retain_graph=True)
            total += float(row.flatten()[i])
        start += g.numel()
    assert sum(two_layer.traces(net, x).values()) == pytest.approx(total)


@compiled
@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_one_sample_is_autograds(kind, rho):
    net, x, y = problem(kind)
    twin = Twin(net, x)
    order = torch.tensor([3, 0, 7, 7, 1, 11])
    for i in order.tolist():
        sam_step(twin, x[i : i + 1], y[i : i + 1], lr=0.02, rho=rho) if rho else add(
            twin, gradients(twin, squared(twin, x[i : i + 1], y[i : i + 1])), -0.02
        )
    two_layer.train(net, x, y, Rule(0.02, rho), order)
    twin.assert_is(net)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_full_batch_steps_are_torch_sgd_with_weight_decay(kind):
    net, x, y = problem(kind)
    twin = Twin(net, x)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        squared(twin, x, y).backward()
        optimizer.step()
    two_layer.train(net, x, y, Rule(0.05, decay=0.1, full=True), torch.arange(6))
    twin.assert_is(net)


@compiled
@pytest.mark.parametrize("kind", [NO_BIAS, BIAS])
def test_regularised_steps_descend_along_the_gradient_of_the_trace(kind):
    net, x, y = problem(kind)
    twin = Twin(net, x)
    order = torch.tensor([3, 0, 7, 1])
    for i in order.tolist():
        sample = x[i : i + 1]
        penalty = 2 * squared_gradients(twin, sample, create_graph=True).sum()
        add(twin, gradients(twin, squared(twin, sample, y[i : i + 1]) + 0.01 * penalty), -0.02)
    two_layer.train(net, x, y, Rule(0.02, 0.01, trace=True), order)
    twin.assert_is(net)


@compiled
@pytest.mark.parametrize("kind", [NO_BIAS, BIAS, SIM_LN])
def test_moved_steps_are_those_of_mssam(kind):
    """Of one sample's cross-entropy of (f, 0) the traces are p(1 − p)‖∂f‖²: the same representative."""
    net, x, y = problem(kind)
    twin = Twin(net, x)
    optimizer = ms_optim.MSSAM(
        twin, torch.optim.SGD, rho=0.2, rebalance="move", gauge=0.0, refresh_every=2, columns=None, lr=0.02
    )
    order = torch.tensor([3, 0, 7, 1, 5, 2])
    for i in order.tolist():

        def closure(i=i):
            optimizer.zero_grad()
            loss = squared(twin, x[i : i + 1], y[i : i + 1])
            loss.backward()
            return loss

        optimizer.step(closure)
    rule = Rule(0.02, 0.2, every=2, sample=True)
    two_layer.train(net, x, y, rule, order[:3])
    two_layer.train(net, x, y, rule, order[3:], begun=3)  # in two calls: the refreshes stay where they are
    twin.assert_is(net)


@compiled
@pytest.mark.parametrize("kind", [NO_BIAS, BIAS])
def test_the_representative_of_the_whole_set_is_the_package_s(kind):
    net, x, y = problem(kind)
    twin = Twin(net, x)
    group = ms_optim.scale_symmetries(twin, x)
    found = ms_optim.balance(twin, ms_optim.hessian_trace(twin, x, loss="mse"), group)
    assert two_layer.minimum_sharpness(net, x) == pytest.approx(2 * found.minimum_sharpness)  # its mean has two logits
    group.rescale_(twin, found.t)
    two_layer.train(net, x, y, Rule(0.0, every=1), torch.tensor([0]))
    twin.assert_is(net)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_move_keeps_the_function_and_reaches_minimum_sharpness(kind):
    net, x, y = problem(kind)
    before, least = two_layer.outputs(net, x, x), two_layer.minimum_sharpness(net, x)
    assert sum(two_layer.traces(net, x).values()) != pytest.approx(least)
    two_layer.train(net, x, y, Rule(0.0, every=1), torch.tensor([0]))
    torch.testing.assert_close(two_layer.outputs(net, x, x), before)
    assert sum(two_layer.traces(net, x).values()) == pytest.approx(least)
    assert two_layer.minimum_sharpness(net, x) == pytest.approx(least)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_float64_up_to_rounding(kind):
    order = torch.arange(N).repeat(3)
    for rule in (Rule(0.01, 0.05), Rule(0.01, 0.05, every=4), Rule(0.01, decay=0.05, full=True)):
        if rule.full and rule.every:
            continue
        single, x, y = problem(kind, torch.float32)
        double, _, _ = problem(kind)
        two_layer.train(single, x, y, rule, order)
        two_layer.train(double, x, y, rule, order)
        torch.testing.assert_close(single.double().first, double.first, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(single.double().second, double.second, rtol=1e-4, atol=1e-5)


@compiled
def test_projected_steps_keep_the_norm_of_the_first_layer():
    net, x, y = problem(SIM_LN)
    order = torch.arange(N)
    two_layer.train(net, x, y, Rule(0.1, 0.3, every=1, radius=10.0), order)
    before = two_layer.outputs(net, x, x)
    assert float(net.first.norm()) != pytest.approx(10.0, rel=1e-12)  # the last step is not yet projected
    two_layer.train(net, x, y, Rule(0.0, every=1, radius=10.0), order[:1])
    assert float(net.first.norm()) == pytest.approx(10.0)
    torch.testing.assert_close(two_layer.outputs(net, x, x), before)


def cube(d):
    """All of {−1, 1}^d."""
    return 2.0 * torch.cartesian_prod(*[torch.arange(2)] * d).double() - 1


def test_both_constructed_minima_have_the_least_trace_of_a_network_with_a_bias():
    x = cube(6)
    y = x[:, 0] * x[:, 1]
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:20]
    for net in (two_layer.generalising(6, bias=True), two_layer.memorising(x[some], y[some])):
        torch.testing.assert_close(two_layer.outputs(net, x[some], x[some]), y[some])
        assert sum(two_layer.traces(net, x[some]).values()) == pytest.approx(two_layer.least_trace(6), rel=1e-12)
    assert two_layer.least_trace(30) == pytest.approx(22.27, abs=0.005)
    torch.testing.assert_close(two_layer.outputs(two_layer.generalising(6, bias=True), x, x), y)
    memory = two_layer.outputs(two_layer.memorising(x[some], y[some]), x, x)
    assert int((memory != 0).sum()) == 20


def test_the_printed_r_of_equation_5_does_not_reach_the_bound():
    x = cube(6)
    net = two_layer.generalising(6, bias=True)
    ratio = (6**2 + 1) ** 0.25 / 7**0.25
    printed = two_layer.Network(BIAS, net.first * ratio, net.second / ratio)
    torch.testing.assert_close(two_layer.outputs(printed, x, x), x[:, 0] * x[:, 1])
    assert sum(two_layer.traces(printed, x).values()) > 1.2 * two_layer.least_trace(6)


@pytest.mark.parametrize("seed", range(5))
def test_no_network_with_a_bias_has_a_gradient_below_the_bound(seed):
    net, x, _ = problem(BIAS, seed=seed)
    f = two_layer.outputs(net, x, x)
    for i in range(N):
        squares = sum(two_layer.traces(net, x[i : i + 1]).values()) / 2
        assert squares >= 2 * math.sqrt(D + 1) * abs(float(f[i])) * (1 - 1e-12)


def test_without_a_bias_four_units_compute_the_product_on_the_whole_cube():
    x = cube(6)
    net = two_layer.generalising(6, bias=False)
    torch.testing.assert_close(two_layer.outputs(net, x, x), x[:, 0] * x[:, 1])
    assert sum(two_layer.traces(net, x).values()) == pytest.approx(4 * math.sqrt(6))


def lines_of(optimizer, accuracy, train=1.0, epochs=200_000, loss=0.01):
    return [
        {
            **{"network": BIAS, "contender": optimizer, "round": seed, "epochs": epochs, "last": True, "loss": loss},
            **{"train_accuracy": train, "test_accuracy": accuracy, "trace": 22.0, "minimum_sharpness": 21.0},
        }
        for seed in range(2)
    ]


def test_a_verdict_concludes_no_more_than_was_run():
    bias = next(s for s in xor_training.SETTINGS if (s.kind, s.optimizer) == (BIAS, xor_training.SAM))
    short = flat_minima.sam_verdict(lines_of("1-SAM", 0.7), bias)
    assert short == "not reached: 70.0 ± 0.0 % after 200,000 epochs, the paper has 600,000"
    whole = flat_minima.sam_verdict(lines_of("1-SAM", 0.7, epochs=600_000), bias)
    assert whole == "no: 70.0 ± 0.0 % after 600,000 epochs, as the paper"
    assert flat_minima.sam_verdict(lines_of("1-SAM", 0.95, epochs=600_000), bias).startswith("nearly: 95.0 ± 0.0 %")
    assert flat_minima.sam_verdict(lines_of("1-SAM", 0.95), bias).startswith("not reached: 95.0 ± 0.0 %")
    assert flat_minima.sam_verdict(lines_of("1-SAM", 0.995), bias).startswith("yes: 99.5 ± 0.0 %")
    assert flat_minima.sam_verdict(lines_of("1-SAM", 0.995, train=0.99), bias).startswith("does not fit")
    then = [{**run, "epochs": 200_001, "loss": math.nan} for run in lines_of("1-SAM", 0.7)]
    gone = flat_minima.sam_verdict(lines_of("1-SAM", 0.7) + then[:1], bias)
    assert gone == "not reached: 70.0 ± 0.0 % after 200,000 epochs, the paper has 600,000; then diverged"
    assert flat_minima.sam_verdict([], bias) == "not run"


def test_memorising_decides_about_the_flattest_where_it_is_constructed():
    runs = xor_training.constructed()
    assert flat_minima.flattest_verdict(runs, BIAS).startswith("no: memorising has the same trace, 22.27, and ")
    assert flat_minima.flattest_verdict(runs, SIM_LN).startswith("no: memorising has the same trace, 2.00, and ")
    assert flat_minima.flattest_verdict(runs, NO_BIAS) == "no experiment decides it"


def test_checkpoints_grow_to_the_end_of_the_phase():
    assert xor_training.checkpoints(1) == [1]
    found = xor_training.checkpoints(100_000)
    assert found[0] == 1 and found[-1] == 100_000 and found == sorted(set(found))


def test_a_training_that_diverges_ends_early_and_says_so():
    setting = next(s for s in xor_training.SETTINGS if (s.kind, s.optimizer) == (NO_BIAS, xor_training.GD))
    wild = replace(setting, phases=(xor_training.Phase(Rule(1e6, full=True), 50),))
    if any(map(shutil.which, ("cc", "gcc", "clang"))):
        runs = xor_training.training(wild, seed=0, width=8)
        assert not math.isfinite(runs[-1]["loss"]) and runs[-1]["epochs"] < 50
