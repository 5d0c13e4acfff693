r"""Subject: an optimizer under test, described so that every law can build it, drive it and look at it.

A law knows nothing of an optimizer but this description.  What torch's own optimizers would not need is a field: how
one step is driven, which options switch the optimizer's own part off, in which norm its perturbation has the length ρ.
Who has no ``step(closure)`` gives an adapter::

    def two_steps(optimizer, model, closure):
        loss = closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step(zero_grad=True)
        return loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Closure = Callable[[], Tensor]
Tensors = Mapping[str, Tensor]
Build = Callable[..., Any]  # build(model, params, base, **options)
Step = Callable[[Any, nn.Module, Closure], Any]
ScaledStep = Callable[[Any, nn.Module, Closure, torch.amp.GradScaler], Any]
Norm = Callable[[Any, Tensors, Tensors], float]  # norm(optimizer, weights, perturbation)


def by_closure(optimizer: Any, model: nn.Module, closure: Closure) -> Any:
    """One step by torch's convention, ``optimizer.step(closure)``.

    Args:
        optimizer: The optimizer.
        model: Its model.
        closure: Zeroes the gradients, runs forward and backward, returns the loss.

    Returns:
        What ``step`` returned.
    """
    return optimizer.step(closure)


def euclidean(optimizer: Any, weights: Tensors, perturbation: Tensors) -> float:
    """‖ε‖₂ over all parameters: the norm of SAM.

    Args:
        optimizer: The optimizer.
        weights: w before the perturbation, by name.
        perturbation: ε, by name.

    Returns:
        The norm.

    >>> euclidean(None, {}, {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    5.0
    """
    return float(torch.sqrt(sum((e.double().square().sum() for e in perturbation.values()), torch.zeros(()))))


def itself(optimizer: Any) -> Optimizer:
    """The optimizer: that of a subject which is a ``torch.optim.Optimizer``.

    Args:
        optimizer: What ``build`` made.

    Returns:
        The same.
    """
    found: Optimizer = optimizer
    return found


@dataclass(frozen=True)
class Subject:
    """An optimizer, as the laws see it.

    Attributes:
        name: What reports call it.
        build: ``build(model, params, base, **options)`` makes the optimizer: of these parameters or parameter groups
            of the model, around the base optimizer's class, with its own and the base optimizer's options.
        step: ``step(optimizer, model, closure)`` takes one step; by default ``optimizer.step(closure)``.
        options: Its own options, such as ρ.
        off: The options that leave nothing but the base optimizer; ``None`` if there are none.
        bases: The base optimizers that it is tried with; the first must be SGD, or there is none.
        sgd_options: Options that it cannot do without around SGD, put over those that a law asks for.
        passes: Gradient evaluations a step.
        ascent: The evaluation, counted from 0, that sees perturbed weights; ``None`` if that is not an ascent.
        norm: The norm in which the perturbation's length is ρ; ``None`` if there is none.
        rho_key: The option that is ρ (or another strength that must not be negative); ``None`` if there is none.
        last_gradient: Whether the descent is along the last evaluation's gradient, and none but that.
        settles: Steps before the laws of a single step hold: 1 for an optimizer that first moves to an equivalent
            point, or needs a momentum to begin with.
        handle: The ``torch.optim.Optimizer`` that a loop saves, schedules and hooks; by default the optimizer itself.
        scaled_step: ``scaled_step(optimizer, model, closure, scaler)``: one step with a ``GradScaler`` as the
            optimizer documents it, with its own ``scaler.step`` and ``scaler.update``; the closure's backward pass is
            scaled.  ``None`` if no way is documented.
        excluded: Law → the reason for which it does not apply.

    >>> from ms_optim import SAM
    >>> def build(model, params, base, **options):
    ...     return SAM(params, base, model=model, **options)
    >>> subject = Subject("SAM", build)
    >>> subject.radius
    0.05
    """

    name: str
    build: Build
    step: Step = by_closure
    options: Mapping[str, Any] = field(default_factory=lambda: {"rho": 0.05})
    off: Mapping[str, Any] | None = field(default_factory=lambda: {"rho": 0.0})
    bases: tuple[type[Optimizer], ...] = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    sgd_options: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 2
    ascent: int | None = 1
    norm: Norm | None = euclidean
    rho_key: str | None = "rho"
    last_gradient: bool = True
    settles: int = 0
    handle: Callable[[Any], Optimizer] = itself
    scaled_step: ScaledStep | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)

    @property
    def radius(self) -> float:
        """ρ, as the options have it."""
        return float(self.options[self.rho_key]) if self.rho_key is not None else 0.0

    def __str__(self) -> str:
        return self.name
