"""Parameters of every kind: ascended, sparse, tied, in low precision, without a gradient now and then, none at all."""

import contextlib
import copy

import pytest
import torch
from cases import CASES as OWN
from cases import COMBINED, OTHERS, Case, convnet, everything, mlp, same, samples, train
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import NonFiniteWarning, OptimizerError

CASES = OWN + OTHERS

every_case = pytest.mark.parametrize("case", CASES, ids=str)
gradient_ascents = [c for c in CASES if c.passes == 2 and "noise" not in c.name]


@pytest.mark.parametrize("case", CASES + COMBINED, ids=str)
@pytest.mark.parametrize("network", [mlp, convnet])
def test_maximising_the_negative_is_minimising(case: Case, network):
    model = network()
    other = copy.deepcopy(model)
    batches = samples(model, 5)
    minimised, maximised = case.build(model), case.build(other, maximize=True)
    torch.manual_seed(1)
    list(train(model, minimised, batches))
    torch.manual_seed(1)
    for x, y in batches:

        def closure(x=x, y=y):
            maximised.zero_grad()
            value = -cross_entropy(other(x), y)
            value.backward()
            return value

        maximised.step(closure)
    assert same(list(model.state_dict().values()), list(other.state_dict().values()))


@pytest.mark.parametrize(
    "case", [c for c in gradient_ascents if c.name.partition("[")[0] not in ("FriendlySAM", "SAMON")], ids=str
)
def test_groups_of_both_kinds_take_each_its_own_way(case: Case):
    """max_ε over what descends, min_ε over what ascends: the perturbation of a saddle point's players."""
    model = mlp()
    first, second = list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]
    optimizer = case.build([{"params": first}, {"params": second, "maximize": True}], model=model, refresh_every=1000)
    batches = samples(model, 2)
    list(train(model, optimizer, batches[:1]))
    x, y = batches[1]
    weights = [p.detach().clone() for p in model.parameters()]
    shifts = []
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            loss = cross_entropy(model(x), y)
            loss.backward()
            if gradient_pass.first:
                grads = [p.grad.clone() for p in model.parameters()]
            shifts = [p.detach() - w for p, w in zip(model.parameters(), weights, strict=True)]
    signs = [1, 1, -1, -1, -1, -1]
    for shift, grad, sign in zip(shifts, grads, signs, strict=True):
        inner = float((shift * grad).sum())
        assert inner * sign > 0


class Words(nn.Module):
    """An embedding with sparse gradients, or not."""

    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(20, 6, sparse=sparse)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, words):
        return self.second(torch.relu(self.first(self.table(words).mean(1))))


@every_case
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_give_what_dense_ones_give(case: Case, momentum):
    if case.options.get("ascent") == "momentum" and momentum == 0.0:
        pytest.skip("needs a momentum")
    torch.manual_seed(0)
    dense = Words(False)
    sparse = Words(True)
    sparse.load_state_dict(dense.state_dict())
    stream = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 20, (8, 3), generator=stream), torch.randint(0, 4, (8,), generator=stream)) for _ in range(4)
    ]
    for model in (dense, sparse):
        group = ms_optim.scale_symmetries(dense, batches[0][0]) if case.rebalances else None
        optimizer = case.build(model, momentum=momentum, group=group)
        list(train(model, optimizer, batches))
    for a, b in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_case
