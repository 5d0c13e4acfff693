r"""Ascent: the largest value of a function on a ball, by projected gradient steps that halve when they stop helping.

    max f(z)   subject to   ‖z‖_p ≤ ρ ,        p = 2 or ∞

    y = Π( z_k + α d(∇f(z_k)) ) ,    z_{k+1} = Π( z_k + ¾ (y − z_k) + ¼ (z_k − z_{k−1}) )

with d(g) = g / ‖g‖₂ or sign(g), and Π the projection on the ball.  The first step has no momentum and α = 2ρ, so that
from the centre it reaches the sphere: it is SAM's.  At checkpoints, α is halved if fewer than three quarters of the
steps since the last one went up, or if neither α nor the best value has changed since; the search then goes on from
the best point.  What is returned is the best value met, the centre's included: a lower bound of the maximum.

Source: APGD of Croce and Hein, arXiv 2003.01690, Algorithm 1, with the checkpoints of its published code (both from
memory).  Differs: (1) the centre is a candidate; (2) where the gradient is zero, a random direction takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .neighbourhood import normal

Norm = Literal["l2", "linf"]

# z, whether the gradient is wanted → f(z), ∇f(z).
Objective = Callable[[Sequence[Tensor], bool], tuple[float, list[Tensor] | None]]


@dataclass(frozen=True)
class Peak:
    """The best point met.

    Attributes:
        start: f(0).
        value: f at the best point, at least f(0).
        point: That point.
    """

    start: float
    value: float
    point: list[Tensor]


def climb(
    objective: Objective,
    zero: list[Tensor],
    radius: float,  # ρ
    norm: Norm,
    steps: int,
    step_size: float | None,  # the first α
    support: Sequence[Tensor],
    generator: torch.Generator,
) -> Peak:
    """Search the ball from its centre.

    Args:
        objective: f and, where it is asked for, its gradient; a value that is not a number is no candidate.
        zero: The centre.
        radius: ρ > 0.
        norm: ``"l2"`` or ``"linf"``, over all tensors together.
        steps: Gradients taken, at least 1; f is evaluated once more.
        step_size: ``None`` is 2ρ.
        support: Multiplies random directions, to keep them where f depends on z.
        generator: Draws a direction where the gradient vanishes.

    Returns:
        The best point.
    """
    alpha = 2.0 * radius if step_size is None else step_size
    start, gradient = objective(zero, True)
    point = previous = zero
    value, best = start, Peak(start, start, zero)
    best_gradient = gradient
    # In steps: the first interval, its shortening from one checkpoint to the next, and the shortest.
    interval, shortening, shortest = (max(int(part * steps), 1) for part in (0.22, 0.03, 0.06))
    rises = since = 0
    at_checkpoint, halved = start, True  # the first checkpoint only asks how many steps went up
    for k in range(steps):
        assert gradient is not None
        ahead = _projected(_added(point, _direction(gradient, norm, support, generator), alpha), radius, norm)
        if k:
            ahead = _projected(
                [z + 0.75 * (y - z) + 0.25 * (z - old) for y, z, old in zip(ahead, point, previous, strict=True)],
                radius,
                norm,
            )
        previous, point = point, ahead
        new, gradient = objective(point, k + 1 < steps)
        rises, since, value = rises + (new > value), since + 1, new
        if new > best.value:
            best, best_gradient = Peak(start, new, point), gradient
        if since < interval:
            continue
        stuck = not halved and best.value <= at_checkpoint
        halved = stuck or rises < 0.75 * since or not math.isfinite(new)
        if halved:
            alpha *= 0.5
            point = previous = best.point
            value, gradient = best.value, best_gradient
        at_checkpoint, rises, since = best.value, 0, 0
        interval = max(interval - shortening, shortest)
    return best


def _direction(
    gradient: Sequence[Tensor], norm: Norm, support: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """g / ‖g‖₂, or sign(g); a random direction for a gradient that is zero or not finite."""
    length = _length(gradient)
    if length == 0.0 or not math.isfinite(length):
        gradient = [x * inside for x, inside in zip(normal(gradient, generator), support, strict=True)]
        length = _length(gradient) or 1.0
    return [g.sign() if norm == "linf" else g / length for g in gradient]


def _projected(point: Sequence[Tensor], radius: float, norm: Norm) -> list[Tensor]:
    """The nearest point of the ball."""
    if norm == "linf":
        return [z.clamp(-radius, radius) for z in point]
    length = _length(point)
    return [z * (radius / length) for z in point] if length > radius else list(point)


def _added(point: Sequence[Tensor], direction: Sequence[Tensor], alpha: float) -> list[Tensor]:
    return [z + alpha * d for z, d in zip(point, direction, strict=True)]


def _length(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all tensors together, in float64."""
    return math.hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in tensors))
