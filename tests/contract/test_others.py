"""Others write to weights, assign buffers, call a module twice: what is theirs stays, and what cannot be is said."""

import copy

import pytest
import torch
from cases import everything, mlp, same, samples, train
from contract.faults import WithLoss
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import OptimizerError, OverwrittenWarning, UnsupportedError


def noisy(model):
    return ms_optim.MSRegularizedSGD(model, gradient="noise", strength=1e-3, rebalance=None, lr=0.1)


def test_another_optimizers_training_is_not_undone_by_one_that_is_still_there():
    model = mlp()
    old = noisy(model)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in samples(model, 3):
        plain.zero_grad()
        cross_entropy(model(x), y).backward()
        plain.step()
    trained = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(OverwrittenWarning, match="6 weights were written to .* drop this one first"):
        model.eval()(x)
    assert same(trained, list(model.parameters()))
    assert old.steps == 0


@pytest.mark.parametrize("form", ["loop", "attached"])
def test_weights_that_are_loaded_in_the_middle_of_a_step_stay(form):
    model = mlp()
    best = copy.deepcopy(model.state_dict())
    optimizer = noisy(model) if form == "loop" else ms_optim.SAM(model, lr=0.1, rho=0.5)
    module = WithLoss(model)
    if form == "attached":
        optimizer.attach(module)
    for x, y in samples(model, 2):
        optimizer.zero_grad()
        module(x, y).backward()
        optimizer.step()
    module(x, y)  # a bad loss, say
    model.load_state_dict(best)
    model.eval()(x)
    assert same(list(best.values()), list(model.parameters()))


def test_a_largest_norm_of_an_embedding_is_not_taken_for_another_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6, max_norm=1.0), nn.Flatten(), nn.Linear(12, 4))
    optimizer = noisy(model)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(torch.randint(0, 10, (8, 2))), torch.randint(0, 4, (8,))).backward()
        optimizer.step()


class Counting(nn.Module):
    """A buffer that is assigned, and not written in place."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.inner(x)


@pytest.mark.parametrize("buffers", ["first", "last"])
def test_assigned_buffers_move_once_a_step_and_survive_failures(buffers):
    model = Counting()
    optimizer = ms_optim.SAM(model, lr=0.1, rho=0.1, buffers=buffers)
    batches = samples(mlp(), 3)
    list(train(model, optimizer, batches))
    assert float(model.calls) == 3 + 3  # and one look at the logits after each step
    (x, y), *_ = batches
    before = everything(model, optimizer)

    def closure():
        loss = cross_entropy(model(x), y)
        loss.backward()
        if optimizer._pass is not None and not optimizer._pass.first:
            raise RuntimeError("planted")
        return loss

    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(closure)
    assert same(before, everything(model, optimizer))


def test_buffers_of_the_module_around_the_model_move_once_a_step():
    class Normalised(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.norm, self.model = nn.BatchNorm1d(6, affine=False), model

        def forward(self, x, y):
            return cross_entropy(self.model(self.norm(x)), y)

    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1, rho=0.1)
    module = optimizer.attach(Normalised(model))
    for x, y in samples(model, 4):
        optimizer.zero_grad()
        module(x, y).backward()
        optimizer.step()
    assert int(module.norm.num_batches_tracked) == 4


def test_two_forward_passes_of_an_attached_module_before_one_backward_are_refused():
    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1, rho=0.1)
    module = optimizer.attach(WithLoss(model))
    first, second = samples(model, 2)
    before = everything(model, optimizer)
    with pytest.raises(OptimizerError, match="each forward pass of an attached module has a perturbation of its own"):
        (module(*first) + module(*second)).backward()
    assert same(before, everything(model, optimizer))


def test_data_parallel_is_refused_wherever_it_is():
    model = mlp()
    with pytest.raises(UnsupportedError, match="DataParallel"):
        ms_optim.SAM(nn.Sequential(nn.DataParallel(model)), lr=0.1)
    with pytest.raises(UnsupportedError, match="DataParallel"):
        ms_optim.SAM(model, lr=0.1).attach(nn.DataParallel(WithLoss(model)))
    optimizer = ms_optim.SAM(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="DataParallel"):
        list(train(nn.DataParallel(model), optimizer, samples(model, 1)))


@pytest.mark.parametrize("value", [None, 1.5, "loss", ("loss", "logits")])
def test_whatever_a_closure_returns_is_returned_and_fails_nothing(value):
    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1, rho=0.1, diagnose=True)
    (x, y), *_ = samples(model, 1)

    def closure():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        return value

    assert optimizer.step(closure) == value
    if value is None:
        by_number = ms_optim.SAM(mlp(), lr=0.1, rho=0.1, m=4)
        assert by_number.step(lambda part: None, samples=8) is None


def test_a_scaler_is_forgotten_after_its_step():
    model = mlp().float()
    optimizer = ms_optim.SAM(model, lr=0.1, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    (x, y), *_ = samples(model, 1)
    for gradient_pass in optimizer.passes(scaler=scaler):
        with gradient_pass:
            scaler.scale(cross_entropy(model(x.float()), y)).backward()
    scaler.step(optimizer)
    scaler.update()

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x.float()), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.steps == 2
