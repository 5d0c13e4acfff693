"""Definition: what makes a step sharpness-aware, and what is left of it when its own part is switched off.

The perturbation goes where the loss rises fastest, its length is ρ, and the descent follows the gradient found there
(arXiv 2010.01412, eq. 2 and 3).  Without a perturbation there is the base optimizer, down to the last bit, and its side
effects: running statistics and random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import networks
from .driver import Training, base_options, copies, cross_entropy
from .law import applies, law, require, require_close, require_equal, stepped
from .subject import Subject

STEPS = 4
NORM_TOLERANCE = 1e-6  # a norm that is summed in float32 is right


def settled(subject: Subject, model: nn.Module, count: int, **options: Any) -> tuple[Training, list[networks.Batch]]:
    """A training after the steps that a subject needs before laws of a single step hold, and batches for more.

    Args:
        subject: The subject.
        model: The model.
        count: The number of batches.
        **options: Of the training.

    Returns:
        The training and the batches.
    """
    batches = networks.batches(model, subject.settles + count)
    training = Training(subject, model, **options).run(batches[: subject.settles])
    return training, batches[subject.settles :]


def _against_the_base(subject: Subject, network: Callable[[], nn.Module], what: str) -> None:
    """Train with the own part off and with the base optimizer alone; compare weights, buffers or streams."""
    applies(subject.off is not None, "no option switches its own part off")
    applies(bool(subject.bases), "there is no base optimizer")
    for base in subject.bases:
        torch.default_generator.manual_seed(0)
        model, twin = network(), network()
        twin.load_state_dict(model.state_dict())
        batches = networks.batches(model, STEPS)
        plain = base(twin.parameters(), **base_options(subject, base))
        torch.default_generator.manual_seed(1)
        for x, y in batches:
            plain.zero_grad()
            cross_entropy(twin, x, y, 0).backward()
            plain.step()
        stream = torch.get_rng_state()
        torch.default_generator.manual_seed(1)
        training = Training(subject, model, base, off=True).run(batches)
        other = f"that of torch.optim.{base.__name__} alone after {STEPS} steps"
        if what == "weights":
            require_equal(training.weights(), copies(dict(twin.named_parameters())), "weight", other)
        elif what == "buffers":
            require_equal(training.buffers(), copies(dict(twin.named_buffers())), "buffer", other)
        else:
            same = torch.equal(stream, torch.get_rng_state())
            require(same, f"the random stream is not {other}; expected as many numbers drawn as in one pass a step")


@law
def off_is_the_base_optimizer_on_weights(subject: Subject) -> None:
    """With its own part off, the weights are those of the base optimizer alone, bit for bit."""
    _against_the_base(subject, networks.mlp, "weights")


@law
def off_is_the_base_optimizer_on_buffers(subject: Subject) -> None:
    """With its own part off, the buffers (running statistics, batch counts) are those of the base optimizer alone."""
    _against_the_base(subject, networks.normalised, "buffers")


@law
def off_is_the_base_optimizer_on_random_streams(subject: Subject) -> None:
    """With its own part off, a step draws the random numbers that a step of the base optimizer draws."""
    _against_the_base(subject, networks.masked, "streams")


@law
def a_closure_is_enough(subject: Subject) -> None:
    """``step(closure)`` needs nothing beside it, and is a step."""
    other = Training(subject, networks.mlp())
    model = networks.mlp()
    model.load_state_dict(other.model.state_dict())
    training = Training(subject, model)
    applies(training.optimizer is training.built, f"{type(training.built).__name__} is no torch.optim.Optimizer")
    batches = networks.batches(model, 2)
    other.run(batches, seed=1)
    torch.default_generator.manual_seed(1)
    for batch in batches:
        for p in model.parameters():
            p.grad = None
        training.optimizer.step(training.closure(batch))  # type: ignore[arg-type]
    require_equal(training.weights(), other.weights(), "weight", "that of the documented way to drive a step")


@law
def a_step_returns_the_loss(subject: Subject) -> None:
    """A step returns the loss of its first evaluation."""
    training, batches = settled(subject, networks.mlp(), 2)
    for batch in batches:
        returned = training.step(batch)
        expected = training.evaluations[0].loss
        found = float(returned) if isinstance(returned, Tensor | float) else returned
        require(found == expected, f"step returned {found!r}; expected the loss of the first evaluation, {expected}")


@law
def a_step_evaluates_as_often_as_it_says(subject: Subject) -> None:
    """A step evaluates the closure as many times as is said of it."""
    training, batches = settled(subject, networks.mlp(), 2)
    for batch in batches:
        training.step(batch)
        found = len(training.evaluations)
        require(found == subject.passes, f"a step called the closure {found} times; expected {subject.passes}")


@law
def the_perturbation_has_norm_rho(subject: Subject) -> None:
    """‖w′ − w‖ = ρ in the method's norm, where w′ are the weights of the perturbed evaluation."""
    applies(subject.norm is not None and subject.ascent is not None, "its perturbation has no length ρ")
    training, batches = settled(subject, networks.mlp(), 3)
    for batch in batches:
        before, perturbation = _perturbation(training, batch)
        assert subject.norm is not None
        found = subject.norm(training.built, before, perturbation)
        error = abs(found - subject.radius)
        right = error <= NORM_TOLERANCE * subject.radius
        require(right, f"the perturbation has norm {found:.10g}; expected rho={subject.radius}")


