"""A closure that a loop makes the passes of: where a module is attached, or a step of one pass has begun before."""

import copy
import gc

import pytest
import torch
from cases import CASES, Case, convnet, everything, mlp, same, samples, train
from contract.faults import WithLoss
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import LostGradientsWarning, OptimizerError

two_passes = pytest.mark.parametrize("case", [c for c in CASES if c.passes == 2 and "noise" not in c.name], ids=str)
one_pass = pytest.mark.parametrize("case", [c for c in CASES if c.passes == 1], ids=str)
loops = pytest.mark.parametrize("case", [c for c in CASES if "antithetic" not in c.name], ids=str)
every_network = pytest.mark.parametrize("network", [mlp, convnet])


def start(case, network=mlp, **options):
    """A model, its optimizer, and a module that returns the loss, attached for optimizers of two passes."""
    torch.manual_seed(0)
    model = network()
    optimizer = case.build(model, **options)
    module = WithLoss(model)
    if case.passes == 2:
        optimizer.attach(module)
    torch.manual_seed(1)
    return model, optimizer, module


class Closure:
    """Forward and backward of a batch; counts its calls."""

    def __init__(self, optimizer, module, x, y, zero=True, share=1.0):
        self.optimizer, self.module, self.batch = optimizer, module, (x, y)
        self.zero, self.share, self.calls = zero, share, 0

    def __call__(self):
        self.calls += 1
        if self.zero:
            self.optimizer.zero_grad()
        loss = self.module(*self.batch) * self.share
        loss.backward()
        return loss


def windows(optimizer, module, batches, parts, closures):
    """Steps of several batches: all but the last without the optimizer, the last by a closure or by hand."""
    for x, y in batches:
        shares = [
            Closure(optimizer, module, u, v, zero=i == 0, share=1 / parts)
            for i, (u, v) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True))
        ]
        for closure in shares[:-1]:
            closure()
        if closures:
            optimizer.step(shares[-1])
        else:
            shares[-1]()
            optimizer.step()


@two_passes
@every_network
@pytest.mark.parametrize("buffers", ["first", "last"])
def test_of_an_attached_module_it_is_called_once_and_gives_the_same_bits(case: Case, network, buffers):
    model, optimizer, module = start(case, network, buffers=buffers)
    batches = samples(model, 5)
    closures = [Closure(optimizer, module, *batch) for batch in batches]
    losses = [optimizer.step(closure).item() for closure in closures]
    assert [closure.calls for closure in closures] == [1] * 5
    torch.manual_seed(0)
    other = network()
    plain = case.build(other, buffers=buffers)
    torch.manual_seed(1)
    assert losses == [loss for loss, _ in train(other, plain, batches)]
    assert same(everything(model, optimizer), everything(other, plain))


@loops
@every_network
@pytest.mark.parametrize(
    "options",
    [{"refresh_every": 2}, {"every": 2, "refresh_every": 1}, {"start": 1, "end": 3}, {"buffers": "last"}],
    ids=str,
)
@pytest.mark.parametrize("parts", [2, 4])
def test_of_batches_that_share_a_step_it_brings_the_last(case: Case, network, options, parts):
    results = []
    for closures in (True, False):
        model, optimizer, module = start(case, network, **options)
        windows(optimizer, module, samples(model, 4), parts, closures)
        results.append((*everything(model, optimizer), torch.get_rng_state()))
    assert same(*results)


@loops
def test_evaluating_between_batches_that_share_a_step_is_as_in_a_loop(case: Case):
    results = []
    for closures in (True, False):
        model, optimizer, module = start(case)
        for x, y in samples(model, 3):
            Closure(optimizer, module, x[:4], y[:4])()
            model.eval()(x)
            model.train()
            last = Closure(optimizer, module, x[4:], y[4:], zero=False)
            if closures:
                optimizer.step(last)
            else:
                last()
                optimizer.step()
        results.append(everything(model, optimizer))
    assert same(*results)


