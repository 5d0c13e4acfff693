"""Surroundings: what a training loop puts around an optimizer goes on working.

Hooks, schedulers, dropout, running statistics, autocast and loss scaling are written for optimizers that evaluate the
gradient once.  Each has its own way of going wrong without a word when it is evaluated twice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import networks
from .definition import settled
from .driver import Training
from .law import applies, law, moved, require, require_close, require_equal, stepped
from .subject import Subject

SCALE = 2.0**10  # a power of two changes no digit of a gradient


@law
def step_hooks_fire_once(subject: Subject) -> None:
    """Hooks before and after a step are called once a step."""
    training, batches = settled(subject, networks.mlp(), 2)
    fired: list[str] = []
    training.optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    training.optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    training.run(batches)
    require(fired == ["pre", "post"] * 2, f"hooks were called as {fired} in two steps; expected {['pre', 'post'] * 2}")


@law
def a_scheduler_drives_the_descent(subject: Subject) -> None:
    """A learning-rate scheduler of torch reaches the descent, and has nothing to warn of."""
    model = networks.mlp()
    batches = networks.batches(model, subject.settles + 3)
    training = Training(subject, model)
    still = subject.settles + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: float(step != still))
        for index, batch in enumerate(batches):
            before = training.weights()
            training.step(batch)
            schedule.step()
            names = stepped(training.weights(), before)
            if index == still:
                require(not names, f"{', '.join(names)} moved where the scheduler has set lr=0; expected no step")
            else:
                require(bool(names), "no weight moved where the scheduler has set lr=0.1; expected a step")
    said = [str(warning.message).split(". ")[0] for warning in caught if "lr_scheduler" in str(warning.message)]
    require(not said, f"torch warned: {' '.join(said)}; expected no warning")


@law
def all_evaluations_draw_the_same_masks(subject: Subject) -> None:
    """Dropout leaves out the same units in all evaluations of a step, and others in the next step."""
    applies(subject.passes > 1, "there is one evaluation a step")
    training, batches = settled(subject, networks.masked(), 2)
    training.watch_dropout()
    masks = []
    for batch in batches:
        training.step(batch)
        drawn = [evaluation.mask for evaluation in training.evaluations if evaluation.mask is not None]
        for mask in drawn[1:]:
            share = float((mask != drawn[0]).double().mean())
            require(share == 0.0, f"{share:.0%} of the dropout mask differs between two evaluations; expected 0%")
        masks.append(drawn[0])
    require(not torch.equal(*masks), "two steps drew the same dropout mask; expected others")


def _statistics_move_once(subject: Subject, momentum: float | None) -> None:
    """After a step the buffers are those that the first evaluation left."""
    training, batches = settled(subject, networks.normalised(momentum), 3)
    for batch in batches:
        before = training.buffers()
        training.step(batch)
        expected = training.evaluations[0].buffers
        require(bool(moved(expected, before)), "the first evaluation moved no running statistics; expected it to")
        require_equal(training.buffers(), expected, "buffer", "that after the first evaluation")


@law
def moving_averages_move_once_a_step(subject: Subject) -> None:
    """BatchNorm's running statistics and its count of batches are as after the first evaluation."""
    _statistics_move_once(subject, 0.1)


@law
def averages_of_all_batches_move_once_a_step(subject: Subject) -> None:
    """The same with ``momentum=None``, where the statistics are an average over all batches."""
    _statistics_move_once(subject, None)


@law
def autocast_around_a_step_sees_the_perturbation(subject: Subject) -> None:
    """In one autocast block around a step each evaluation computes with the weights that are there."""
    model = networks.mlp().float()
    batches = networks.batches(model, subject.settles + 2)
    training = Training(subject, model).run(batches[: subject.settles])
    stale: list[int] = []

    def compared(model: nn.Module, x: Tensor, y: Tensor, evaluation: int) -> Tensor:
        logits = model(x)
        # Autocast keeps bfloat16 copies of the weights for its whole block, whatever happens to the weights meanwhile.
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), torch.no_grad():
            if not torch.equal(logits, model(x)):
                stale.append(evaluation)
        return nn.functional.cross_entropy(logits.float(), y)

    for batch in batches[subject.settles :]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            training.step(batch, compared)
        where = ", ".join(str(number + 1) for number in stale)
        require(
            not stale, f"evaluation {where} computed with weights of another moment; expected those that were there"
        )


def _scaled(
    subject: Subject,
    drive: Callable[[Training, networks.Batch, torch.amp.GradScaler], Any],
    reference: Callable[[Training, networks.Batch], Any],
) -> None:
    """A step with a loss scale: the same update as without, or an error and no update."""
    model = networks.mlp().float()
    batches = networks.batches(model, subject.settles + 1)
    twin = copy.deepcopy(model)
    plain = Training(subject, twin).run(batches[:-1], seed=1)
    stream = torch.get_rng_state()
    training = Training(subject, model).run(batches[:-1], seed=1)
    before = training.weights()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    try:
        drive(training, batches[-1], scaler)
    except Exception as error:  # noqa: BLE001 - of whatever type: it is better than a wrong update
        require_equal(training.weights(), before, "weight", f"itself before a step that raised {type(error).__name__}")
        return
    torch.set_rng_state(stream)
    reference(plain, batches[-1])
    # Torch's rounding in float32, and nothing near the scale.
    require_close(training.weights(), plain.weights(), "weight", f"that without the loss scale {SCALE:g}", 1e-5)


@law
def a_scaler_with_a_closure_is_right_or_refused(subject: Subject) -> None:
    """``GradScaler.step(optimizer, closure)`` is the step without a scaler, or an error."""

    def drive(training: Training, batch: networks.Batch, scaler: torch.amp.GradScaler) -> None:
        closure = training.closure(batch, scaler=scaler)
        closure()  # the scaler looks for gradients before it calls the optimizer
        scaler.step(training.optimizer, closure)
        scaler.update()

    _needs_itself(subject)
    _scaled(subject, drive, lambda training, batch: training.step(batch))


@law
def a_scaler_in_an_unmodified_loop_is_right_or_refused(subject: Subject) -> None:
    """``scaler.scale(loss).backward(); scaler.step(optimizer)`` is that loop without a scaler, or an error."""

    def drive(training: Training, batch: networks.Batch, scaler: torch.amp.GradScaler) -> None:
        training.closure(batch, scaler=scaler)()
        scaler.step(training.optimizer)
        scaler.update()

    def reference(training: Training, batch: networks.Batch) -> None:
        training.closure(batch)()
        training.optimizer.step()

    _needs_itself(subject)
    _scaled(subject, drive, reference)


@law
def a_scaler_as_documented_changes_nothing(subject: Subject) -> None:
    """A step with a ``GradScaler``, driven as documented, is the step without."""
    scaled_step = subject.scaled_step
    if scaled_step is None:
        applies(False, "no way to use a GradScaler is documented")
        return
    model = networks.mlp().float()
    batches = networks.batches(model, subject.settles + 2)
    twin = copy.deepcopy(model)
    plain = Training(subject, twin).run(batches, seed=1)
    training = Training(subject, model).run(batches[: subject.settles], seed=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for batch in batches[subject.settles :]:
        scaled_step(training.built, model, training.closure(batch, scaler=scaler), scaler)
    require_close(training.weights(), plain.weights(), "weight", f"that without the loss scale {SCALE:g}", 1e-5)


def _needs_itself(subject: Subject) -> None:
    """Whether a scaler can be given the subject."""
    model = networks.mlp()
    training = Training(subject, model)
    applies(training.optimizer is training.built, f"{type(training.built).__name__} is no torch.optim.Optimizer")
