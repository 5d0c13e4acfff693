"""Noise: random perturbations of the weights, from the optimizer's own generator.

The same on all ranks that have the same weights, and of shards on different ranks independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .distributed import local, mixed_seed, shard_index

if TYPE_CHECKING:
    from .engine import SharpnessAware

Distribution = Literal["normal", "uniform"]


def noise(
    optimizer: SharpnessAware,
    scales: Sequence[float | Tensor],
    distribution: Distribution = "normal",
) -> list[Tensor | None]:
    """z_p = s_p ξ with ξ ~ N(0, 1), or uniform in [−1, 1], entry by entry.

    Args:
        optimizer: Whose parameters, and whose generator.
        scales: s, per parameter: a number, or a tensor that broadcasts to this rank's part of it.
        distribution: Of ξ.

    Returns:
        z, per parameter; ``None`` where a parameter is frozen.
    """
    return [
        _drawn(optimizer, p, scale, distribution) if p.requires_grad else None
        for p, scale in zip(optimizer.parameters(), scales, strict=True)
    ]


def _drawn(optimizer: SharpnessAware, parameter: Tensor, scale: float | Tensor, distribution: Distribution) -> Tensor:
    """Noise for every entry that this rank has, equal where two ranks have the same."""
    part, generator = local(parameter), optimizer.generator
    index = shard_index(parameter)
    if index:
        seed = mixed_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)), index)
        generator = torch.Generator(generator.device).manual_seed(seed)
    number = scale if isinstance(scale, float) else 1.0
    # (Not `empty_like`: the same noise however the entries lie in memory.)
    drawn = torch.empty(part.shape, device=part.device, dtype=part.dtype)
    if distribution == "normal":
        drawn.normal_(0.0, number, generator=generator)
    else:
        drawn.uniform_(-number, number, generator=generator) if number else drawn.zero_()
    return drawn if isinstance(scale, float) else drawn.mul_(scale)


def deviations(variance: list[float], weights: list[float]) -> list[float]:
    """√(σ²_p w_p): the standard deviations, in today's coordinates, of noise that has σ at the representative.

    Args:
        variance: σ², per parameter.
        weights: w = α^{-2}, per parameter.

    Returns:
        One number per parameter.
    """
    return [math.sqrt(v * w) for v, w in zip(variance, weights, strict=True)]
