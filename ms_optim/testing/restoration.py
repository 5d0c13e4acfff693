"""Restoration: whatever happens inside a step, the weights come back.

A perturbation is taken for a moment only.  Adding it and subtracting it again does not restore the weights in finite
precision; what is kept under another condition than it was taken is restored too often or never; and an exception
leaves between the two.  At lr=0 a step has nothing to do but restore, so that bits can be compared; where rounding is
not the matter, they are not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import networks
from .definition import settled
from .driver import Loss, Training, cross_entropy
from .law import applies, law, moved, require, require_close, require_equal
from .subject import Subject

DRIFT_STEPS = 200


class Planted(RuntimeError):
    """An exception that nobody else raises."""


class PlantedInterrupt(KeyboardInterrupt):
    """A keyboard interrupt that is not the user's."""


@law
def weights_are_restored_bitwise(subject: Subject) -> None:
    """At lr=0 a step leaves every weight as it was, bit for bit."""
    for network in (networks.mlp, networks.normalised):
        training, batches = settled(subject, network(), 3, lr=0.0)
        before = training.weights()
        training.run(batches)
        require_equal(training.weights(), before, "weight", "itself before steps at lr=0")


@law
def weights_keep_their_storage(subject: Subject) -> None:
    """A step leaves the weights in the memory where they were, which others may have an address of."""
    training, batches = settled(subject, networks.mlp(), 2)
    before = {name: p.data_ptr() for name, p in training.model.named_parameters()}
    training.run(batches)
    for name, p in training.model.named_parameters():
        require(p.data_ptr() == before[name], f"the storage of {name} is another one after a step; expected the same")


