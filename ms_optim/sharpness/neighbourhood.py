"""A neighbourhood of the weights: the loss of labelled data at weights near those of a model.

Perturbed weights are written to the model's own parameters, in place, and put back from copies on leaving, whatever
happens inside; the model runs in evaluation mode.  Data are read once and kept, in *parts* of at most m samples each:
every part may be given a perturbation of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..curvature.evaluation import evaluation
from ..curvature.parallel import unwrapped
from ..curvature.risk import Loss, Risk, read_risk, weights_restored
from ..errors import CurvatureError, DataError


@dataclass(frozen=True)
class Part:
    """Some samples that share a perturbation.

    Attributes:
        batch: Their inputs.
        targets: Their targets.
        share: Their part of all samples.
    """

    batch: Batch
    targets: Any
    share: float


@dataclass(frozen=True)
class Neighbourhood:
    """The loss near the weights.

    Attributes:
        risk: The model, its parameters and the loss.
        weights: Copies of the weights, in the order of the parameters.
        parts: The data.
    """

    risk: Risk
    weights: list[Tensor]
    parts: list[Part]

    def move(self, steps: Sequence[Tensor] | None) -> None:
        """Set the weights to w + ε.

        Args:
            steps: ε, a tensor per parameter; ``None`` is 0.
        """
        with torch.no_grad():
            for index, (parameter, weight) in enumerate(zip(self.risk.parameters.values(), self.weights, strict=True)):
                if steps is None:
                    parameter.copy_(weight)
                else:
                    torch.add(weight, steps[index], out=parameter)

    def loss(self, part: Part) -> float:
        """The loss of one part, where the weights are; may be infinite or NaN far out."""
        with torch.no_grad():
            value = self.risk.loss(part.batch.logits(self.risk.model), part.targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(f"the loss must return one number, the mean over its batch, got {what}")
        return float(value)

    def total(self) -> float:
        """The loss of all samples, where the weights are."""
        return math.fsum(part.share * self.loss(part) for part in self.parts)

    def slope(self, part: Part) -> tuple[float, list[Tensor]]:
        """The loss of one part and its gradient, where the weights are."""
        one = Risk(self.risk.model, self.risk.parameters, self.risk.loss, [(part.batch, part.targets, 1.0)])
        (value,) = one.terms()
        parameters = list(self.risk.parameters.values())
        grads = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
        return float(value.detach()), list(grads)

    def require_finite(self, value: float) -> float:
        """The loss at the weights themselves, known to be a number.

        Args:
            value: It.

        Returns:
            The same.

        Raises:
            CurvatureError: If it is not finite.
        """
        if not math.isfinite(value):
            raise CurvatureError(
                f"the loss at the weights is {value}, and sharpness is a difference to it; check data and weights, or "
                "measure in float64 with model.double()"
            )
        return value


@contextmanager
def neighbourhood(model: nn.Module, data: Any, loss: Loss, m: int | None = None) -> Iterator[Neighbourhood]:
    """Open a neighbourhood of a model's weights; on leaving all is as it was, bit for bit.

    Args:
        model: The model.
        data: ``(inputs, targets)``, or an iterable of those.
        loss: A name, or a callable ``loss(logits, targets)`` that returns the mean over its batch.
        m: The most samples of a part; ``None``: a part per batch.

    Yields:
        The neighbourhood.

    Raises:
        DataError: If a batch cannot be cut into parts.
        ValueError: If m is not a positive whole number.
    """
    if m is not None and (isinstance(m, bool) or not isinstance(m, int) or m < 1):
        raise ValueError(f"m must be a whole number >= 1, got {m!r}; None perturbs for each batch of data as it is")
    with evaluation(model):
        risk = read_risk(unwrapped(model), data, loss)
        parts = [part for index, whole in enumerate(risk.batches) for part in _cut(*whole, m, index)]
        with weights_restored(list(risk.parameters.values())) as weights:
            yield Neighbourhood(risk, weights, parts)


def _cut(batch: Batch, targets: Any, share: float, m: int | None, index: int) -> Iterator[Part]:
    """A batch in pieces of m samples, the last one with what is left."""
    samples = batch.tensors[0].shape[0]
    if m is None or samples <= m:
        yield Part(batch, targets, share)
        return
    if batch.samples is None or not isinstance(targets, Tensor) or targets.ndim == 0 or len(targets) != samples:
        raise DataError(
            f"batch {index} of data has inputs and targets that do not share a first axis of {samples} samples, so it "
            f"cannot be cut into pieces of m={m}; pass batches of that size, and m=None"
        )
    for start in range(0, samples, m):
        rows = slice(start, min(start + m, samples))
        yield Part(batch.rows(rows), targets[rows], share * (rows.stop - rows.start) / samples)


def normal(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Independent standard normal numbers, drawn where the generator lives and moved.

    Args:
        like: Shapes, types and devices.
        generator: The source of randomness.

    Returns:
        A tensor for each.
    """
    return [
        torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device) for x in like
    ]


def counted(name: str, value: int, why: str) -> int:
    """A whole number from 1 on, or a ``ValueError`` that says why."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}; {why}")
    return value


def positive(name: str, value: float, why: str) -> float:
    """A finite number above 0, or a ``ValueError`` that says why."""
    if isinstance(value, bool) or not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be > 0 and finite, got {value!r}; {why}")
    return float(value)
