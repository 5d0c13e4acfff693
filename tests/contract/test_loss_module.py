"""SAM in an unmodified loop: a module whose forward returns the loss makes the first pass itself."""

import collections
import contextlib
import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from cases import CASES, Case, by_passes, convnet, descend, everything, mlp, same, samples, train
from contract.faults import WithLoss
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import OptimizerError, UnsupportedError

LOOSE = [c for c in CASES if c.passes == 2 and "noise" not in c.name]
two_passes = pytest.mark.parametrize("case", LOOSE, ids=str)
every_network = pytest.mark.parametrize("network", [mlp, convnet])


def loop(optimizer, module, batches, parts=1, around=contextlib.nullcontext, scaler=None):
    """An ordinary loop; the losses that it sees."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        for u, v in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with around():
                output = module(u, v)
            losses.append(output.item())
            loss = output / parts
            (loss if scaler is None else scaler.scale(loss)).backward()
        descend(optimizer, scaler)
    return losses


def attached(case, network, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = network().to(dtype)
    optimizer = case.build(model, **options)
    module = optimizer.attach(WithLoss(model))
    torch.manual_seed(1)
    return model, optimizer, module


def narrow(batches):
    return [(x.float(), y) for x, y in batches]


@two_passes
@every_network
@pytest.mark.parametrize("buffers", ["first", "last"])
def test_it_gives_the_bits_of_a_closure(case: Case, network, buffers):
    model, optimizer, module = attached(case, network, buffers=buffers)
    batches = samples(model, 5)
    losses = loop(optimizer, module, batches)
    torch.manual_seed(0)
    other = network()
    by_closure = case.build(other, buffers=buffers)
    torch.manual_seed(1)
    assert losses == [loss for loss, _ in train(other, by_closure, batches)]
    assert same(everything(model, optimizer), everything(other, by_closure))


@two_passes
def test_every_micro_batch_has_a_perturbation_of_its_own(case: Case):
    model, optimizer, module = attached(case, mlp, refresh_every=1000)
    batches = samples(model, 4)
    torch.manual_seed(0)
    other = mlp()
    explicit = case.build(other, refresh_every=1000, m=4)
    for each in (optimizer, explicit):
        if each.refresh_due:
            each.refresh(batches[0][0])
    loop(optimizer, module, batches, parts=2)
    for x, y in batches:
        for gradient_pass in explicit.passes(samples=8):
            with gradient_pass:
                cross_entropy(other(x[gradient_pass.samples]), y[gradient_pass.samples]).backward()
        explicit.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@two_passes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_gives_the_numbers_of_explicit_passes_in_mixed_precision(case: Case, dtype, scaled):
    def around():
        return torch.autocast("cpu", dtype=dtype)

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**12) if scaled else None

    model, optimizer, module = attached(case, mlp, torch.float32)
    batches = narrow(samples(model, 4))
    loop(optimizer, module, batches, around=around, scaler=scaler())
    torch.manual_seed(0)
    other = mlp().float()
    its = case.build(other)
    torch.manual_seed(1)
    by_passes(other, its, batches, inside=around, scaler=scaler())
    # In float16 the first gradient has a scale of its own here, so that small entries are rounded otherwise.
    rounding = 0.0 if dtype is torch.bfloat16 else 2e-3
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


# (RSAM's step is the longer, the smaller the gradient: here beyond all numbers.)
@pytest.mark.parametrize("case", [c for c in LOOSE if c.kind is not ms_optim.RSAM], ids=str)
def test_gradients_too_small_for_half_precision_still_show_the_way(case: Case):
    model, optimizer, module = attached(case, mlp, torch.float32, refresh_every=1000)
    batches = narrow(samples(model, 2))

    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return 1e-7 * cross_entropy(self.model(x), y)

    module = optimizer.attach(Faint())
    loop(optimizer, module, batches[:1])
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = module(*batches[1])
    assert not same(before, list(model.parameters()))
    loss.backward()
    assert same(before, list(model.parameters()))


@two_passes
def test_an_overflow_of_our_own_scale_is_not_warned_of_and_goes_away(case: Case):
    model, optimizer, _ = attached(case, mlp, torch.float32, refresh_every=1000)

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return 3e4 * cross_entropy(self.model(x), y)

    module = optimizer.attach(Loud())
    batches = narrow(samples(model, 20))
    perturbed = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches:
            optimizer.zero_grad()
            before = [p.detach().clone() for p in model.parameters()]
            with torch.autocast("cpu", dtype=torch.float16):
                loss = module(x, y)
            perturbed.append(not same(before, list(model.parameters())))
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
    assert perturbed[-1] and optimizer.loss_loop._scale < 2.0**16


@two_passes
@every_network
def test_the_loss_has_the_value_of_the_weights_and_the_gradient_of_the_perturbed_ones(case: Case, network):
    model, optimizer, module = attached(case, network, refresh_every=1000)
    batches = samples(model, 2)
    loop(optimizer, module, batches[:1])
    x, y = batches[1]
    optimizer.zero_grad()
    weights = [p.detach().clone() for p in model.parameters()]
    streams = torch.get_rng_state()
    clean = cross_entropy(copy.deepcopy(model)(x), y)
    torch.set_rng_state(streams)
    loss = module(x, y)
    shifted = [p.detach().clone() for p in model.parameters()]
    assert loss.item() == clean.item()
    assert not same(weights, shifted)
    loss.backward()
    assert same(weights, list(model.parameters()))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, w in zip(twin.parameters(), shifted, strict=True):
            p.copy_(w)
    torch.set_rng_state(streams)
    expected = torch.autograd.grad(cross_entropy(twin(x), y), list(twin.parameters()))
    assert same(list(expected), [p.grad for p in model.parameters()])


@two_passes
def test_evaluating_saving_and_copying_in_between_see_the_weights(case: Case):
    model, optimizer, module = attached(case, mlp, refresh_every=1000)
    batches = samples(model, 2)
    loop(optimizer, module, batches[:1])
    clean = [p.detach().clone() for p in model.parameters()]
    x, y = batches[1]
    looks = {
        "state_dict": lambda: list(model.state_dict().values()),
        "the module's": lambda: list(module.state_dict().values()),
        "evaluation": lambda: (model.eval()(x), model.train(), list(model.parameters()))[2],
        "no gradient": lambda: (torch.no_grad()(module)(x, y), list(model.parameters()))[1],
        "a copy of the optimizer": lambda: (copy.deepcopy(optimizer), list(model.parameters()))[1],
        "explicit passes": lambda: (next(optimizer.passes()), list(model.parameters()))[1],
    }
    for name, look in looks.items():
        module(x, y)  # and no backward pass
        assert not same(clean, list(model.parameters())), name
        assert same(clean, look()), name
        with pytest.raises(OptimizerError, match="no gradient passes to finish"):
            optimizer.step()
    loop(optimizer, module, [(x, y)])
    assert not same(clean, list(model.parameters()))


@two_passes
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_either_forward_pass_leaves_everything_as_before(case: Case, error, failing):
    torch.manual_seed(0)
    model = convnet()
    optimizer = case.build(model)
    calls = 0

    class Failing(WithLoss):
        def forward(self, x, y):
            nonlocal calls
            calls += 1
            loss = super().forward(x, y)
            if calls == failing:
                raise error("planted")
            return loss

    module = optimizer.attach(Failing(model))
    before, streams = everything(model, optimizer), torch.get_rng_state()
    (x, y), *_ = samples(model, 1)
    with pytest.raises(error, match="planted"):
        module(x, y)
    model.eval()(x)  # whatever comes next puts it back, where no hook was called
    assert same(before, everything(model, optimizer))
    assert torch.equal(streams, torch.get_rng_state())
    model.train()
    loop(optimizer, module, samples(model, 2))


@two_passes
def test_gradients_of_others_and_those_gathered_before_are_not_touched(case: Case):
    model, optimizer, module = attached(case, mlp, refresh_every=1000)
    batches = samples(model, 2)
    loop(optimizer, module, batches[:1])
    kept = [p.grad for p in model.parameters()]
    values = [grad.clone() for grad in kept]
    loss = module(*batches[1])
    assert all(p.grad is grad for p, grad in zip(model.parameters(), kept, strict=True))
    assert same(kept, values)
    loss.backward()
    assert not same(values, [p.grad for p in model.parameters()])


Named = collections.namedtuple("Named", ["loss", "logits"])


@dataclasses.dataclass
class Record:
    loss: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (lambda loss, logits: loss, lambda out: out),
        (lambda loss, logits: loss[None], lambda out: out[0]),
        (lambda loss, logits: (loss, logits), lambda out: out[0]),
        (lambda loss, logits: [loss, logits], lambda out: out[0]),
        (lambda loss, logits: {"loss": loss, "output": logits}, lambda out: out["loss"]),
        (lambda loss, logits: Named(loss, logits), lambda out: out.loss),
        (lambda loss, logits: Record(loss, logits), lambda out: out.loss),
    ],
)
def test_whatever_holds_the_loss_keeps_its_kind(wrap, read):
    class Module(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, *, y):
            logits = self.model(x)
            return wrap(cross_entropy(logits, y), logits)

    torch.manual_seed(0)
    model = mlp()
    other = copy.deepcopy(model)
    optimizer, by_closure = (ms_optim.SAM(m, lr=0.1, rho=0.2) for m in (model, other))
    module = optimizer.attach(Module(model))
    for x, y in samples(model, 3):
        optimizer.zero_grad()
        output = module(x, y=y)
        assert type(output) is type(wrap(torch.zeros(()), torch.zeros(())))
        read(output).backward()
        optimizer.step()
    list(train(other, by_closure, samples(other, 3)))
    assert same(everything(model, optimizer), everything(other, by_closure))


@pytest.mark.parametrize("output", [None, "loss", torch.zeros(3), {"output": 1}, (), {"loss": 2.0}])
def test_what_returns_no_loss_is_refused_and_changes_nothing(output):
    class Module(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            self.model(x)
            return output

    model = convnet()
    optimizer = ms_optim.SAM(model, lr=0.1)
    module = optimizer.attach(Module(model))
    before = everything(model, optimizer)
    with pytest.raises(OptimizerError, match="attached as a module whose training forward returns the loss"):
        module(*samples(model, 1)[0])
    assert same(before, everything(model, optimizer))


def test_a_module_without_the_parameters_is_refused():
    optimizer = ms_optim.SAM(mlp(), lr=0.1)
    with pytest.raises(OptimizerError, match="WithLoss lacks 6 of the optimizer's parameters"):
        optimizer.attach(WithLoss(mlp()))


@two_passes
def test_copies_go_their_own_ways(case: Case):
    model, optimizer, module = attached(case, mlp)
    batches = samples(model, 5)
    loop(optimizer, module, batches[:2])
    average = torch.optim.swa_utils.AveragedModel(module)
    before = everything(model, optimizer)
    average.train()(*batches[2]).backward()  # of the copy
    assert same(before, everything(model, optimizer))
    for duplicate in (copy.deepcopy, lambda triple: pickle.loads(pickle.dumps(triple))):
        its_module, twin, its_model = duplicate((module, optimizer, model))
        loop(twin, its_module, batches[2:])
        assert same(before, everything(model, optimizer))
        results = everything(its_model, twin)
    loop(optimizer, module, batches[2:])
    assert same(results, everything(model, optimizer))


@two_passes
def test_a_step_without_our_part_is_the_base_optimizers(case: Case):
    model, optimizer, module = attached(case, mlp, every=2, refresh_every=1000)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    loop(optimizer, module, samples(model, 4))
    assert len(calls) == 2 + 1 + 2 + 1


def test_a_plan_of_two_gradients_to_descend_along_cannot_be_taken():
    model = mlp()
    optimizer = ms_optim.MSRegularizedSGD(model, gradient="antithetic", rebalance=None)
    with pytest.raises(UnsupportedError, match="combination of the gradients of its passes"):
        optimizer.attach(WithLoss(model))


def test_a_teacher_inside_the_forward_pass_is_let_be():
    """The model's own evaluation-mode forward inside the loss sees the same weights, and does not restore them."""

    class Distilling(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            with torch.no_grad():
                teacher = self.model(x).softmax(1)
            return cross_entropy(self.model(x), teacher) + cross_entropy(self.model(x), y)

    torch.manual_seed(0)
    model = mlp()
    other = copy.deepcopy(model)
    optimizer, explicit = (ms_optim.SAM(m, lr=0.1, rho=0.2) for m in (model, other))
    module, its = optimizer.attach(Distilling(model)), Distilling(other)
    batches = samples(model, 3)
    loop(optimizer, module, batches)
    for x, y in batches:
        for gradient_pass in explicit.passes():
            with gradient_pass:
                its(x, y).backward()
        explicit.step()
    assert same(everything(model, optimizer), everything(other, explicit))


@two_passes
def test_activation_checkpointing_recomputes_at_the_perturbed_weights(case: Case):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            head, tail = self.model[:3], self.model[3:]
            return cross_entropy(tail(checkpoint(head, x, use_reentrant=False)), y)

    results = []
    for kind in (WithLoss, Checkpointed):
        torch.manual_seed(0)
        model = mlp()
        optimizer = case.build(model, refresh_every=1000)
        batches = samples(model, 3)
        if optimizer.refresh_due:
            optimizer.refresh(batches[0][0])
        loop(optimizer, optimizer.attach(kind(model)), batches)
        results.append(everything(model, optimizer))
    assert same(*results)