@two_passes
def test_gradients_that_it_does_not_zero_are_added_to(case: Case):
    model, optimizer, module = start(case, refresh_every=1000)
    batches = samples(model, 2)
    optimizer.step(Closure(optimizer, module, *batches[0]))
    kept = [p.grad.clone() for p in model.parameters()]
    twin, its_optimizer, its_module = copy.deepcopy((model, optimizer, module))
    its_optimizer.step(Closure(its_optimizer, its_module, *batches[1]))
    optimizer.step(Closure(optimizer, module, *batches[1], zero=False))
    for before, p, q in zip(kept, model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, before + q.grad)


@two_passes
def test_clipping_at_its_end_acts_on_the_last_gradient_alone(case: Case):
    results = []
    for inside in (True, False):
        model, optimizer, module = start(case)
        for batch in samples(model, 3):
            closure = Closure(optimizer, module, *batch)

            def clipped(closure=closure, model=model):
                loss = closure()
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
                return loss

            if inside:
                optimizer.step(clipped)
            else:
                clipped()
                optimizer.step()
        results.append(everything(model, optimizer))
    assert same(*results)


class Broken(Closure):
    """Fails somewhere, after it has drawn numbers and moved buffers by a forward pass of its own."""

    def __init__(self, where, *args, error=RuntimeError, **options):
        super().__init__(*args, **options)
        self.where, self.error = where, error

    def _fail(self, *_):
        raise self.error("planted")

    def __call__(self):
        torch.rand(3)
        if self.where == "before":
            self.module.model(self.batch[0])
            self._fail()
        if self.zero:
            self.optimizer.zero_grad()
        handles = []
        if self.where == "in the forward pass":
            handles = [self.module.model[-1].register_forward_hook(self._fail)]
        try:
            loss = self.module(*self.batch)
        finally:
            for handle in handles:
                handle.remove()
        if self.where == "between":
            self._fail()
        if self.where == "in the backward pass":
            next(self.module.model.parameters()).register_hook(self._fail)
        loss.backward()
        self._fail()


PLACES = ["before", "in the forward pass", "between", "in the backward pass", "after"]


@two_passes
@every_network
@pytest.mark.parametrize(("steps", "error"), [(0, RuntimeError), (1, KeyboardInterrupt)])
@pytest.mark.parametrize("where", PLACES)
def test_a_failure_leaves_everything_as_before_the_call(case: Case, network, steps, where, error):
    model, optimizer, module = start(case, network)
    batches = samples(model, 3)
    for batch in batches[:steps]:
        optimizer.step(Closure(optimizer, module, *batch))
    twins = copy.deepcopy((model, optimizer, module))
    before, streams = everything(model, optimizer), torch.get_rng_state()
    weights = [p.detach().clone() for p in model.parameters()]
    balance, due = optimizer.balance, optimizer.representative.due
    with pytest.raises(error, match="planted"):
        optimizer.step(Broken(where, optimizer, module, *batches[steps], error=error))
    assert same(weights, list(model.parameters()))  # before anybody looks, which would restore them
    assert same(before, everything(model, optimizer))
    assert torch.equal(streams, torch.get_rng_state())
    assert optimizer.balance is balance and optimizer.representative.due == due and optimizer.steps == steps
    for p in model.parameters():
        p._backward_hooks = None
    for batch in batches[steps:]:  # as if nothing had happened
        optimizer.step(Closure(optimizer, module, *batch))
    torch.set_rng_state(streams)
    its_model, its_optimizer, its_module = twins
    for batch in batches[steps:]:
        its_optimizer.step(Closure(its_optimizer, its_module, *batch))
    assert same(everything(model, optimizer), everything(its_model, its_optimizer))


@one_pass
@every_network
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("where", PLACES)
def test_a_failure_undoes_the_step_that_earlier_batches_had_begun(case: Case, network, steps, where):
    model, optimizer, module = start(case, network)
    batches = samples(model, 2)
    windows(optimizer, module, batches[:steps], 2, True)
    weights = [p.detach().clone() for p in model.parameters()]
    before, streams = everything(model, optimizer), torch.get_rng_state()
    x, y = batches[1]
    Closure(optimizer, module, x[:4], y[:4])()
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(Broken(where, optimizer, module, x[4:], y[4:], zero=False))
    assert same(weights, list(model.parameters()))  # before anybody looks, which would restore them
    assert same(before, everything(model, optimizer))
    assert torch.equal(streams, torch.get_rng_state())


