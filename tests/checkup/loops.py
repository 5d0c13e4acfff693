"""Training loops, each wrong in one way, and the same loop made right.

``LOOPS[rule]`` is a list of pairs of functions: a sick loop and its healthy twin.  Each builds everything anew and
returns what ``doctor`` is called with.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import convnet, mlp, samples
from checkup.optimizers import Downhill, ForgetfulSAM, Frozen, Restless, Scale, SubtractingSAM, TwoStepSAM
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim


@dataclass
class Loop:
    """What ``doctor`` is called with, and what there is beside it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Any
    options: dict[str, Any] = field(default_factory=dict)

    def examined(self):
        return ms_optim.checkup.doctor(self.model, self.optimizer, self.step, **self.options)


def two_step(
    network=mlp,
    kind=TwoStepSAM,
    autocast=None,
    zero=True,
    spoil=lambda loss, index: loss,
    between=lambda model: None,
    around=None,
    finish=True,
    batches=1,
    dtype=torch.float32,
    **options,
):
    """A loop of two forward and backward passes around a two-step SAM."""
    model = network().to(dtype)
    x, y = samples(plain(model), batches)[0]
    others = [samples(plain(model), batches)[-1]]
    optimizer = kind(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})

    def cast(where):  # no disabled block around: inside one, autocast's cache lives on as well
        return torch.autocast("cpu", torch.bfloat16) if autocast == where else contextlib.nullcontext()

    def evaluate(index):
        inputs, targets = (x, y) if index == 0 else others[0]
        with cast("pass"):
            loss = cross_entropy(model(inputs.to(dtype)).float(), targets)
        spoil(loss, index).backward()

    def step():
        optimizer.zero_grad()
        with cast("step"):
            evaluate(0)
            optimizer.first_step()
            if zero:
                optimizer.zero_grad()
            kept = [b.clone() for b in model.buffers()]
            stream = torch.get_rng_state()
            between(stream)
            evaluate(1)
            if around == "buffers":
                for b, value in zip(model.buffers(), kept, strict=True):
                    b.copy_(value)
        if finish:
            optimizer.second_step()
        else:
            optimizer.restore()

    return Loop(model, optimizer, step)


def masks(same):
    """Two passes with dropout, from the same random stream or not."""

    def build():
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        optimizer = TwoStepSAM(model.parameters(), lr=0.1)
        x, y = samples(model, 1)[0]

        def step():
            stream = torch.get_rng_state()
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.first_step()
            optimizer.zero_grad()
            if same:
                torch.set_rng_state(stream)
            cross_entropy(model(x), y).backward()
            optimizer.second_step()

        return Loop(model, optimizer, step)

    return build


def plain(model):
    """The sequential network inside."""
    while not isinstance(model, nn.Sequential):
        model = model.model
    return model


def ours(
    kind=ms_optim.SAM,
    network=mlp,
    prepare=lambda model, optimizer: None,
    call=lambda model, x: model(x),
    loss=cross_entropy,
    zero_first=True,
    given=lambda model: model,
    **options,
):
    """A closure around one of our optimizers."""
    model = network()
    x, y = samples(plain(model), 1)[0]
    optimizer = kind(given(model), lr=0.1, **options)
    prepare(model, optimizer)

    def closure():
        if zero_first:
            optimizer.zero_grad()
        found = loss(call(model, x), y)
        found.backward()
        return found

    return Loop(model, optimizer, lambda: optimizer.step(closure))


def single(
    kind=torch.optim.SGD,
    network=mlp,
    prepare=lambda model: None,
    after=lambda optimizer: optimizer.step(),
    zero=True,
    loss=cross_entropy,
    warm=False,
    parameters=lambda model: model.parameters(),
    **options,
):
    """An ordinary loop around an optimizer of torch."""
    model = network()
    prepare(model)
    x, y = samples(plain(model), 1)[0]
    optimizer = kind(parameters(model), **options)

    def step():
        if zero:
            optimizer.zero_grad()
        loss(model(x), y).backward()
        after(optimizer)

    if warm:
        cross_entropy(model(x), y).backward()
    return Loop(model, optimizer, step)


def scaled(how, kind=torch.optim.SGD, scale=2.0**10, named=False, network=mlp, spoil=1.0, **options):
    """A loop with a loss scale; ``how`` is what comes after the forward pass."""
    model = network().float()
    x, y = samples(model, 1)[0]
    optimizer = kind(model.parameters(), lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x.float()), y) * spoil
        scaler.scale(loss).backward()
        return loss

    def step():
        how(optimizer, scaler, closure, model)
        scaler.update()

    return Loop(model, optimizer, step, {"scaler": scaler} if named else {})


def positional(optimizer, scaler, closure, model):
    closure()
    scaler.step(optimizer, closure)


