"""Checkpoints: a run that was interrupted goes on as if it had not been.

What a resumed run lacks shows as a jump of the loss, if at all, so the trajectories are compared bit for bit.  A
checkpoint holds what cannot be had elsewhere: the base optimizer's state, and no second copy of the weights.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import networks
from .definition import settled
from .driver import Training
from .law import applies, law, require, require_equal, stepped
from .subject import Subject

STOP, STEPS = 3, 6


def _trained(
    subject: Subject, base: type[Optimizer], steps: int, **options: Any
) -> tuple[Training, list[networks.Batch]]:
    """A training after some steps with a base optimizer that has a state, and the batches for others."""
    applies(not subject.bases or base in subject.bases, f"its base optimizer is never {base.__name__}")
    applies(bool(subject.bases) or base is SGD, "there is no base optimizer")
    model = networks.stochastic()
    batches = networks.batches(model, STEPS)
    if base is SGD:
        options = {"momentum": 0.9, **options}
    return Training(subject, model, base, **options).run(batches[:steps]), batches[steps:]


def _resume(subject: Subject, base: type[Optimizer]) -> None:
    """Save, build anew, load, go on: the same bits as without the interruption."""
    training, batches = _trained(subject, base, STOP)
    file = io.BytesIO()
    kept = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    torch.save({**kept, "stream": torch.get_rng_state()}, file)
    training.run(batches)

    file.seek(0)
    saved = torch.load(file, weights_only=False)
    again, _ = _trained(subject, base, 0)
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["stream"])
    again.run(batches)
    what = f"that of the uninterrupted run, {STEPS - STOP} steps after loading,"
    require_equal(again.weights(), training.weights(), "weight", what)
    require_equal(again.buffers(), training.buffers(), "buffer", what)


@law
def a_resumed_run_is_the_uninterrupted_one_with_sgd(subject: Subject) -> None:
    """Around SGD with momentum, a run that was saved and loaded goes on with the same bits."""
    _resume(subject, SGD)


@law
def a_resumed_run_is_the_uninterrupted_one_with_adam(subject: Subject) -> None:
    """Around Adam, a run that was saved and loaded goes on with the same bits."""
    _resume(subject, Adam)


@law
def a_resumed_run_is_the_uninterrupted_one_with_adamw(subject: Subject) -> None:
    """Around AdamW, a run that was saved and loaded goes on with the same bits."""
    _resume(subject, AdamW)


@law
def a_state_dict_loads_with_weights_only(subject: Subject) -> None:
    """``torch.load(weights_only=True)`` reads a saved ``state_dict``, and the optimizer takes it."""
    training, _ = _trained(subject, SGD, STOP)
    file = io.BytesIO()
    torch.save(training.optimizer.state_dict(), file)
    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).split(". ")[0]
        require(False, f"torch.load(weights_only=True) gave '{first}' on the state_dict; expected it to load")
    training.optimizer.load_state_dict(state)


@law
def a_state_dict_holds_no_weights(subject: Subject) -> None:
    """A ``state_dict`` holds no copy of the weights, perturbed or not."""
    training, _ = _trained(subject, SGD, STOP, lr=0.0)  # with weights that stand still, a copy is one to the last bit
    for where, tensor in _tensors(training.optimizer.state_dict(), "state_dict"):
        for name, weight in training.weights().items():
            if weight.ndim > 1 and tensor.shape == weight.shape and tensor.dtype == weight.dtype:
                distance = float((tensor - weight).norm() / weight.norm())
                message = f"{where} is the weight {name} up to {distance:.2g} of its norm; expected no copy"
                require(distance > 0.25, message)


def _tensors(state: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested state, with its place."""
    if isinstance(state, Tensor):
        yield where, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{where}[{key!r}]")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, f"{where}[{index}]")


def _goes_on_alike(subject: Subject, copier: Callable[[Any], Any], how: str) -> None:
    """A copy of model and optimizer trains on as the original does."""
    training, batches = _trained(subject, SGD, STOP)
    twin = training.copied(copier)
    stream, before = torch.get_rng_state(), training.weights()
    twin.run(batches)
    require_equal(training.weights(), before, "weight", f"itself while a copy by {how} was trained")
    torch.set_rng_state(stream)
    training.run(batches)
    require_equal(twin.weights(), training.weights(), "weight", f"that of the original, which was copied by {how},")


@law
def a_deep_copy_goes_on_alike(subject: Subject) -> None:
    """``copy.deepcopy`` of model and optimizer keeps the base optimizer and its state."""
    _goes_on_alike(subject, copy.deepcopy, "deepcopy")


@law
def a_pickle_goes_on_alike(subject: Subject) -> None:
    """A pickle of model and optimizer keeps the base optimizer and its state."""
    _goes_on_alike(subject, lambda pair: pickle.loads(pickle.dumps(pair)), "pickle")


@law
def a_wrong_state_dict_is_refused(subject: Subject) -> None:
    """A ``state_dict`` with another number of parameters is an error, and changes nothing."""
    other = networks.mlp()
    foreign = Training(subject, other, momentum=0.9).run(networks.batches(other, 1)).optimizer.state_dict()

    def trained_on(refuse: bool) -> dict[str, Tensor]:
        torch.default_generator.manual_seed(1)
        training, batches = _trained(subject, SGD, STOP)
        if refuse:
            try:
                training.optimizer.load_state_dict(foreign)
            except Exception:  # noqa: BLE001 - of whatever type
                pass
            else:
                sizes = [len(list(model.parameters())) for model in (other, training.model)]
                require(False, f"a state_dict of {sizes[0]} parameters was loaded for {sizes[1]}; expected an error")
        return training.run(batches).weights()

    expected = trained_on(refuse=False)
    require_equal(trained_on(refuse=True), expected, "weight", "that of a run without the refused state_dict")


@law
def groups_are_shared_after_loading(subject: Subject) -> None:
    """After ``load_state_dict``, what is written into ``param_groups`` reaches the base optimizer."""
    training, batches = settled(subject, networks.mlp(), 3)
    training.run(batches[:1])
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    for lr, batch in ((0.0, batches[1]), (0.1, batches[2])):
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        before = training.weights()
        training.step(batch)
        names = stepped(training.weights(), before)
        if lr == 0.0:
            require(not names, f"{', '.join(names)} moved after param_groups were set to lr=0; expected no step")
        else:
            require(bool(names), f"no weight moved after param_groups were set to lr={lr}; expected steps")