@two_passes
@pytest.mark.parametrize("where", PLACES)
def test_a_failure_in_the_last_batch_of_several_leaves_what_the_first_left(case: Case, where):
    model, optimizer, module = start(case, convnet)
    x, y = samples(model, 1)[0]
    Closure(optimizer, module, x[:4], y[:4])()
    before, streams = everything(model, optimizer), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(Broken(where, optimizer, module, x[4:], y[4:], zero=False))
    assert same(before, everything(model, optimizer))
    assert torch.equal(streams, torch.get_rng_state())


def test_averages_are_told_when_a_rescaling_is_undone_that_was_batches_ago():
    model, optimizer, module = start(Case("MSSAM", ms_optim.MSSAM, 2, {}, {"rho": 0.1, "columns": None}))
    told = []
    optimizer.register_rescale_hook(lambda group, t: told.append(t))
    before = everything(model, optimizer)
    x, y = samples(model, 1)[0]

    def several():
        for part in range(2):
            module(x[part::2], y[part::2]).backward()
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(several)
    assert len(told) == 2 and torch.equal(told[0], -told[1])
    assert same(before, everything(model, optimizer))


@two_passes
@every_network
@pytest.mark.parametrize("how", ["the model inside", "evaluation", "no gradient", "a copy"])
def test_where_it_does_not_call_the_attached_module_nothing_is_lost(case: Case, network, how):
    model, optimizer, module = start(case, network)
    x, y = samples(model, 1)[0]
    other = copy.deepcopy(module)

    def closure():
        optimizer.zero_grad()
        if how == "evaluation":
            module.eval()
            loss = module(x, y)
            module.train()
        elif how == "no gradient":
            with torch.no_grad():
                return module(x, y)
        else:
            loss = cross_entropy(model(x), y) if how == "the model inside" else other(x, y)
        loss.backward()
        return loss

    before, streams = everything(model, optimizer), torch.get_rng_state()
    with pytest.raises(OptimizerError, match=r"attached to a WithLoss.*did not call that module in training mode"):
        optimizer.step(closure)
    assert same(before, everything(model, optimizer))
    assert torch.equal(streams, torch.get_rng_state()) and optimizer.steps == 0
    optimizer.step(Closure(optimizer, module, x, y))
    assert not same(before, everything(model, optimizer))


@two_passes
def test_a_forward_pass_without_a_backward_pass_is_refused_and_nothing_is_lost(case: Case):
    model, optimizer, module = start(case, convnet)
    x, y = samples(model, 1)[0]
    before, streams = everything(model, optimizer), torch.get_rng_state()
    with pytest.raises(OptimizerError, match="of the attached WithLoss that no backward pass followed"):
        optimizer.step(lambda: module(x, y))
    assert same(before, everything(model, optimizer))
    assert torch.equal(streams, torch.get_rng_state())


@two_passes
@pytest.mark.parametrize("looks", [False, True])
def test_a_batch_that_is_passed_over_is_a_step_without_gradients(case: Case, looks):
    model, optimizer, module = start(case, convnet)
    batches = samples(model, 2)
    before = everything(model, optimizer)

    def nothing():
        optimizer.zero_grad()
        if looks:
            module(*batches[0])

    assert optimizer.step(nothing) is None and optimizer.steps == 1
    assert same(before, everything(model, optimizer))
    optimizer.step(Closure(optimizer, module, *batches[1]))
    assert not same(before, everything(model, optimizer))