def _no_drift(subject: Subject, dtype: torch.dtype) -> None:
    """At lr=0, many steps in some precision leave every weight as it was."""
    model = networks.mlp().to(dtype)
    training, batches = settled(subject, model, 4, lr=0.0, keep=False)
    before = training.weights()
    for _ in range(DRIFT_STEPS // len(batches)):
        training.run(batches)
    for name, weight in training.weights().items():
        drift = (weight.double() - before[name].double()).norm() / before[name].double().norm()
        require(
            torch.equal(weight, before[name]),
            f"weight {name} in {dtype} is off by {drift:.2g} of its norm after {DRIFT_STEPS} steps at lr=0; expected 0",
        )


@law
def nothing_drifts_in_float32(subject: Subject) -> None:
    """At lr=0, 200 steps in float32 leave every weight as it was, bit for bit."""
    _no_drift(subject, torch.float32)


@law
def nothing_drifts_in_bfloat16(subject: Subject) -> None:
    """At lr=0, 200 steps in bfloat16 leave every weight as it was, bit for bit."""
    _no_drift(subject, torch.bfloat16)


def _after_an_exception(subject: Subject, error: type[BaseException]) -> None:
    """An exception in any evaluation leaves weights and buffers as before the step."""
    kind = "a keyboard interrupt" if issubclass(error, KeyboardInterrupt) else "an exception"
    for failing in range(subject.passes):
        training, batches = settled(subject, networks.normalised(), 3)
        training.run(batches[:1])
        weights, buffers, where = training.weights(), training.buffers(), f"evaluation {failing + 1} of a step"

        def fail(number: int, failing: int = failing) -> None:
            if number == failing:
                raise error("planted")

        try:
            training.step(batches[1], after=fail)
        except error:
            found, seen = training.weights(), training.buffers()
        else:
            require(False, f"{kind} in {where} did not reach the caller; expected it to")
        otherwise = f"itself before {kind} in {where}"
        require_equal(found, weights, "weight", otherwise)
        # A forward pass that is over has moved running statistics, in a plain loop as well: either is right.
        if moved(seen, buffers):
            clean = training.evaluations[0].buffers
            require_equal(seen, clean, "buffer", f"{otherwise}, and from that after evaluation 1,")
        training.step(batches[2])  # and it can still be used


@law
def an_exception_restores_the_model(subject: Subject) -> None:
    """After an exception in any evaluation weights and buffers are as before the step."""
    _after_an_exception(subject, Planted)


@law
def a_keyboard_interrupt_restores_the_model(subject: Subject) -> None:
    """After a keyboard interrupt in any evaluation weights and buffers are as before the step."""
    _after_an_exception(subject, PlantedInterrupt)


@law
def a_nan_in_the_first_gradient_poisons_nothing(subject: Subject) -> None:
    """A gradient that is NaN in the first evaluation only leaves finite weights."""
    applies(subject.passes > 1, "one evaluation: its gradient is that of the descent")
    applies(subject.last_gradient, "the first gradient is part of the descent")
    training, batches = settled(subject, networks.mlp(), 2)

    def poisoned(model: nn.Module, x: Tensor, y: Tensor, evaluation: int) -> Tensor:
        return cross_entropy(model, x, y, evaluation) * (float("nan") if evaluation == 0 else 1.0)

    training.step(batches[0], poisoned)
    training.step(batches[1])
    for name, weight in training.weights().items():
        bad = int((~torch.isfinite(weight)).sum())
        require(bad == 0, f"{bad} of {weight.numel()} entries of {name} are not finite; expected all to be")


@law
def no_gradients_change_nothing(subject: Subject) -> None:
    """A step in which no parameter has a gradient leaves the weights as they were."""
    training, batches = settled(subject, networks.mlp(), 1)
    before = training.weights()
    training.step(batches[0], lambda model, x, y, evaluation: cross_entropy(model, x, y, evaluation).detach())
    require_equal(training.weights(), before, "weight", "itself before a step without gradients")


def _gradient_in_one_evaluation(subject: Subject, taken: Callable[[int], bool]) -> None:
    """A branch that some evaluations leave out: at lr=0 its weights are as they were, then and afterwards."""
    applies(subject.passes > 1, "there is one evaluation a step")
    training, batches = settled(subject, networks.Branching(), 4, lr=0.0)
    before = training.weights()
    training.run(batches[:1])
    training.run(batches[1:3], _branching(taken))
    training.run(batches[3:])
    require_close(training.weights(), before, "weight", "itself before steps at lr=0")


def _branching(taken: Callable[[int], bool]) -> Loss:
    """The loss of the network with a branch, which is taken in some evaluations."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, evaluation: int) -> Tensor:
        return nn.functional.cross_entropy(model(x, taken(evaluation)), y)

    return loss


@law
def a_gradient_in_the_first_evaluation_only(subject: Subject) -> None:
    """A parameter with a gradient in the first evaluation only is restored."""
    _gradient_in_one_evaluation(subject, lambda evaluation: evaluation == 0)


@law
def a_gradient_in_later_evaluations_only(subject: Subject) -> None:
    """A parameter without a gradient in the first evaluation, from the first step on, does no harm."""
    applies(subject.passes > 1, "there is one evaluation a step")
    model = networks.Branching()
    batches = networks.batches(model, subject.settles + 4)
    training = Training(subject, model, lr=0.0)
    # A branch that no step has taken before: nothing was kept for it.
    training.run(batches[: subject.settles], _branching(lambda evaluation: False))
    before = training.weights()
    training.run(batches[subject.settles :], _branching(lambda evaluation: evaluation > 0))
    require_close(training.weights(), before, "weight", "itself before steps at lr=0")


@law
def a_parameter_frozen_midway_stays(subject: Subject) -> None:
    """A parameter that is frozen between two steps stays where it is."""
    training, batches = settled(subject, networks.mlp(), 5)
    training.run(batches[:2])
    frozen = dict(training.model.named_parameters())["2.weight"]
    frozen.requires_grad_(False)
    before = training.weights()
    training.run(batches[2:])
    found = training.weights()
    require_equal({"2.weight": found["2.weight"]}, {"2.weight": before["2.weight"]}, "frozen weight", "itself")
    require("0.weight" in moved(found, before), "no other weight moved; expected steps")
