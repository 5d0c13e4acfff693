"""Driver: trains a model with a subject and keeps what each gradient evaluation saw.

What matters of a sharpness-aware step happens inside it, between two evaluations.  The closure is the one place where
that can be seen from outside whatever the optimizer is: it notes the weights that it runs with, its loss, the
gradients that it leaves and the buffers that it changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from .networks import Batch
from .subject import Subject

Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]  # model, inputs, labels, the evaluation's number
SGD_OPTIONS = {"lr": 0.1, "momentum": 0.0}


@dataclass(frozen=True)
class Evaluation:
    """One call of the closure.

    Attributes:
        loss: What it returned.
        weights: The weights that it ran with.
        grads: The gradients that it left, where there are any.
        buffers: The buffers after it.
        mask: The zeros of the last dropout, if there is one.
    """

    loss: float
    weights: dict[str, Tensor]
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    mask: Tensor | None = None


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, evaluation: int) -> Tensor:
    """The loss of every law that does not say otherwise.

    Args:
        model: The model.
        x: Inputs.
        y: Labels.
        evaluation: The number of the evaluation within the step.

    Returns:
        The mean over the batch.
    """
    return F.cross_entropy(model(x), y)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, as they are now.

    Args:
        tensors: By name.

    Returns:
        Copies, by name.
    """
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class Training:
    """A model and its optimizer, stepped batch by batch.

    Args:
        subject: The optimizer.
        model: The model.
        base: The base optimizer's class.
        params: Parameters or groups; by default all of the model's.
        off: Whether the optimizer's own part is switched off.
        keep: Whether evaluations keep copies of what they see.
        **options: Put over the subject's and the base optimizer's.
    """

    def __init__(
        self,
        subject: Subject,
        model: nn.Module,
        base: type[Optimizer] = SGD,
        params: list[Any] | None = None,
        off: bool = False,
        keep: bool = True,
        **options: Any,
    ) -> None:
        self.subject, self.model, self.keep = subject, model, keep
        own = {**subject.options, **(subject.off or {} if off else {})}
        needed = subject.sgd_options if base is SGD else {}
        given = {**own, **base_options(subject, base), **options, **needed}
        self.built = subject.build(model, list(model.parameters()) if params is None else params, base, **given)
        self.optimizer = subject.handle(self.built)
        self.evaluations: list[Evaluation] = []
        self._masks: list[Tensor] = []

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights, by name; one of those that are tied."""
        return copies(dict(self.model.named_parameters()))

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers, by name."""
        return copies(dict(self.model.named_buffers()))

    def closure(
        self,
        batch: Batch,
        loss: Loss = cross_entropy,
        after: Callable[[int], object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Callable[[], Tensor]:
        """The closure of one step.

        Args:
            batch: Inputs and labels.
            loss: What is minimised.
            after: Called with the number of the evaluation when that is done.
            scaler: What the loss is scaled with before the backward pass.

        Returns:
            Zeroes the gradients, runs forward and backward (where the loss has a gradient), returns the loss.
        """
        self.evaluations = []
        x, y = batch

        def evaluate() -> Tensor:
            number = len(self.evaluations)
            self.optimizer.zero_grad()
            value = loss(self.model, x, y, number)
            if value.requires_grad:
                (value if scaler is None else scaler.scale(value)).backward()
            if self.keep:
                named = dict(self.model.named_parameters())
                grads = copies({name: p.grad for name, p in named.items() if p.grad is not None})
                mask = self._masks[-1] if self._masks else None
                self.evaluations.append(Evaluation(float(value), copies(named), grads, self.buffers(), mask))
            else:
                self.evaluations.append(Evaluation(float(value), {}, {}, {}))
            if after is not None:
                after(number)
            return value

        return evaluate

    def step(self, batch: Batch, loss: Loss = cross_entropy, after: Callable[[int], object] | None = None) -> Any:
        """One step; what its evaluations saw is in ``evaluations``.

        Args:
            batch: Inputs and labels.
            loss: What is minimised.
            after: Called with the number of the evaluation when that is done.

        Returns:
            What the subject's step returned.
        """
        return self.subject.step(self.built, self.model, self.closure(batch, loss, after))

    def run(self, batches: list[Batch], loss: Loss = cross_entropy, seed: int | None = None) -> Training:
        """One step per batch.

        Args:
            batches: Inputs and labels.
            loss: What is minimised.
            seed: Of the global random stream, for two runs that are to be compared.

        Returns:
            This training.
        """
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        for batch in batches:
            self.step(batch, loss)
        return self

    def copied(self, copier: Callable[[Any], Any]) -> Training:
        """This training with copies of its model and its optimizer.

        Args:
            copier: Copies the pair of them.

        Returns:
            The other training.
        """
        twin = copy.copy(self)
        twin.model, twin.built = copier((self.model, self.built))
        twin.optimizer, twin.evaluations = self.subject.handle(twin.built), []
        return twin

    def watch_dropout(self) -> None:
        """Keep the masks of the model's dropout layers from now on."""

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training:
                self._masks.append(output.detach() != 0)

        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(keep)


def base_options(subject: Subject, base: type[Optimizer]) -> dict[str, Any]:
    """The learning rate (and momentum) of a base optimizer, unless a law asks for others.

    Args:
        subject: The subject.
        base: The class of the base optimizer.

    Returns:
        Its options.
    """
    return {**SGD_OPTIONS, **subject.sgd_options} if base is SGD else {"lr": 0.01}
