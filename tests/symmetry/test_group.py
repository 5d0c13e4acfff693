"""The group acts: on weights, statistics, gradients and optimizer state, all or nothing."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import Residual, mlp

from ms_optim.errors import SymmetryError, UnsupportedError
from ms_optim.symmetry import ScaleGroup, scale_symmetries


def residual():
    model, inputs = Residual().eval(), torch.randn(4, 2, 8, 8)
    return model, inputs, scale_symmetries(model, inputs)


@cache
def residual_group():
    """The same for every network of this architecture."""
    return scale_symmetries(Residual(), torch.randn(2, 2, 8, 8))


def state_of(model, optimizer=None):
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    tensors |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if optimizer is not None:
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.{key}": v.clone() for key, v in state.items() if isinstance(v, torch.Tensor)}
    return tensors


def copied(model):
    """A copy with its gradients, which ``deepcopy`` drops."""
    copy_ = copy.deepcopy(model)
    for p, source in zip(copy_.parameters(), model.parameters(), strict=True):
        p.grad = None if source.grad is None else source.grad.clone()
    return copy_


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for key in a:
        scale = max(float(b[key].double().abs().max()), 1e-30) if b[key].numel() else 1.0
        assert float((a[key].double() - b[key].double()).abs().max()) <= tolerance * scale, key


def test_log_scales_are_integer_combinations_of_t():
    group = ScaleGroup(("a", "b", "c"), torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64))
    assert group.log_scale([0.5, 1.0]) == {"a": 0.5, "b": 1.5, "c": 0.0}
    assert group.log_scale(np.array([0.5, 1.0])) == group.log_scale(torch.tensor([0.5, 1.0]))


def test_tensors_keep_their_storage_and_what_does_not_move_its_bits():
    model, inputs, group = residual()
    tensors = [*model.parameters(), *model.buffers()]
    addresses, bias = [t.data_ptr() for t in tensors], model.head.bias.detach().clone()
    group.rescale_(model, torch.full((len(group),), 0.3))
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == addresses
    assert torch.equal(model.head.bias, bias)


def test_elements_add_and_have_inverses():
    model, inputs, group = residual()
    s, t = group.bound(model, group.random(0.2)), group.random(0.2).abs()
    once, twice, start = copy.deepcopy(model), copy.deepcopy(model), state_of(model)
    group.rescale_(once, s + t)
    group.rescale_(twice, t)
    group.rescale_(twice, s)
    assert_same(state_of(once), state_of(twice), 1e-13)
    group.rescale_(once, -(s + t))
    assert_same(state_of(once), start, 1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("build", [lambda: mlp(nn.LeakyReLU), lambda: Residual().eval()], ids=["mlp", "residual"])
def test_gradients_and_momentum_move_as_those_of_the_rescaled_network(build, momentum):
    """The gradient at e^a W is e^{-a} times that at W; so is the momentum, a sum of gradients along a path of a."""
    torch.manual_seed(3)
    model = build()
    inputs = torch.randn(4, 2, 8, 8) if isinstance(model, Residual) else torch.randn(4, 5)
    targets = torch.tensor([0, 1, 2, 0])
    group = scale_symmetries(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)

    def gradient(network):
        network.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()

    for _ in range(3):
        gradient(model)
        optimizer.step()
    gradient(model)
    t = group.bound(model, group.random(0.5))
    moved = copied(model)
    group.rescale_(moved, t)
    by_rescaling = state_of(moved)
    gradient(moved)
    assert_same(state_of(moved), by_rescaling, 1e-11)

    # One step of SGD in the metric of the element, lr e^{2a}, commutes with it: momentum included.
    a = group.log_scale(t)
    first, second = copied(model), copied(model)
    optimizers = []
    for network in (first, second):
        clone = torch.optim.SGD(
            [{"params": [p], "name": n} for n, p in network.named_parameters()], lr=0.05, momentum=momentum
        )
        for p, source in zip(network.parameters(), model.parameters(), strict=True):
            if momentum:
                clone.state[p]["momentum_buffer"] = optimizer.state[source]["momentum_buffer"].clone()
        optimizers.append(clone)
    optimizers[0].step()
    group.rescale_(first, t, optimizers[0])
    group.rescale_(second, t, optimizers[1])
    for parameters in optimizers[1].param_groups:
        parameters["lr"] *= math.exp(2 * a[parameters["name"]])
    optimizers[1].step()
    assert_same(state_of(first, optimizers[0]), state_of(second, optimizers[1]), 1e-12)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_of_adam_move_as_gradients_and_their_squares(kind):
    model = mlp(nn.ReLU)
    group = scale_symmetries(model, torch.randn(4, 5))
    optimizer = kind(model.parameters(), lr=1e-3, amsgrad=True)
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    t = torch.tensor([0.4, -0.7])
    a, before = group.log_scale(t), copy.deepcopy(optimizer.state_dict()["state"])
    group.rescale_(model, t, optimizer)
    after = optimizer.state_dict()["state"]
    for i, name in enumerate(group.parameters):
        for key, k in {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "step": 0}.items():
            torch.testing.assert_close(after[i][key], before[i][key] * math.exp(k * a[name]), rtol=1e-14, atol=0)


def test_a_wrapper_with_a_base_is_read_through():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base

    model = mlp(nn.ReLU)
    group = scale_symmetries(model, torch.randn(4, 5))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 5)).square().sum().backward()
    base.step()
    before = base.state[model[0].weight]["momentum_buffer"].clone()
    group.rescale_(model, [0.5, 0.0], Wrapper(base))
    torch.testing.assert_close(base.state[model[0].weight]["momentum_buffer"], before * math.exp(-0.5))


def stepped(kind, parameters, model, **options):
    optimizer = kind(parameters, **options)
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_an_optimizer_with_unknown_state_is_refused_before_anything_is_changed():
    model = mlp(nn.ReLU)
    group = scale_symmetries(model, torch.randn(4, 5))
    optimizer = stepped(torch.optim.RMSprop, model.parameters(), model, lr=1e-3)
    before = state_of(model, optimizer)
    with pytest.raises(UnsupportedError, match="RMSprop keeps '.*' for 0.weight.* use SGD, Adam, AdamW"):
        group.rescale_(model, [0.1, 0.2], optimizer)
    assert_same(state_of(model, optimizer), before)


def test_a_subclass_and_a_foreign_key_are_unknown_but_no_state_is_no_obstacle():
    class Mine(torch.optim.SGD):
        pass

    model = mlp(nn.ReLU)
    group = scale_symmetries(model, torch.randn(4, 5))
    group.rescale_(model, [0.1, 0.2], torch.optim.RMSprop(model.parameters()))
    optimizer = stepped(Mine, model.parameters(), model, lr=0.1, momentum=0.9)
    with pytest.raises(UnsupportedError, match="Mine keeps 'momentum_buffer'"):
        group.rescale_(model, [0.1, 0.2], optimizer)
    known = stepped(torch.optim.SGD, model.parameters(), model, lr=0.1)
    known.state[model[0].weight]["average"] = torch.zeros(7, 5)
    with pytest.raises(UnsupportedError, match="SGD keeps 'average' for 0.weight"):
        group.rescale_(model, [0.1, 0.2], known)


def test_parameters_of_the_optimizer_beyond_the_model_are_left_alone():
    model, other = mlp(nn.ReLU), nn.Linear(5, 3)
    group = scale_symmetries(model, torch.randn(4, 5))
    both = nn.ModuleList([model, other])
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, 5)
    (model(x) + other(x)).square().sum().backward()
    optimizer.step()
    before = [other.weight.detach().clone(), optimizer.state[other.weight]["momentum_buffer"].clone()]
    group.rescale_(model, [0.5, -0.5], optimizer)
    assert torch.equal(other.weight, before[0])
    assert torch.equal(optimizer.state[other.weight]["momentum_buffer"], before[1])


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([0.1], r"t has shape \(1,\), but the group has 5 generators"),
        (torch.zeros(1, 5), r"t has shape \(1, 5\)"),
        ([0.1, math.nan, 0.0, math.inf, 0.0], "2 non-finite values of 5"),
    ],
)
def test_an_element_that_is_none_is_refused(t, message):
    model, _, group = residual()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        group.rescale_(model, t)
    assert_same(state_of(model), before)


def test_another_model_is_refused():
    model, _, group = residual()
    with pytest.raises(SymmetryError, match=r"Sequential lacks conv.weight .* and also has 0.bias .* scale_symmetries"):
        group.rescale_(mlp(nn.ReLU), torch.zeros(5))
    wider = Residual()
    wider.head = nn.Linear(4, 7)
    with pytest.raises(SymmetryError, match=r"head.weight of Residual has shape \(7, 4\), but \(3, 4\)"):
        group.rescale_(wider, torch.zeros(5))


def test_a_scale_beyond_the_dtype_is_refused():
    model = mlp(nn.ReLU).float()
    group = scale_symmetries(model, torch.randn(4, 5, dtype=torch.float32))
    before = state_of(model)
    with pytest.raises(SymmetryError, match=r"0.weight \(torch.float32\) would be scaled by e\^100.0"):
        group.rescale_(model, [100.0, 0.0])
    assert_same(state_of(model), before)


def test_a_variance_that_would_become_negative_is_refused_and_the_bound_is_named():
    model, _, group = residual()
    nn.init.constant_(model.norm.running_var, 1e-5)
    before, t = state_of(model), -torch.ones(len(group))
    with pytest.raises(SymmetryError, match=r"norm.running_var would become -.*no less than e\^-0.347; .*group.bound"):
        group.rescale_(model, t)
    assert_same(state_of(model), before)
    group.rescale_(model, group.bound(model, t))
    assert float(model.norm.running_var.min()) >= 0


def test_bound_leaves_what_is_allowed_and_ignores_models_without_statistics():
    model, _, group = residual()
    t = 0.1 * torch.ones(len(group))
    assert torch.equal(group.bound(model, t), t)
    plain = mlp(nn.ReLU)
    free = scale_symmetries(plain, torch.randn(4, 5))
    assert torch.equal(free.bound(plain, [-50.0, 50.0]), torch.tensor([-50.0, 50.0]))


@given(st.integers(0, 1000), st.floats(1e-6, 1e-2))
def test_bound_is_the_nearest_element_that_is_allowed(seed, variance):
    """Karush, Kuhn and Tucker: allowed, and the step is a sum of forces of the bounds that are reached, all inward."""
    group = residual_group()
    torch.manual_seed(seed)
    model = Residual()
    for norm in (model.norm, model.norm1, model.norm2):
        nn.init.uniform_(norm.running_var, variance, 10 * variance)
    t = group.random(3.0)
    found = group.bound(model, t)
    buffers = dict(model.named_buffers())
    rows = torch.stack([s.row for s in group.statistics]).numpy()
    least = np.array([-0.5 * math.log1p(float(buffers[s.variance].min()) / s.eps) for s in group.statistics])
    slack = rows @ found.numpy() - least
    assert slack.min() > -1e-9
    force = (group.generators @ group.generators.T @ (found - t)).numpy()
    reached = rows[slack < 1e-9].T
    # nnls crashes on a matrix without columns.
    unexplained = scipy.optimize.nnls(reached, force)[1] if reached.size else np.linalg.norm(force)
    assert unexplained < 1e-9
    group.rescale_(model, found)
    assert all(float(buffers[s.variance].min()) >= 0 for s in group.statistics)


def test_check_names_the_error_of_a_group_that_is_not_the_models():
    model, inputs, group = residual()
    wrong = ScaleGroup(group.parameters, group.generators.roll(1, 1), statistics=group.statistics)
    before = state_of(model)
    with pytest.raises(SymmetryError, match=r"changed the logits of Residual by .* more than 9e-13"):
        wrong.check(model, inputs)
    assert_same(state_of(model), before)


def test_check_sees_through_zero_parameters():
    model = mlp(nn.ReLU)
    nn.init.zeros_(model[4].weight)
    right = scale_symmetries(model, torch.randn(4, 5))
    wrong = ScaleGroup(right.parameters, right.generators.abs())
    right.check(model, torch.randn(4, 5))
    with pytest.raises(SymmetryError, match="changed the logits"):
        wrong.check(model, torch.randn(4, 5))
    assert not bool(model[4].weight.any())


def test_check_reports_how_far_training_mode_is_off():
    model, inputs, group = residual()
    check = group.check(model, inputs)
    assert check.eval_error < 1e-13 < check.training_error < 1e-2
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2
    assert group.check(model.train(), inputs, tolerance=1.0).training_error > 10 * check.training_error


def test_default_tolerance_follows_the_dtype_and_layer_norm():
    group = scale_symmetries(mlp(nn.ReLU), torch.randn(4, 5))
    assert group.check(mlp(nn.ReLU).float(), torch.randn(4, 5, dtype=torch.float32)).tolerance == 4096 * 2.0**-23
    normed = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    assert scale_symmetries(normed, torch.randn(4, 5)).check(normed, torch.randn(4, 5)).tolerance == 1e-2


def test_random_elements_have_the_given_deviation_and_stream():
    group = ScaleGroup(("w",), torch.ones(20000, 1, dtype=torch.float64))
    t = group.random(0.3, torch.Generator().manual_seed(1))
    assert t.shape == (20000,) and abs(float(t.std()) - 0.3) < 0.01
    assert torch.equal(t, group.random(0.3, torch.Generator().manual_seed(1)))


def test_the_subgroup_that_fixes_parameters_moves_none_of_them():
    model, inputs, group = residual()
    fixed = group.fixing(["head.weight", "conv2.weight"])
    assert len(fixed) == 3
    held = [fixed.parameters.index(name) for name in ("head.weight", "conv2.weight")]
    assert not bool(fixed.generators[:, held].any())
    assert int(torch.linalg.matrix_rank(torch.cat([group.generators, fixed.generators]))) == len(group)
    fixed.check(model, inputs, tolerance=1e-12)
    assert group.fixing(["head.bias"]) is group


def test_print_says_what_scales_together_and_what_stood_in_the_way():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3))
    group = scale_symmetries(model, torch.randn(2, 5))
    assert str(group).splitlines() == [
        "ScaleGroup: 2 independent rescalings of 8 parameters",
        "  t[0]: 0.weight^+1 0.bias^+1 2.weight^-1",
        "  t[1]: 2.weight^+1 2.bias^+1",
        "  fixed: 3.weight 3.bias 5.weight 5.bias",
        "  inexact by their ε: 1 LayerNorm-like normalisers",
        "  opaque: 1 x aten.gelu.default (not known to commute with positive rescaling) in 4",
    ]
    assert repr(group) == "ScaleGroup(2 generators, 8 parameters, 1 opaque operations)"
    assert "running statistics of 3 BatchNorms" in str(residual()[2])


def test_a_rescaling_inside_an_autocast_block_is_seen_by_what_follows_in_it():
    """γ moves, and the weight after it against it; with a copy of that weight as it was the logits would grow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).float()
    x = torch.randn(64, 6, dtype=torch.float32)
    group = scale_symmetries(model, x)
    expected = model(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)  # which keeps low-precision copies of the weights
        group.rescale_(model, [1.0] * len(group))
        found = model(x).detach().float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
