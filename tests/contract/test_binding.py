"""Without `model=` the optimizer finds the outermost module that owns all its parameters."""

import copy
import gc
import weakref

import pytest
import torch
from cases import CASES, Case, convnet, everything, known_group, mlp, same, samples, train
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules import module as modules

import ms_optim
from ms_optim.errors import NoEffectWarning, OptimizerError, StateError

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_network = pytest.mark.parametrize("network", [mlp, convnet])


class Outer(nn.Module):
    """The outermost module that owns the parameters of what is inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def run(case, model, given, batches, form="closure", **options):
    options.setdefault("group", None if isinstance(model, Outer) else known_group(model))
    optimizer = case.build(given, **options)
    torch.manual_seed(1)
    if form == "closure":
        list(train(model, optimizer, batches))
    else:
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return optimizer


@every_case
@every_network
@pytest.mark.parametrize("form", ["closure", "loop"])
def test_found_or_given_the_model_is_the_same(case: Case, network, form):
    if form == "loop" and case.passes > 1:
        pytest.skip("an unmodified loop makes one pass")
    model = network()
    other = copy.deepcopy(model)
    batches = samples(model, 5)
    found = run(case, model, model.parameters(), batches, form)
    given = run(case, other, other, batches, form)
    assert found.model is model
    assert same(everything(model, found), everything(other, given))
    assert found.names() == given.names()


def test_the_outermost_module_is_taken():
    model = Outer(Outer(mlp()))
    optimizer = run(CASES[6], model, model.parameters(), samples(mlp(), 2))
    assert optimizer.model is model
    assert optimizer.names()[0] == "inner.inner.0.weight"


def test_a_module_with_a_part_of_the_parameters_is_passed_over():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = mlp(), mlp()

        def forward(self, x):
            return self.student(x) + 0 * self.teacher(x)

    model = Two()
    optimizer = run(CASES[6], model, model.student.parameters(), samples(mlp(), 1), group=None)
    assert optimizer.model is model
    assert set(optimizer.names()) == {f"student.{name}" for name, _ in mlp().named_parameters()}


def test_evaluation_does_not_bind():
    model = mlp()
    optimizer = ms_optim.MSSAM(model.parameters(), lr=0.1, group=known_group(model))
    model.eval()(samples(model, 1)[0][0])
    model.train()
    with torch.no_grad():
        model(samples(model, 1)[0][0])
    assert optimizer.model is None
    looking = len(modules._global_forward_pre_hooks)
    list(train(model, optimizer, samples(model, 1)))
    assert optimizer.model is model
    assert len(modules._global_forward_pre_hooks) == looking - 1  # it has stopped looking


@pytest.mark.parametrize("kind", [ms_optim.MSSAM, ms_optim.SAM])
def test_parameters_of_no_module_train_unbalanced_and_it_is_said(kind):
    weight = nn.Parameter(torch.randn(4, 6))
    other = nn.Parameter(weight.detach().clone())
    x, y = samples(mlp(), 1)[0]

    def step(optimizer, w):
        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(x @ w.T, y)
            loss.backward()
            return loss

        return optimizer.step(closure)

    optimizer, plain = kind([weight], lr=0.1, rho=0.1), ms_optim.SAM([other], lr=0.1, rho=0.1, rebalance=None)
    if kind is ms_optim.MSSAM:
        with pytest.warns(NoEffectWarning, match="no module that owns all the parameters of MSSAM"):
            step(optimizer, weight)
    else:
        step(optimizer, weight)
    step(plain, other)
    for _ in range(3):
        assert step(optimizer, weight) == step(plain, other)
    assert torch.equal(weight, other)


@pytest.mark.parametrize("gradient", ["noise", "trace"])
def test_in_an_unmodified_loop_too(gradient):
    weight = nn.Parameter(torch.randn(4, 6))
    x, y = samples(mlp(), 1)[0]
    optimizer = ms_optim.MSRegularizedSGD([weight], gradient=gradient, lr=0.1)
    before = weight.detach().clone()
    cross_entropy(x @ weight.T, y).backward()
    with pytest.warns(NoEffectWarning, match="so nothing is (balanced|perturbed)"):
        optimizer.step()
    assert not torch.equal(before, weight)


def test_what_cannot_do_without_a_model_says_so():
    weight = nn.Parameter(torch.randn(4, 6))
    x, y = samples(mlp(), 1)[0]

    def closure():
        loss = cross_entropy(x @ weight.T, y)
        loss.backward()
        return loss

    before = weight.detach().clone()
    for optimizer, message in (
        (ms_optim.ASAM([weight], lr=0.1), "operator='official' treats weights and biases differently"),
        (ms_optim.MSRegularizedSGD([weight], rebalance=None), "differentiates the network's trace"),
    ):
        with pytest.raises(OptimizerError, match=message):
            optimizer.step(closure)
        assert torch.equal(before, weight)


def test_keyword_arguments_are_seen_from_the_next_call_on():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, *, pixels):
            return self.inner(pixels)

    model = Named()
    x, y = samples(mlp(), 1)[0]
    optimizer = ms_optim.MSSAM(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(pixels=x), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptimizerError, match="keyword arguments only.*run this step again"):
        optimizer.step(closure)
    assert same(before, list(model.parameters()))
    optimizer.step(closure)
    assert optimizer.balance is not None


def test_a_dropped_optimizer_is_not_kept_alive_by_looking():
    optimizer = ms_optim.SAM(mlp().parameters(), lr=0.1)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


@every_case
def test_state_is_exchanged_with_an_optimizer_that_has_not_seen_its_model_yet(case: Case):
    model = mlp()
    optimizer = case.build(model)
    batches = samples(model, 6)
    list(train(model, optimizer, batches[:3]))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    list(train(model, optimizer, batches[3:]))
    again = mlp()
    resumed = case.build(again.parameters(), group=known_group(again))
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    list(train(again, resumed, batches[3:]))
    assert same(everything(model, optimizer), everything(again, resumed))
    wider = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
    with pytest.raises(StateError, match=r"parameter \(8, 6\).*parameter \(9, 6\)"):
        case.build(wider.parameters()).load_state_dict(saved[1])


@every_case
def test_a_copy_made_before_the_first_step_finds_its_own_model(case: Case):
    model = mlp()
    optimizer = case.build(model.parameters(), group=known_group(model))
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    batches = samples(model, 3)
    list(train(model_copy, optimizer_copy, batches))
    assert optimizer_copy.model is model_copy and optimizer.model is None
    list(train(model, optimizer, batches))
    assert same(everything(model, optimizer), everything(model_copy, optimizer_copy))
