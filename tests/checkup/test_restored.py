"""Doctor changes nothing: neither what the step sees, nor anything that is there afterwards, bit for bit."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.modules.module as module_hooks
from cases import CASES, convnet, samples
from checkup.loops import two_step
from checkup.optimizers import TwoStepSAM
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.checkup import doctor
from ms_optim.checkup.keeping import Kept

BASES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "AdamW[amsgrad, tensor lr]": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1), amsgrad=True),
    "Adam[fused]": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
    "two-step": lambda params: TwoStepSAM(params, torch.optim.AdamW, lr=0.1),
}
FAILURES = {"a healthy step": None, "an exception": RuntimeError, "a keyboard interrupt": KeyboardInterrupt}


def tensors_in(thing, found):
    if isinstance(thing, torch.Tensor):
        found.append(thing)
    elif isinstance(thing, dict):
        for key, value in thing.items():
            tensors_in(key, found) if isinstance(key, torch.Tensor) else None
            tensors_in(value, found)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            tensors_in(value, found)
    return found


def bits(tensor):
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.detach().reshape(-1).contiguous().numpy().tobytes())


def state_of(model, optimizer, scaler=None):
    """All that a step could change, in a form that can be compared."""
    held = [*model.parameters(), *model.buffers(), *tensors_in([optimizer.state_dict(), dict(optimizer.state)], [])]
    inner = [getattr(optimizer, name) for name in ("base", "base_optimizer") if hasattr(optimizer, name)]
    rates = [float(entry["lr"]) for each in [optimizer, *inner] for entry in each.param_groups]
    own = {}
    if isinstance(optimizer, ms_optim.SharpnessAware):
        held += [optimizer.generator.get_state().clone(), *(g for g in optimizer.kept if g is not None)]
        pieces = (optimizer, optimizer.representative, optimizer.observer, optimizer.ranks)
        own = {
            (index, key): value if isinstance(value, (int, float, str, bool)) else id(value)
            for index, piece in enumerate(pieces)
            for key, value in vars(piece).items()
        }
        own |= {"moved": len(optimizer.moved), "rescale hooks": len(optimizer.representative._hooks)}
    hooks = [
        [list(table) for key, table in vars(module).items() if key.endswith("_hooks") and table is not None]
        for module in model.modules()
    ]
    return {
        "tensors": [bits(t)[1:] for t in held],
        "weights": [bits(p) for p in [*model.parameters(), *model.buffers()]],
        "gradients": [None if p.grad is None else (id(p.grad), bits(p.grad)) for p in model.parameters()],
        "state": [sorted(map(str, optimizer.state.get(p, {}))) for p in model.parameters()],
        "rates": rates,
        "own": own,
        "attributes": sorted(vars(optimizer)),
        "modes": [module.training for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "hooks": hooks,
        "global hooks": [
            list(t)
            for n, t in sorted(vars(module_hooks).items())
            if n.startswith("_global_") and t != {} and isinstance(t, dict)
        ],
        "streams": (torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()),
        "scaler": None if scaler is None else (scaler.state_dict(), scaler._scale is None),
        "backward": torch.autograd.backward,
        "scale": torch.amp.GradScaler.scale,
    }


def closure_of(model, optimizer, batch, failure=None, failing=1):
    calls = [0]

    def closure():
        optimizer.zero_grad()
        random.random()
        np.random.rand()
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        calls[0] += 1
        if failure is not None and calls[0] > failing:
            raise failure("planted")
        return loss

    return closure


def run(model, optimizer, step, failure):
    if failure is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            doctor(model, optimizer, step)
    else:
        assert (doctor(model, optimizer, step).error is None) is (failure is None)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("warm", [0, 2], ids=["new", "trained"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_of_ours_is_as_before(case, warm, failure):
    model = convnet()
    optimizer = case.build(model)
    batches = samples(model, 4)
    for batch in batches[:warm]:
        optimizer.step(closure_of(model, optimizer, batch))
    error = FAILURES[failure]
    step = lambda: optimizer.step(closure_of(model, optimizer, batches[2], error, case.passes - 1))  # noqa: E731
    before, twin = state_of(model, optimizer), copy.deepcopy((model, optimizer))
    run(model, optimizer, step, error)
    assert state_of(model, optimizer) == before
    goes_on_alike((model, optimizer), twin, batches[2:])


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("warm", [0, 2], ids=["new", "trained"])
@pytest.mark.parametrize("base", BASES)
def test_everything_of_others_is_as_before(base, warm, failure):
    model = convnet()
    optimizer = BASES[base](model.parameters())
    batches = samples(model, 4)
    for batch in batches[:warm]:
        optimizer.step(closure_of(model, optimizer, batch))
    error = FAILURES[failure]
    failing = 1 if base == "two-step" else 0
    before = state_of(model, optimizer)
    run(model, optimizer, lambda: optimizer.step(closure_of(model, optimizer, batches[2], error, failing)), error)
    assert state_of(model, optimizer) == before


def goes_on_alike(pair, twin, batches):
    """Training goes on as if nobody had looked."""
    stream = torch.get_rng_state()
    found = []
    for model, optimizer in (pair, twin):
        torch.set_rng_state(stream)
        for batch in batches:
            optimizer.step(closure_of(model, optimizer, batch))
        found.append([t.detach().clone() for t in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_sees_what_it_would_see_without(case):
    model = convnet()
    optimizer = case.build(model)
    batch, seen = samples(model, 1)[0], []

    def step():
        closure = closure_of(model, optimizer, batch)

        def recorded():
            loss = closure()
            seen.append([loss.detach().clone(), *(p.grad.clone() for p in model.parameters()), torch.get_rng_state()])
            return loss

        optimizer.step(recorded)

    doctor(model, optimizer, step)
    watched, seen = seen, []
    step()
    assert len(watched) == len(seen) == case.passes
    for a, b in zip(watched, seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_under_autocast_too():
    loop = two_step(convnet, autocast="step")
    before = state_of(loop.model, loop.optimizer)
    assert not loop.examined()
    assert state_of(loop.model, loop.optimizer) == before


@pytest.mark.parametrize("autocast", ["step", "pass"])
def test_what_comes_after_a_pass_under_autocast_sees_what_it_would_see_without(autocast):
    loop = two_step(convnet, autocast=autocast)
    seen = []
    loop.model[0].register_forward_hook(lambda *_: seen.append("forward"))

    def step():
        loop.step()
        loop.model[0](torch.zeros(1, 1, 6, 6, dtype=torch.float32))
        seen.append(torch.rand(3).tolist())
        seen.append([p.grad.tolist() for p in loop.model.parameters()])
        seen.append([b.tolist() for b in loop.model.buffers()])

    doctor(loop.model, loop.optimizer, step)
    watched, seen[:] = list(seen), []
    step()
    assert watched == seen and seen.count("forward") == 3


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["a number", "a tensor"])
def test_a_loop_finds_its_learning_rate_after_the_descent(rate):
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batch, rates = samples(model, 1)[0], []

    def step():
        optimizer.step(closure_of(model, optimizer, batch))
        rates.append(optimizer.param_groups[0]["lr"])

    doctor(model, optimizer, step)
    assert rates[0] is rate


def test_a_model_that_is_found_is_lost_again():
    model = convnet()
    optimizer = ms_optim.MSSAM(model.parameters(), lr=0.1)
    twin = copy.deepcopy((model, optimizer))
    batches = samples(model, 3)
    before = state_of(model, optimizer)
    doctor(model, optimizer, lambda: optimizer.step(closure_of(model, optimizer, batches[0])))
    assert state_of(model, optimizer) == before and optimizer.looks_for_its_model
    goes_on_alike((model, optimizer), twin, batches)
    assert optimizer.model is model


@pytest.mark.parametrize("named", [True, False])
def test_a_scaler_is_as_before(named):
    model = convnet().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = samples(model, 1)[0]

    def step():
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(x.float()), y)).backward()
        scaler.step(optimizer)
        scaler.update(4.0)

    for _ in range(2):
        before = state_of(model, optimizer, scaler)
        assert doctor(model, optimizer, step, scaler=scaler if named else None).healthy
        assert state_of(model, optimizer, scaler) == before
        step()


def test_whatever_else_is_named_is_as_before():
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    batch = samples(model, 1)[0]

    def step():
        optimizer.step(closure_of(model, optimizer, batch))
        average.update_parameters(model)
        scheduler.step()

    step()
    before = state_of(model, optimizer), scheduler.state_dict(), state_of(average, optimizer)
    assert doctor(model, optimizer, step, others=[scheduler, average]).healthy
    assert (state_of(model, optimizer), scheduler.state_dict(), state_of(average, optimizer)) == before


def test_an_optimizer_that_shows_itself_is_as_before():
    model, other = convnet(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    second = torch.optim.Adam(other.parameters(), lr=0.1)
    batch = samples(model, 1)[0]
    other(torch.ones(3)).sum().backward()

    def step():
        second.step()
        optimizer.step(closure_of(model, optimizer, batch))

    before = state_of(other, second)
    assert doctor(model, optimizer, step).healthy
    assert state_of(other, second) == before


def test_modes_hooks_flags_and_storages_are_put_back():
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counted = nn.Parameter(torch.zeros(3))
    model.extra = [{"a": torch.zeros(2)}, np.zeros(2), {1, 2}]
    model.register_buffer("seen", torch.zeros(()))
    batch = samples(model, 1)[0]

    def step():
        optimizer.step(closure_of(model, optimizer, batch))
        model.eval()
        model[0].register_forward_hook(lambda *_: None)
        model[0].weight.requires_grad_(False)
        model[0].weight.data = model[0].weight.data.clone() + 1
        model.seen = torch.ones(())
        model.extra[0]["a"] += 1
        model.extra[1] += 1
        model.extra[2].add(3)
        model.extra.append(counted)
        optimizer.marked = True

    before = state_of(model, optimizer)
    seen = model.seen
    assert doctor(model, optimizer, step).error is None
    assert state_of(model, optimizer) == before
    assert model.seen is seen and len(model.extra) == 3
    assert not model.extra[0]["a"].any() and not model.extra[1].any() and model.extra[2] == {1, 2}


def test_negative_zeros_and_nans_are_put_back_as_they_were():
    tensor = torch.tensor([-0.0, float("nan"), 1.0])
    kept = Kept([tensor])
    before = bits(tensor)
    tensor.zero_()
    kept.restore()
    assert bits(tensor) == before


def test_hooks_of_what_has_died_meanwhile_are_not_brought_back():
    dead = ms_optim.SAM(convnet().parameters(), lr=0.1)
    alive = ms_optim.SAM(convnet().parameters(), lr=0.1)
    kept = Kept(alive)
    hooks = module_hooks._global_forward_pre_hooks
    keys = set(hooks)
    dead._binding.close()
    alive._binding.close()
    assert len(keys - set(hooks)) == 2
    kept.restore()
    assert len(keys - set(hooks)) == 1