def unscaled(optimizer, scaler, closure, model):
    closure()
    scaler.step(optimizer)


def clipped_first(optimizer, scaler, closure, model):
    closure()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)


def unscaled_first(optimizer, scaler, closure, model):
    closure()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(optimizer)


def forgotten(optimizer, scaler, closure, model):
    closure()
    optimizer.step()


def two_step_scaled(optimizer, scaler, closure, model):
    closure()
    optimizer.first_step()
    closure()
    optimizer.restore()
    scaler.step(optimizer.base_optimizer)


def divided_by_hand(optimizer, scaler, closure, model):
    closure()
    for p in model.parameters():
        p.grad.div_(scaler.get_scale())
    optimizer.step()


def nan(first, second=False):
    return lambda loss, index: loss * (float("nan") if (first, second)[index] else 1.0)


def raises(loss, index):
    if index == 1:
        raise RuntimeError("planted")
    return loss


def freeze(model, optimizer=None):
    next(model.parameters()).requires_grad_(False)


def frozen_copy(fresh):
    return lambda: Frozen(mlp(), fresh)


def gelu():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


def twin(model):
    return copy.deepcopy(model)


def another(same):
    """Our optimizer with the parameters of one module and another as its model."""

    def build():
        model = mlp()
        x, y = samples(model, 1)[0]
        given = model if same else nn.ModuleList(model.children())
        optimizer = ms_optim.SAM(given, lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        return Loop(model, optimizer, lambda: optimizer.step(closure))

    return build


def driven(base):
    """Our optimizer, whose step is called or that of its base."""

    def build():
        loop = ours()
        model, optimizer = loop.model, loop.optimizer
        x, y = samples(model, 1)[0]

        def step():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.base.step()

        return Loop(model, optimizer, step) if base else loop

    return build


def unused_closure(optimizer):
    optimizer.first_step()
    optimizer.second_step()


def at_home(perturbed):
    """Two passes, with or without the ascent between them."""

    def build():
        return two_step(
            kind=TwoStepSAM if perturbed else type("Lazy", (TwoStepSAM,), {"first_step": lambda self: None})
        )

    return build


def same(build, **options):
    """A loop with some arguments."""
    return lambda: build(**options)


def tiny_bfloat16(rho):
    return same(two_step, dtype=torch.bfloat16, rho=rho)


def restored_statistics():
    return two_step(convnet_without_dropout, around="buffers")


def convnet_without_dropout():
    layers = [layer for layer in convnet() if not isinstance(layer, nn.Dropout)]
    return nn.Sequential(*layers)


def counted(reset):
    """The known trick against doubled statistics: momentum 0 in the second pass."""

    def build():
        loop = two_step(convnet_without_dropout, between=lambda stream: norm_off(loop.model, reset))
        return loop

    return build


def norm_off(model, reset):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
            module.track_running_stats = not reset


LOOPS = {
    "step_raised": [(same(two_step, spoil=raises), same(two_step))],
    "model_not_called": [(same(ours, call=lambda model, x: model.forward(x)), same(ours))],
    "another_model": [(another(same=False), another(same=True))],
    "evaluation_mode": [(same(single, prepare=lambda model: model.eval(), lr=0.1), same(single, lr=0.1))],
    "stale_autocast": [
        (same(two_step, autocast="step"), same(two_step, autocast="pass")),
        (
            same(two_step, autocast="step", network=convnet),
            same(two_step, autocast="step", between=lambda _: torch.clear_autocast_cache()),
        ),
    ],
    "perturbation_without_effect": [
        (same(two_step, network=frozen_copy(False)), same(two_step, network=frozen_copy(True))),
        (tiny_bfloat16(1e-4), tiny_bfloat16(0.5)),
    ],
    "no_perturbation": [
        (at_home(perturbed=False), at_home(perturbed=True)),
        (
            same(ours, loss=lambda z, y: cross_entropy(z, y) * float("nan")),
            same(ours),
        ),
        (same(ours, loss=lambda z, y: 0.0 * cross_entropy(z, y)), same(ours, rho=0.5)),
        (
            same(single, kind=TwoStepSAM, lr=0.1, after=lambda optimizer: optimizer.second_step()),
            same(single, kind=TwoStepSAM, lr=0.1, rho=0.0, after=lambda optimizer: optimizer.second_step()),
        ),
        (same(ours, ascent="previous"), same(ours, ascent="gradient")),
    ],
    "perturbation_left": [
        (same(two_step, kind=ForgetfulSAM), same(two_step)),
        (same(two_step, kind=SubtractingSAM), same(two_step, weight_decay=0.1)),
        (same(two_step, kind=SubtractingSAM, dtype=torch.bfloat16), same(two_step, dtype=torch.bfloat16)),
        (same(single, kind=Restless), same(single, kind=torch.optim.AdamW, lr=0.1)),
    ],
    "doubled_statistics": [
        (same(two_step, network=convnet), restored_statistics),
        (same(two_step, network=convnet), same(ours, network=convnet)),
        (same(two_step, network=convnet), same(ours, network=convnet, buffers="last")),
        (counted(reset=False), counted(reset=True)),
    ],
    "different_masks": [(masks(same=False), masks(same=True)), (masks(same=False), same(ours, network=convnet))],
    "different_inputs": [(same(two_step, batches=2), same(two_step))],
    "loss_fell": [(same(two_step, kind=Downhill), same(two_step))],
    "not_finite": [
        (same(two_step, spoil=nan(True)), same(two_step)),
        (same(two_step, spoil=nan(True), check=True), same(two_step, check=True)),
        (same(two_step, spoil=nan(False, True)), same(two_step)),
        (same(scaled, how=unscaled, spoil=1e38), same(scaled, how=unscaled)),
    ],
    "scaled_gradients": [
        (same(scaled, how=positional), same(scaled, how=unscaled)),
        (same(scaled, how=positional, kind=TwoStepSAM), same(scaled, how=two_step_scaled, kind=TwoStepSAM)),
        (same(scaled, how=forgotten, named=True), same(scaled, how=divided_by_hand, named=True)),
        (same(scaled, how=clipped_first), same(scaled, how=unscaled_first)),
        (
            same(scaled, how=forgotten, kind=torch.optim.AdamW),
            same(scaled, how=unscaled, kind=torch.optim.AdamW, fused=True),
        ),
    ],
    "added_gradients": [
        (same(two_step, zero=False), same(two_step)),
        (same(single, zero=False, warm=True, lr=0.1), same(single, warm=True, lr=0.1)),
    ],
    "without_gradient": [
        (same(single, network=lambda: Scale(mlp()), lr=0.1), same(single, lr=0.1)),
        (
            same(single, after=lambda optimizer: (optimizer.zero_grad(), optimizer.step()), lr=0.1),
            same(single, prepare=freeze, lr=0.1),
        ),
    ],
    "not_stepped": [
        (same(single, after=lambda optimizer: None, lr=0.1), same(single, lr=0.1)),
        (same(two_step, finish=False), same(two_step)),
        (driven(base=True), driven(base=False)),
        (same(single, after=lambda optimizer: (optimizer.step(), optimizer.step()), lr=0.1), same(single, lr=0.1)),
        (same(scaled, how=unscaled, spoil=1e38), same(scaled, how=unscaled)),
    ],
    "unowned_parameters": [
        (
            same(single, parameters=lambda model: list(model.parameters())[2:], lr=0.1),
            same(single, parameters=lambda model: list(model.parameters())[1:], prepare=freeze, lr=0.1),
        )
    ],
    "zero_radius": [
        (same(ours, rho=0.0), same(ours, rho=0.1)),
        (
            same(ours, given=lambda m: [{"params": m[0].parameters(), "rho": 0.0}, {"params": m[2:].parameters()}]),
            same(ours, given=lambda m: [{"params": m[0].parameters()}, {"params": m[2:].parameters()}]),
        ),
        (same(ours, kind=ms_optim.MSRegularizedSGD, strength=0.0), same(ours, kind=ms_optim.MSRegularizedSGD)),
    ],
    "window_closed": [(same(ours, start=5), same(ours, start=0, every=5))],
    "no_symmetry": [(same(ours, kind=ms_optim.MSSAM, network=gelu), same(ours, kind=ms_optim.MSSAM))],
    "fixed_parameters": [(same(ours, kind=ms_optim.MSSAM), same(ours, kind=ms_optim.SAM))],
    "said": [
        (
            same(
                ours,
                kind=ms_optim.MSSAM,
                prepare=lambda m, o: (
                    [p.requires_grad_(False) for p in m[0].parameters()]
                    + [p.requires_grad_(False) for p in m[4].parameters()]
                ),
            ),
            same(ours, kind=ms_optim.MSSAM),
        )
    ],
}

# Those that are notes: worth knowing, and no reason to stop.
NOTES = {
    ("evaluation_mode", 0),
    ("no_perturbation", 3),
    ("no_perturbation", 4),
    ("perturbation_left", 1),
    ("perturbation_left", 3),
    ("doubled_statistics", 3),
    ("different_masks", 0),
    ("different_masks", 1),
    ("different_inputs", 0),
    ("loss_fell", 0),
    ("not_finite", 3),
    ("scaled_gradients", 3),
    ("added_gradients", 1),
    ("without_gradient", 0),
    ("not_stepped", 3),
    ("not_stepped", 4),
    ("unowned_parameters", 0),
    ("zero_radius", 0),
    ("zero_radius", 1),
    ("zero_radius", 2),
    ("window_closed", 0),
    ("fixed_parameters", 0),
    ("said", 0),
}