@law
def the_ascent_is_the_steepest(subject: Subject) -> None:
    """No other perturbation of the same norm, near the one that was taken, raises the loss faster."""
    applies(subject.norm is not None, "its perturbation has no length ρ")
    applies(subject.ascent == 1, "its perturbation is not along the gradient of the same step")
    training, batches = settled(subject, networks.mlp(), 3)
    stream = torch.Generator().manual_seed(0)
    for batch in batches:
        before, e = _perturbation(training, batch)
        assert subject.norm is not None
        grads, length = training.evaluations[0].grads, subject.norm(training.built, before, e)
        require(length > 0, "the weights of the second evaluation are those of the first; expected a perturbation")
        slope = sum(float((grads[name] * e[name]).sum()) for name in e)
        require(slope > 0, f"the loss changes along the perturbation at the rate {slope:.3g}; expected it to rise")
        root = (sum(float(x.square().sum()) for x in e.values()) / sum(x.numel() for x in e.values())) ** 0.5
        for attempt in range(40):
            # In proportion to each entry, since norms may weigh entries; or alike in all, since some may be left out.
            sizes = {name: x.abs() if attempt % 2 else torch.full_like(x, root) for name, x in e.items()}
            drawn = {name: torch.randn(x.shape, generator=stream) for name, x in e.items()}
            other = {name: x + 0.1 * sizes[name] * drawn[name] for name, x in e.items()}
            scale = length / subject.norm(training.built, before, other)
            rate = scale * sum(float((grads[name] * other[name]).sum()) for name in e)
            require(
                rate <= slope * (1 + 1e-9),
                f"the loss rises at the rate {slope:.6g} along the perturbation and at {rate:.6g} along another of the "
                "same norm; expected the steepest ascent",
            )


@law
def the_ascent_raises_the_loss(subject: Subject) -> None:
    """The loss of the perturbed evaluation is above that of the first."""
    applies(subject.ascent == 1, "its perturbation is not along the gradient of the same step")
    training, batches = settled(subject, networks.mlp(), STEPS)
    for batch in batches:
        training.step(batch)
        first, second = (evaluation.loss for evaluation in training.evaluations[:2])
        require(second > first, f"the loss is {first:.6g} before and {second:.6g} after the ascent; expected more")


@law
def the_descent_is_along_the_last_gradient(subject: Subject) -> None:
    """Around SGD, w moves by −lr times the gradient of the last evaluation (and its momentum)."""
    applies(subject.last_gradient, "its descent is not along the gradient of the last evaluation alone")
    applies(subject.bases[:1] == (torch.optim.SGD,), "its base optimizer is not SGD")
    training, batches = settled(subject, networks.mlp(), 2)
    options = base_options(subject, torch.optim.SGD)
    a = training.weights()
    b = training.run(batches[:1]).weights()
    c = training.run(batches[1:]).weights()
    grads = training.evaluations[-1].grads
    # With momentum μ: c − b = μ (b − a) − lr g, whatever came before.
    expected = {name: b[name] + options["momentum"] * (b[name] - a[name]) - options["lr"] * grads[name] for name in a}
    require_close(c, expected, "weight", "w - lr * (gradient of the last evaluation)")


@law
def maximize_is_the_negated_loss(subject: Subject) -> None:
    """``maximize=True`` does to L what minimisation does to −L."""
    model = networks.mlp()
    twin = networks.mlp()
    twin.load_state_dict(model.state_dict())
    batches = networks.batches(model, STEPS)
    before = copies(dict(model.named_parameters()))
    up = Training(subject, model, maximize=True).run(batches, seed=1)
    down = Training(subject, twin).run(batches, lambda *args: -cross_entropy(*args), seed=1)
    require(bool(stepped(up.weights(), before)), "no weight moved under maximize=True; expected steps")
    require_close(up.weights(), down.weights(), "weight", "that of minimising the negated loss")


def _perturbation(training: Training, batch: networks.Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step: the weights before it, and what its perturbed evaluation saw on top of them."""
    before, ascent = training.weights(), training.subject.ascent
    training.step(batch)
    assert ascent is not None
    require(
        len(training.evaluations) > ascent,
        f"a step called the closure {len(training.evaluations)} times; expected the perturbation in call {ascent + 1}",
    )
    seen = training.evaluations[ascent].weights
    return before, {name: seen[name] - before[name] for name in before}