@two_passes
@every_network
def test_an_earlier_forward_pass_without_a_backward_pass_is_undone_first(case: Case, network):
    model, optimizer, module = start(case, network)
    twin, its_optimizer, its_module = copy.deepcopy((model, optimizer, module))
    for batch in samples(model, 2):
        before, streams = everything(model, optimizer), torch.get_rng_state()
        module(*batch)
        with pytest.raises(RuntimeError, match="planted"):
            optimizer.step(Broken("before", optimizer, module, *batch))
        assert same(before, everything(model, optimizer)) and torch.equal(streams, torch.get_rng_state())
        module(*batch)
        optimizer.step(Closure(optimizer, module, *batch))
        torch.set_rng_state(streams)
        its_optimizer.step(Closure(its_optimizer, its_module, *batch))
    assert same(everything(model, optimizer), everything(twin, its_optimizer))


@two_passes
def test_after_explicit_passes_it_begins_anew_and_inside_one_it_is_refused(case: Case):
    model, optimizer, module = start(case, mlp, refresh_every=1000)
    twin, its_optimizer, its_module = copy.deepcopy((model, optimizer, module))
    first, second = samples(model, 2)
    optimizer.step(Closure(optimizer, module, *first))
    its_optimizer.step(Closure(its_optimizer, its_module, *first))
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            module(*first).backward()
    optimizer.step(Closure(optimizer, module, *second))
    its_optimizer.step(Closure(its_optimizer, its_module, *second))
    assert same(everything(model, optimizer), everything(twin, its_optimizer))
    with next(optimizer.passes()), pytest.raises(OptimizerError, match="was called inside a gradient pass"):
        optimizer.step(Closure(optimizer, module, *second))


def test_a_refresh_inside_is_refused_and_nothing_is_lost():
    model, optimizer, module = start(Case("MSSAM", ms_optim.MSSAM, 2, {}, {"rho": 0.1}))
    x, y = samples(model, 1)[0]
    before = everything(model, optimizer)

    def closure():
        optimizer.refresh(x)
        return Closure(optimizer, module, x, y)()

    with pytest.raises(OptimizerError, match="refresh was called inside a gradient pass or a closure"):
        optimizer.step(closure)
    assert same(before, everything(model, optimizer))


def test_given_the_number_of_samples_it_is_called_in_every_pass():
    model = mlp()
    optimizer = ms_optim.SAM(model, lr=0.1)
    module = optimizer.attach(WithLoss(model))
    x, y = samples(model, 1)[0]
    calls = []

    def closure(part):
        calls.append(part)
        loss = module(x[part], y[part])
        loss.backward()
        return loss

    assert optimizer.step(closure, samples=8).item() == pytest.approx(cross_entropy(model(x), y).item(), rel=0.5)
    assert calls == [slice(None)] * 2


