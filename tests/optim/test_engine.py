"""The engine where things go wrong, are copied, or meet the rest of torch."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases import CASES, Case, convnet, everything, known_group, mlp, same, samples, train
from contract.faults import WithLoss
from torch import nn

import ms_optim
from ms_optim.errors import CurvatureError, DataError, OptimizerError, OverwrittenWarning, UnsupportedError

every_case = pytest.mark.parametrize("case", CASES, ids=str)
balanced_cases = pytest.mark.parametrize("case", [c for c in CASES if c.rebalances], ids=str)
cross_entropy = nn.functional.cross_entropy


@every_case
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(case: Case, duplicate):
    model = convnet()
    optimizer = case.build(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step; a copy must not call the original's
    batches = samples(model, 6)
    list(train(model, optimizer, batches[:2]))
    model_copy, optimizer_copy = duplicate((model, optimizer))
    assert optimizer_copy.param_groups is optimizer_copy.base.param_groups
    before = everything(model, optimizer)
    torch.manual_seed(8)
    list(train(model_copy, optimizer_copy, batches[2:]))
    assert same(before, everything(model, optimizer))
    torch.manual_seed(8)
    list(train(model, optimizer, batches[2:]))
    assert same(everything(model, optimizer), everything(model_copy, optimizer_copy))


def test_an_optimizer_is_not_copied_inside_a_gradient_pass():
    optimizer = ms_optim.SAM(mlp(), lr=0.1)
    for gradient_pass in optimizer.passes():
        with gradient_pass, pytest.raises(OptimizerError, match="leave the pass first"):
            copy.deepcopy(optimizer)


@every_case
def test_schedulers_that_drive_momentum_find_it(case: Case):
    model = mlp()
    optimizer = case.build(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for _ in train(model, optimizer, samples(model, 2)):
        schedule.step()
    assert optimizer.base.param_groups[0]["momentum"] < 0.95


@balanced_cases
def test_a_refresh_by_hand_that_fails_stays_due_and_changes_nothing(case: Case):
    model = mlp()
    optimizer = case.build(model)
    x = samples(model, 1)[0][0]
    before = everything(model, optimizer)
    with pytest.raises(DataError, match="non-finite"):
        optimizer.refresh(x * float("nan"))
    with torch.no_grad():
        model[0].weight[0, 0] = 1e200  # its square overflows, after the signs were drawn
        before[0][0, 0] = 1e200
    with pytest.raises((CurvatureError, DataError), match="not finite"):
        optimizer.refresh(x)
    assert same(before, everything(model, optimizer))
    assert optimizer.refresh_due
    assert optimizer.balance is None


@balanced_cases
def test_a_refresh_by_hand_inside_a_pass_is_refused(case: Case):
    model = mlp()
    optimizer = case.build(model)
    x, y = samples(model, 1)[0]
    optimizer.refresh(x)
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            with pytest.raises(OptimizerError, match="inside a gradient pass"):
                optimizer.refresh(x)
            cross_entropy(model(x), y).backward()
    optimizer.step()


def test_a_pass_that_cannot_begin_is_not_left_open(monkeypatch):
    model = mlp()
    optimizer = ms_optim.MSRegularizedSGD(model, gradient="noise", group=known_group(model))
    batches = samples(model, 1)
    list(train(model, optimizer, batches))
    before = everything(model, optimizer)

    def no_memory(strength):
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "noise", no_memory)
        with pytest.raises(MemoryError, match="planted"):
            list(train(model, optimizer, batches))
    assert same(before, everything(model, optimizer))
    assert [hook.__self__ for hook in model._forward_pre_hooks.values()] == [optimizer.loop]
    list(train(model, optimizer, batches))


def test_leaving_the_passes_early_takes_no_step_and_the_next_step_works():
    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1)
    x, y = samples(model, 1)[0]
    weights = [p.detach().clone() for p in model.parameters()]
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            cross_entropy(model(x), y).backward()
        break
    with pytest.raises(OptimizerError, match="no gradient passes to finish"):
        optimizer.step()
    assert same(weights, list(model.parameters()))
    list(train(model, optimizer, [(x, y)]))


@pytest.mark.parametrize(
    ("now", "due"),
    [
        ({"rebalance": "metric"}, False),
        ({"rebalance": "metric", "refresh_every": 2}, False),
        ({"rebalance": "metric", "gauge": 1.0}, True),
        ({"rebalance": "move"}, True),
        ({"rebalance": None}, False),
    ],
)
def test_a_state_loaded_under_other_settings_follows_the_settings(now, due):
    model = mlp()
    x, y = samples(model, 1)[0]
    saved = ms_optim.MSSAM(model, lr=0.1, rebalance="metric", group=known_group(model))
    list(train(model, saved, [(x, y)]))
    optimizer = ms_optim.MSSAM(model, lr=0.1, group=known_group(model), **now)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.refresh_due is due
    kept = now["rebalance"] == "metric" and not due
    assert optimizer.scales("weights") == (saved.scales("weights") if kept else [1.0] * 6)
    assert optimizer.representative.due <= optimizer.representative.every


def test_a_random_stream_of_another_kind_of_device_is_left_out():
    model = mlp()
    saved = ms_optim.SAM(model, lr=0.1).state_dict()
    saved["ms_optim"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # what CUDA's generators write
    optimizer = ms_optim.SAM(model, lr=0.1, seed=3)
    stream = optimizer.generator.get_state()
    optimizer.load_state_dict(saved)
    assert torch.equal(stream, optimizer.generator.get_state())


@every_case
def test_parameters_with_names_and_generators_are_taken_as_torch_takes_them(case: Case):
    model = mlp()
    optimizer = case.build(list(model[0].named_parameters()), model=model)
    optimizer.add_param_group({"params": list(model[2].named_parameters())})
    optimizer.add_param_group({"params": model[4].named_parameters()})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]
    assert optimizer.names() == [name for name, _ in model.named_parameters()]
    list(train(model, optimizer, samples(model, 2)))


def test_a_base_optimizer_that_cannot_be_driven_is_refused_at_once():
    model = mlp()
    with pytest.raises(UnsupportedError, match="LBFGS evaluates the closure itself"):
        ms_optim.SAM(model, torch.optim.LBFGS)
    for kind in (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam):
        with pytest.raises(UnsupportedError, match=f"{kind.__name__} moves with .* or rebalance='metric'"):
            ms_optim.MSSAM(model, kind, lr=0.01)
        optimizer = ms_optim.MSSAM(model, kind, lr=0.01, rebalance="metric", group=known_group(model))
        list(train(model, optimizer, samples(model, 3)))
    with pytest.raises(OptimizerError, match=r"instance of SGD; pass the class, torch\.optim\.SGD"):
        ms_optim.SAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(OptimizerError, match="base is 'adamw'; pass a class of optimizers"):
        ms_optim.SAM(model, "adamw")


@every_case
def test_complex_parameters_and_what_is_no_model_are_refused(case: Case):
    model = mlp()
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    with pytest.raises(UnsupportedError, match="complex"):
        case.build(model)
    with pytest.raises(OptimizerError, match="model is a str"):
        case.build(mlp().parameters(), model="mlp")


@every_case
@pytest.mark.parametrize("network", [mlp, convnet])
def test_a_dropped_optimizer_is_gone_at_once_with_all_that_it_hung_on_its_model(case: Case, network):
    model = network()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            optimizer = case.build(model)
            list(train(model, optimizer, samples(model, 2)))
            alive = weakref.ref(optimizer)
            del optimizer
            assert alive() is None
            assert not (model._forward_pre_hooks or model._forward_hooks or model._state_dict_pre_hooks)
    finally:
        gc.enable()


@pytest.mark.parametrize("buffers", ["first", "last"])
@pytest.mark.parametrize("case", [case for case in CASES if "antithetic" not in case.name], ids=str)
def test_an_optimizer_dropped_in_the_middle_of_a_step_is_gone_at_once_and_its_perturbation_with_it(
    case: Case, buffers
):
    model = convnet()
    optimizer = case.build(model, refresh_every=1000, buffers=buffers)
    module = WithLoss(model)
    if case.passes > 1:
        optimizer.attach(module)
    batches = samples(model, 2)
    gc.collect()
    gc.disable()
    try:
        for last, (x, y) in enumerate(batches):
            clean = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            loss = module(x, y)
            if case.passes == 1 or not last:  # the backward pass of an attached module restores the weights
                loss.backward()
            if not last:
                optimizer.step()
        assert not case.perturbs or not same(clean, list(model.parameters()))
        alive = weakref.ref(optimizer)
        del optimizer
        assert alive() is None
        assert same(clean, list(model.parameters()))
        assert not (model._forward_pre_hooks or model._forward_hooks or model._state_dict_pre_hooks)
    finally:
        gc.enable()


def test_what_others_wrote_stays_when_an_optimizer_is_dropped_in_the_middle_of_a_step():
    model = mlp()
    optimizer = ms_optim.MSRegularizedSGD(model, gradient="noise", strength=1e-3, rebalance=None, lr=0.1)
    clean = [p.detach().clone() for p in model.parameters()]
    (x, y), *_ = samples(model, 1)
    cross_entropy(model(x), y).backward()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.warns(OverwrittenWarning, match="1 weights were written to"):
        del optimizer
    assert same([torch.ones_like(clean[0]), *clean[1:]], list(model.parameters()))
