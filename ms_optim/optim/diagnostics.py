r"""Diagnostics: what one step of a sharpness-aware optimizer saw, on request, since it costs copies and waiting.

loss gap      L(W + ε) − L(W): how far the loss rises within the ball
cosine        ⟨g, g'⟩ / ‖g‖ ‖g'‖ of the gradients at W and at W + ε: 1 where the ascent changes nothing
‖ε_p‖, α_p    per parameter
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import completed, local
from .wrapper import Part

if TYPE_CHECKING:
    from .engine import SharpnessAware
    from .gradient_pass import GradientPass
    from .perturbation import Scaled


@dataclass(frozen=True)
class StepDiagnostics:
    """What a step saw; NaN where there was nothing to see, as a second gradient in a step of one pass.

    Attributes:
        step: The number of the step, from 0.
        loss: In the first pass; known with a closure, in an attached loop, and where ``gradient_pass.loss`` was set.
        perturbed_loss: In the last.
        cosine: Of the first gradient and the last.
        perturbation: ‖ε_p‖ in the last pass, by parameter name; in today's coordinates.
        scale: α_p of the last refresh, by parameter name; empty before one.
    """

    step: int
    loss: float
    perturbed_loss: float
    cosine: float
    perturbation: dict[str, float]
    scale: dict[str, float]

    @property
    def loss_gap(self) -> float:
        """L(W + ε) − L(W)."""
        return self.perturbed_loss - self.loss

    @property
    def norm(self) -> float:
        """‖ε‖."""
        return math.sqrt(sum(value * value for value in self.perturbation.values()))


class Observer(Part):
    """Collects the diagnostics of one step after another.

    Args:
        optimizer: Whose steps.
        active: Whether it looks at all.

    Attributes:
        found: Of the last finished step; ``None`` before.
    """

    def __init__(self, optimizer: SharpnessAware, active: bool) -> None:
        super().__init__(optimizer)
        self.active = active
        self.found: StepDiagnostics | None = None
        self._losses: list[float] = []
        self._first: list[Tensor | None] = []
        self._norms: dict[str, float] = {}
        self._passes = 0

    def begin(self) -> None:
        """A step begins."""
        self._losses, self._first, self._norms, self._passes = [], [], {}, 0

    def perturbed(self, perturbation: Scaled) -> None:
        """The weights are about to be perturbed."""
        if not self.active:
            return
        optimizer, directions, factors = self.optimizer, perturbation.directions, perturbation.factors
        self._norms = {}
        scale = 1.0 if perturbation.scale is None else float(perturbation.scale)
        for name, p, d, f in zip(optimizer.names(), optimizer.parameters(), directions, factors, strict=True):
            if d is not None:
                values = d.coalesce().values() if d.is_sparse else d
                square = torch.linalg.vector_norm(values, dtype=torch.float64).mul(scale * f).square()
                self._norms[name] = math.sqrt(completed([square], [p]))

    def after(self, gradient_pass: GradientPass) -> None:
        """A pass is done, and its gradients are there."""
        if not self.active:
            return
        loss = gradient_pass.loss
        if isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
            self._losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))
        if self._passes == 0:
            grads = (p.grad for p in self.optimizer.parameters())
            self._first = [None if g is None else local(g).detach().clone() for g in grads]
        self._passes += 1

    def finish(self) -> None:
        """All passes of the step are done."""
        if not self.active:
            return
        optimizer, nothing = self.optimizer, math.nan
        log_scale = optimizer.representative.log_scale
        self.found = StepDiagnostics(
            step=optimizer.steps,
            loss=self._losses[0] if self._losses else nothing,
            perturbed_loss=self._losses[-1] if len(self._losses) > 1 else nothing,
            cosine=self._cosine() if self._passes > 1 else nothing,
            perturbation=self._norms,
            scale={name: math.exp(a) for name, a in log_scale.items()},
        )
        self._first = []

    def __getstate__(self) -> dict[str, Any]:
        """Between steps there is nothing but what was found."""
        return {**super().__getstate__(), "_first": []}

    def _cosine(self) -> float:
        """Of the first gradient and the present one."""
        products: list[tuple[Tensor, Tensor, Tensor]] = []
        tensors = []
        for p, old in zip(self.optimizer.parameters(), self._first, strict=True):
            if p.grad is None or old is None:
                continue
            a, b = old.to_dense().double(), local(p.grad).to_dense().double()
            products.append(((a * b).sum(), a.square().sum(), b.square().sum()))
            tensors.append(p)
        if not products:
            return math.nan
        inner, old_square, new_square = (completed(list(column), tensors) for column in zip(*products, strict=True))
        return inner / math.sqrt(old_square * new_square) if old_square * new_square > 0 else math.nan