def test_tied_weights_are_perturbed_once_and_restored(case: Case):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    torch.manual_seed(0)
    model = Tied()
    optimizer = case.build(model, lr=0.0, momentum=0.0, refresh_every=1000)
    batches = samples(mlp(), 4)
    list(train(model, optimizer, batches[:1]))
    before = [p.detach().clone() for p in model.parameters()]
    list(train(model, optimizer, batches))
    assert same(before, list(model.parameters()))
    assert model.second.weight is model.first.weight
    assert len(optimizer.parameters()) == 5
    optimizer.param_groups[0]["lr"] = 0.05
    list(train(model, optimizer, batches))
    assert not same(before, list(model.parameters()))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_restored_bit_for_bit_over_many_steps(case: Case, dtype):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    optimizer = case.build(model, lr=0.0, momentum=0.0, refresh_every=1000)
    batches = [(x.to(dtype), y) for x, y in samples(model, 50)]

    def steps(count):
        for x, y in batches[:count]:
            for gradient_pass in optimizer.passes():
                with gradient_pass:
                    cross_entropy(model(x).float(), y).backward()
            optimizer.step()

    steps(1)
    before = [p.detach().clone() for p in model.parameters()]
    steps(50)
    assert same(before, list(model.parameters()))
    assert all(p.dtype is dtype for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_low_precision_gradients_is_that_of_float32(dtype):
    """Summed in half precision the squares overflow at a norm of 256, and in bfloat16 three digits are left."""
    from ms_optim.optim.sam import ascent

    torch.manual_seed(0)
    grads = [torch.full((400,), 100.0).to(dtype), torch.randn(1000).to(dtype)]
    found = ascent(grads, [1.0, 0.5], [0.1, 0.1])
    wide = [g.double() for g in grads]
    norm = (wide[0].square().sum() + 0.5 * wide[1].square().sum()).sqrt()
    assert found.factors[0] == pytest.approx(0.1 / float(norm), rel=1e-6)
    assert found.factors[1] == pytest.approx(0.05 / float(norm), rel=1e-6)


class Gated(nn.Module):
    """Two branches, of which a call takes one."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.branch = "a"

    def forward(self, x):
        return getattr(self, self.branch)(torch.relu(self.first(x)))


# (Friendly SAM's direction is what a batch has beyond the average, which of a batch that comes twice is nothing.)
@pytest.mark.parametrize("case", [c for c in CASES if c.kind is not ms_optim.FriendlySAM], ids=str)
@pytest.mark.parametrize("branches", ["ab", "ba"])
def test_gradients_that_are_there_in_one_pass_only(case: Case, branches):
    torch.manual_seed(0)
    model = Gated()
    optimizer = case.build(model, rebalance=None, momentum=0.0)
    (x, y), *_ = samples(mlp(), 1)
    for _ in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
        for index, gradient_pass in enumerate(optimizer.passes()):
            model.branch = branches[index % 2]
            with gradient_pass:
                cross_entropy(model(x), y).backward()
        optimizer.step()
        assert same(list(before.values()), list(model.parameters()))
        optimizer.param_groups[0]["lr"] = lr
        last = branches[(case.passes - 1) % 2]
        for index, gradient_pass in enumerate(optimizer.passes()):
            model.branch = branches[index % 2]
            with gradient_pass:
                cross_entropy(model(x), y).backward()
        optimizer.step()
        assert not torch.equal(before["first.weight"], model.first.weight)
        if "antithetic" not in case.name:  # whose step is along the mean of both
            assert not torch.equal(before[f"{last}.weight"], getattr(model, last).weight)
        if case.passes == 2 and "noise" not in case.name:  # the other one took no part in the last pass
            other = branches[0]
            assert torch.equal(before[f"{other}.weight"], getattr(model, other).weight)


@every_case
def test_without_any_gradient_nothing_happens(case: Case):
    model = mlp()
    optimizer = case.build(model, rebalance=None)
    before = everything(model, optimizer)
    generator = optimizer.generator.get_state()
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            pass
    optimizer.step()
    optimizer.generator.set_state(generator)  # noise is drawn before it is known to be in vain
    assert same(before, everything(model, optimizer))


@every_case
def test_empty_groups_and_groups_filled_later(case: Case):
    model = mlp()
    other = copy.deepcopy(model)
    optimizer = case.build([{"params": []}, {"params": list(model.parameters())}], model=model)
    plain = case.build([{"params": list(other.parameters())}], model=other)
    batches = samples(model, 3)
    list(train(model, optimizer, batches))
    list(train(other, plain, batches))
    assert same(everything(model, optimizer), everything(other, plain))


def test_an_optimizer_of_no_parameters_at_all_takes_steps():
    optimizer = ms_optim.SAM([{"params": []}], lr=0.1)
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            pass
    optimizer.step()
    assert optimizer.steps == 1


@every_case
def test_parameters_frozen_within_a_pass_are_restored_too(case: Case):
    model = mlp()
    optimizer = case.build(model, rebalance=None, lr=0.0, momentum=0.0)
    (x, y), *_ = samples(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for index, gradient_pass in enumerate(optimizer.passes()):
        with gradient_pass:
            loss = cross_entropy(model(x), y)
            loss.backward()
            model[2].weight.requires_grad_(index > 0)
    optimizer.step()
    assert same(before, list(model.parameters()))


@every_case
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_reaches_the_weights_only_as_it_would_without_us(case: Case, value):
    """From the last pass it reaches the descent, as in torch; from a pass before it never does."""
    for bad in range(case.passes):
        shows_the_way = bad < case.passes - 1 and "noise" not in case.name
        torch.manual_seed(0)
        model = mlp()
        optimizer = case.build(model, rebalance=None)
        before = [p.detach().clone() for p in model.parameters()]
        (x, y), *_ = samples(model, 1)
        said = pytest.warns(NonFiniteWarning, match="not finite") if shows_the_way else contextlib.nullcontext()
        with said:
            for index, gradient_pass in enumerate(optimizer.passes()):
                with gradient_pass:
                    (cross_entropy(model(x), y) * (value if index == bad else 1.0)).backward()
        assert same(before, list(model.parameters()))
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters()) == shows_the_way
        assert not same(before, list(model.parameters()))


def test_of_two_optimizers_of_one_model_the_later_one_takes_the_loop():
    """A notebook's cell run twice: the optimizer that was built first must not perturb any more."""
    model = mlp()
    other = copy.deepcopy(model)
    old = ms_optim.MSRegularizedSGD(model, gradient="noise", strength=0.1, rebalance=None, lr=0.1)
    new, alone = (ms_optim.SAM(m, lr=0.1, momentum=0.9, ascent="momentum") for m in (model, other))
    for x, y in samples(model, 3):
        for each, optimizer in ((model, new), (other, alone)):
            optimizer.zero_grad()
            cross_entropy(each(x), y).backward()
            optimizer.step()
    assert same(everything(model, new), everything(other, alone))
    with pytest.raises(OptimizerError, match="no gradient passes to finish"):
        old.step()


def test_two_optimizers_of_different_parameters_take_the_same_loop():
    torch.manual_seed(0)
    model = mlp()
    halves = (list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()])
    optimizers = [ms_optim.SAM(half, lr=0.1, momentum=0.9, ascent="momentum", model=model) for half in halves]
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in samples(model, 3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