def test_of_a_superseded_optimizer_it_is_called_in_every_pass():
    torch.manual_seed(0)
    model = mlp()
    other = copy.deepcopy(model)
    module = WithLoss(model)
    older, newer = (ms_optim.SAM(model, lr=0.1, rho=0.2) for _ in range(2))
    older.attach(module)
    newer.attach(module)
    assert not older.loss_loop.attached and newer.loss_loop.attached
    assert older.loss_module is None and newer.loss_module is module
    plain = ms_optim.SAM(other, lr=0.1, rho=0.2)
    for x, y in samples(model, 3):
        for optimizer, network in ((older, model), (plain, other)):

            def closure(optimizer=optimizer, network=network, x=x, y=y):
                optimizer.zero_grad()
                loss = cross_entropy(network(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert same(everything(model, older), everything(other, plain))
    its_module, its_older, its_newer = copy.deepcopy((module, older, newer))
    assert its_newer.loss_loop.attached and its_newer.loss_module is its_module
    assert not its_older.loss_loop.attached


def test_two_optimizers_of_different_parameters_of_one_loss_module_are_refused():
    model = mlp()
    parameters = list(model.parameters())
    module = WithLoss(model)
    first = ms_optim.SAM(parameters[:2], model=model, lr=0.1)
    second = ms_optim.SAM(parameters[2:], model=model, lr=0.1)
    first.attach(module)
    first.attach(module)  # once more is no other
    with pytest.raises(OptimizerError, match="another SAM, of other parameters, is attached to this WithLoss"):
        second.attach(module)
    assert first.loss_loop.attached and not second.loss_loop.attached and second.loss_module is None
    first.step(Closure(first, module, *samples(model, 1)[0]))
    del first
    gc.collect()
    second.attach(module)
    second.step(Closure(second, module, *samples(model, 1)[0]))


def test_an_optimizer_of_one_pass_beside_an_attached_one_takes_its_own():
    """Each perturbs its own parameters, and the gradients are those at both perturbations."""
    torch.manual_seed(0)
    model = mlp()
    parameters = list(model.parameters())
    sam = ms_optim.SAM(parameters[:2], model=model, lr=0.1, rho=0.2)
    momentum = ms_optim.SAM(parameters[2:], model=model, lr=0.1, rho=0.2, ascent="momentum", momentum=0.9)
    module = WithLoss(model)
    sam.attach(module)
    for optimizer in (sam, momentum):
        optimizer.attach(module)
    for x, y in samples(model, 3):
        twin = copy.deepcopy(model)
        along = [torch.zeros(()) if m is None else m for m in momentum.momentum()]
        _move(list(twin.parameters())[2:], along, -0.2)
        first = torch.autograd.grad(cross_entropy(twin(x), y), list(twin.parameters())[:2])
        _move(list(twin.parameters())[:2], first, 0.2)
        expected = torch.autograd.grad(cross_entropy(twin(x), y), list(twin.parameters()))
        for optimizer in (sam, momentum):
            optimizer.zero_grad()
        module(x, y).backward()
        for p, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        sam.step()
        momentum.step()


def _move(weights, direction, distance):
    """Move weights by so much along a direction."""
    norm = torch.stack([d.square().sum() for d in direction]).sum().sqrt()
    with torch.no_grad():
        for p, d in zip(weights, direction, strict=True):
            p += distance * d / norm if norm > 0 else 0.0


@two_passes
def test_gradients_taken_before_a_closure_of_several_passes_are_not_lost_in_silence(case: Case):
    torch.manual_seed(0)
    model = mlp()
    optimizer = case.build(model)
    module = WithLoss(model)
    for x, y in samples(model, 2):
        Closure(optimizer, module, x[:4], y[:4])()
        with pytest.warns(LostGradientsWarning, match="gradients were taken since the last step"):
            optimizer.step(Closure(optimizer, module, x[4:], y[4:], zero=False))
        Closure(optimizer, module, x, y)()
        optimizer.step(Closure(optimizer, module, x, y))  # which does not want them
        module(x, y)  # takes none
        optimizer.step(Closure(optimizer, module, x, y, zero=False))


@two_passes
def test_where_that_warning_is_an_error_nothing_is_lost(case: Case):
    model, optimizer, module = start(case, convnet)
    optimizer.loss_loop.detach()
    x, y = samples(model, 1)[0]
    Closure(optimizer, module, x[:4], y[:4])()
    before, streams = everything(model, optimizer), torch.get_rng_state()
    with pytest.raises(LostGradientsWarning):
        optimizer.step(Closure(optimizer, module, x[4:], y[4:], zero=False))
    assert same(before, everything(model, optimizer))
    assert torch.equal(streams, torch.get_rng_state())


@loops
def test_through_a_scaler_it_is_refused_as_ever(case: Case):
    model, optimizer, module = start(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    x, y = samples(model, 1)[0]
    scaler.scale(module(x, y)).backward()
    with pytest.raises(OptimizerError, match="a closure was passed through GradScaler.step"):
        scaler.step(optimizer, Closure(optimizer, module, x, y))


@two_passes
def test_diagnostics_are_those_of_a_loop(case: Case):
    found = []
    for closures in (True, False):
        model, optimizer, module = start(case, diagnose=True)
        windows(optimizer, module, samples(model, 2), 1, closures)
        found.append(optimizer.diagnostics)
    assert str(found[0]) == str(found[1]) and found[0].norm > 0
