"""The contract that every optimizer keeps; a new one enters it with one line in cases.py."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import CASES, NEURON, Case, convnet, everything, mlp, same, samples, train
from cases import EVERY as ALL
from torch import nn

import ms_optim
from ms_optim.errors import NoEffectWarning, NonFiniteWarning, OptimizerError
from ms_optim.optim.loop import Loop

EVERY = ALL + NEURON
every_case = pytest.mark.parametrize("case", EVERY, ids=str)
balanced_cases = pytest.mark.parametrize("case", [c for c in EVERY if c.rebalances], ids=str)
every_pass = pytest.mark.parametrize(
    ("case", "failing_pass"), [(c, i) for c in EVERY for i in range(c.passes)], ids=lambda value: str(value)
)
every_network = pytest.mark.parametrize("network", [mlp, convnet])
cross_entropy = nn.functional.cross_entropy


@every_case
@every_network
def test_passes_and_closure_give_the_same_bits(case: Case, network):
    model = network()
    other = copy.deepcopy(model)
    by_closure, by_passes = case.build(model), case.build(other)
    batches = samples(model, 5)
    torch.manual_seed(1)
    for _ in train(model, by_closure, batches):
        pass
    torch.manual_seed(1)
    for x, y in batches:
        count = 0
        for gradient_pass in by_passes.passes():
            with gradient_pass:
                loss = cross_entropy(other(x), y)
                gradient_pass.loss = loss.detach()
                loss.backward()
            count += 1
        assert count == case.passes
        by_passes.step()
    assert same(everything(model, by_closure), everything(other, by_passes))


@every_case
def test_step_returns_the_loss_of_the_first_pass(case: Case):
    model = mlp()
    optimizer = case.build(model)
    (x, y), *_ = samples(model, 1)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    before = cross_entropy(model(x), y).item()
    assert optimizer.step(closure).item() == losses[0]
    assert len(losses) == case.passes
    if "noise" not in case.name:
        assert losses[0] == pytest.approx(before, rel=1e-12)


@every_case
@every_network
def test_weights_are_restored_bit_for_bit_and_stay_where_they_are(case: Case, network):
    model = network()
    optimizer = case.build(model, lr=0.0, momentum=0.0, refresh_every=1000)
    batches = samples(model, 4)
    next(train(model, optimizer, batches))  # the first step may move to the representative
    weights = [p.detach().clone() for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    for _ in train(model, optimizer, batches):
        pass
    assert same(weights, list(model.parameters()))
    assert places == [p.data_ptr() for p in model.parameters()]


@every_case
def test_batch_norm_statistics_move_once_a_step(case: Case):
    model, plain = convnet(), None
    optimizer = case.build(model, lr=0.0, momentum=0.0, refresh_every=1000)
    batches = samples(model, 3)
    next(train(model, optimizer, batches[:1]))
    plain = copy.deepcopy(model)
    torch.manual_seed(5)
    for _ in train(model, optimizer, batches[1:]):
        pass
    torch.manual_seed(5)
    for x, _ in batches[1:]:
        plain(x)
    assert int(model[1].num_batches_tracked) == 3
    if "noise" not in case.name and "momentum" not in case.name:  # whose one pass is at perturbed weights
        assert torch.equal(model[1].running_mean, plain[1].running_mean)
        assert torch.equal(model[1].running_var, plain[1].running_var)


@every_case
@every_network
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stop", [2, 3])  # in the middle of a refresh interval, and where one is due
def test_resumed_run_is_bitwise_the_uninterrupted_run(case: Case, network, momentum, stop):
    model = network()
    optimizer = case.build(model, momentum=momentum)
    batches = samples(model, 7)
    torch.manual_seed(2)
    for _ in train(model, optimizer, batches[:stop]):
        pass
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    for _ in train(model, optimizer, batches[stop:]):
        pass

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    again = network()
    resumed = case.build(again, momentum=momentum, seed=7)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    for _ in train(again, resumed, batches[stop:]):
        pass
    assert same(everything(model, optimizer), everything(again, resumed))
    assert resumed.steps == optimizer.steps == 7


@every_pass
@pytest.mark.parametrize("failing_step", [0, 1, 3])  # the first refresh, no refresh, a later refresh
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_any_pass_leaves_everything_as_before_the_step(case: Case, failing_pass, failing_step, error):
    model = convnet()
    optimizer = case.build(model)
    batches = samples(model, 5)
    for _ in train(model, optimizer, batches[:failing_step]):
        pass
    before = everything(model, optimizer)
    x, y = batches[failing_step]
    calls = 0

    def closure():
        nonlocal calls
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        calls += 1
        if calls == failing_pass + 1:
            raise error("planted")
        return loss

    with pytest.raises(error, match="planted"):
        optimizer.step(closure)
    assert same(before, everything(model, optimizer))
    assert all(isinstance(getattr(hook, "__self__", None), Loop) for hook in model._forward_pre_hooks.values())
    for _ in train(model, optimizer, batches[failing_step:]):  # and the optimizer is still usable
        pass


@balanced_cases
def test_a_failing_refresh_changes_nothing(case: Case):
    model = convnet()
    optimizer = case.build(model)
    (x, y), *_ = samples(model, 1)
    before = everything(model, optimizer)
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = float("nan")
    with pytest.raises(ms_optim.errors.DataError, match="non-finite"):
        next(train(model, optimizer, [(poisoned, y)]))
    assert same(before, everything(model, optimizer))


@every_case
def test_nothing_but_the_step_itself_touches_global_randomness_modes_and_hooks(case: Case):
    model = convnet()
    optimizer = case.build(model, refresh_every=1)
    plain = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.05)
    twin = convnet()
    twin.load_state_dict(model.state_dict())
    model[3].eval()  # one module in a mode of its own
    twin[3].eval()
    batches = samples(model, 2)
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    x, y = batches[0]

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    hooks = [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), Loop)]
    assert plain.param_groups[0]["lr"] == 0.05


@every_case
def test_a_copied_or_saved_model_carries_nothing_of_the_optimizer(case: Case):
    model = mlp()
    optimizer = case.build(model)
    for _ in train(model, optimizer, samples(model, 2)):
        pass
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for hook in twin._forward_pre_hooks.values():  # of an unmodified loop: it does nothing any more
            assert hook.__self__._optimizer is None


@every_case
def test_a_scheduler_drives_both_optimizers_before_and_after_loading(case: Case):
    model = mlp()
    optimizer = case.build(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    batches = samples(model, 3)
    for i, _ in enumerate(train(model, optimizer, batches)):
        schedule.step()
        assert optimizer.base.param_groups[0]["lr"] == 0.05 * 0.5 ** (i + 1)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.05 * 0.5**4
    assert optimizer.param_groups is optimizer.base.param_groups


@every_case
def test_parameter_groups_keep_their_own_settings(case: Case):
    model = mlp()
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    own = next(iter(case.off))
    optimizer = case.build(
        [{"params": weights, "lr": 0.01}, {"params": biases, own: 0.0, "weight_decay": 0.0}],
        model=model,
        weight_decay=0.1,
    )
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.05]
    assert [g[own] for g in optimizer.param_groups] == [case.options[own], 0.0]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    for _ in train(model, optimizer, samples(model, 3)):
        pass


@every_case
def test_groups_can_be_added_on_the_way(case: Case):
    model = mlp()
    whole = copy.deepcopy(model)
    some = case.build([*model[0].parameters(), *model[2].parameters()], model=model)
    batches = samples(model, 4)
    head = [p.detach().clone() for p in model[4].parameters()]
    for _ in train(model, some, batches[:2]):
        pass
    assert same(head, list(model[4].parameters()))  # neither descended nor rescaled: it is not this optimizer's
    some.add_param_group({"params": list(model[4].parameters()), "lr": 0.3})
    assert some.param_groups is some.base.param_groups
    assert some.param_groups[1][next(iter(case.off))] == case.options[next(iter(case.off))]
    for _ in train(model, some, batches[2:]):
        pass
    assert not same(head, list(model[4].parameters()))
    with pytest.raises(OptimizerError, match="not one of Sequential's"):
        some.add_param_group({"params": list(whole[4].parameters())})
    assert len(some.param_groups) == 2


@every_case
def test_frozen_parameters_and_missing_gradients_are_left_alone(case: Case):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    model = Branching()
    model.first.weight.requires_grad_(False)
    optimizer = case.build(model)
    frozen = [model.first.weight.clone(), model.unused.weight.detach().clone()]
    (x, y), *_ = samples(mlp(), 1)
    for _ in train(model, optimizer, [(x, y)] * 4):
        pass
    assert same(frozen, [model.first.weight, model.unused.weight])
    model.second.weight.requires_grad_(False)  # frozen on the way
    late = model.second.weight.clone()
    moving = model.third.weight.detach().clone()
    if case.rebalances:
        with pytest.warns(NoEffectWarning, match="frozen"):  # the last weight has nothing left to scale against
            list(train(model, optimizer, [(x, y)] * 4))
    else:
        list(train(model, optimizer, [(x, y)] * 4))
    assert same([late], [model.second.weight])
    assert not torch.equal(moving, model.third.weight)


@balanced_cases
def test_a_model_without_symmetry_trains_as_the_unbalanced_optimizer(case: Case):
    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))

    model, other = build(), build()
    balanced, plain = case.build(model), case.build(other, rebalance=None)
    batches = samples(model, 4)
    with pytest.warns(NoEffectWarning, match="gelu"):
        list(train(model, balanced, batches))
    list(train(other, plain, batches))
    assert same(everything(model, balanced), everything(other, plain))
    assert balanced.balance is None


@pytest.mark.parametrize("case", [c for c in CASES if "trace" not in c.name], ids=str)  # other signs for other batches
def test_accumulation_inside_a_pass_equals_the_whole_batch(case: Case):
    model = mlp()
    other = copy.deepcopy(model)
    group = ms_optim.scale_symmetries(model, samples(model, 1)[0])
    whole = case.build(model, refresh_every=1000, group=group)
    parts = case.build(other, refresh_every=1000, group=group)
    for x, y in samples(model, 3):
        for optimizer in (whole, parts):
            if optimizer.refresh_due:
                optimizer.refresh(x)
        for p in whole.passes():
            with p:
                cross_entropy(model(x), y).backward()
        whole.step()
        for p in parts.passes():
            with p:
                for a, b in ((x[:4], y[:4]), (x[4:], y[4:])):
                    (cross_entropy(other(a), b) / 2).backward()
        parts.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_case
def test_step_hooks_fire(case: Case):
    model = mlp()
    optimizer = case.build(model)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    list(train(model, optimizer, samples(model, 1)))
    assert fired == ["pre", "post"]


@pytest.mark.parametrize("case", [case for case in CASES if case.passes == 2 and "noise" not in case.name], ids=str)
def test_a_gradient_that_is_not_finite_perturbs_nothing_and_is_said(case: Case):
    model = mlp()
    optimizer = case.build(model, lr=0.0, momentum=0.0, refresh_every=1000)
    batches = samples(model, 1)
    list(train(model, optimizer, batches))
    weights = [p.detach().clone() for p in model.parameters()]
    passes = 0
    with pytest.warns(NonFiniteWarning, match="not finite"):
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                (cross_entropy(model(batches[0][0]), batches[0][1]) * float("nan")).backward()
            passes += 1
    assert passes == 2  # the second one might be finite
    assert same(weights, list(model.parameters()))


def test_an_error_between_the_passes_restores_buffers_too():
    class Own(torch.autograd.Function):  # what it does with its parameter, no rule can know
        @staticmethod
        def forward(ctx, x, slope):
            ctx.save_for_backward(x, slope)
            return x * slope

        @staticmethod
        def backward(ctx, grad):
            x, slope = ctx.saved_tensors
            return grad * slope, (grad * x).sum(0)

    class WithoutRule(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.slope, self.head = nn.BatchNorm1d(6), nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(Own.apply(self.norm(x), self.slope))

    model = WithoutRule()
    optimizer = ms_optim.MSRegularizedSGD(model, rebalance=None)
    before = everything(model, optimizer)
    with pytest.raises(ms_optim.errors.CurvatureError, match="slope"):
        next(train(model, optimizer, samples(mlp(), 1)))
    assert same(before, everything(model, optimizer))


@every_case
def test_every_kth_step_is_ours_and_the_others_are_the_base_optimizers(case: Case):
    torch.manual_seed(0)
    model = mlp()
    optimizer = case.build(model, every=3, refresh_every=1000)
    base = torch.optim.SGD
    counts, batches = [], samples(model, 7)
    for x, y in batches:
        twin = copy.deepcopy(model)
        plain = base(twin.parameters(), lr=optimizer.param_groups[0]["lr"])
        plain.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
        cross_entropy(twin(x), y).backward()
        plain.step()
        counts.append(0)
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                loss = cross_entropy(model(x), y)
                gradient_pass.loss = loss.detach()
                loss.backward()
            counts[-1] += 1
        optimizer.step()
        if len(counts) % 3 != 1:
            assert same(list(twin.parameters()), list(model.parameters()))
        elif len(counts) > 1:  # (the first momentum is none)
            assert not same(list(twin.parameters()), list(model.parameters()))
    assert counts == [case.passes, 1, 1] * 2 + [case.passes]
    with pytest.raises(ValueError, match="every must be >= 1"):
        case.build(model, every=0)
