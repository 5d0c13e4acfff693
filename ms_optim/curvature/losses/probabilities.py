"""Probabilities: p = softmax(o) and its logarithm above a floor, and which of them are the largest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(floor) is nothing beside the Σ p = 1 it stands in (1.8e-35, 1e-304), and 1/√(exp(floor)), which a signed column
# multiplies by at most exp(floor / 2), stays within the type with room for the slopes.
_LOG_FLOOR = {torch.float32: -80.0, torch.float64: -700.0}

# Up to so many classes all are sorted, which is then as fast as finding a few.
SORTED_CLASSES = 128


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax, in float32 or better.

    Args:
        logits: ``[N, K]``.

    Returns:
        ``[N, K]``, differentiable.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1).clamp_min(_LOG_FLOOR[wide.dtype])


def probabilities(logits: Tensor) -> Tensor:
    """softmax, in float32 or better.

    Args:
        logits: ``[N, K]``.

    Returns:
        ``[N, K]``, detached, not below exp(floor).
    """
    logits = logits.detach()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide, dim=-1).clamp_min_(math.exp(_LOG_FLOOR[wide.dtype]))


def largest(values: Tensor, leading: int, count: int) -> Tensor:
    """The places of the largest values in descending order; in ties the first ``leading`` are in their own order.

    Args:
        values: ``[N, K]``, not negative.
        leading: Fewer than ``count``.
        count: At most K.

    Returns:
        ``[N, count]``.
    """
    # Positive numbers have the order of their bits, which torch compares in half the time as it looks for no NaN.
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    # Elsewhere than on the CPU sorting is fast, and what ``topk`` makes of ties may depend on N.
    if values.shape[-1] <= SORTED_CLASSES or values.device.type != "cpu":
        return bits.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    top, order = bits.topk(count, dim=-1)
    tied = (top[:, 1 : leading + 1] == top[:, :leading]).any(-1).nonzero()[:, 0]
    if len(tied):
        order[tied] = bits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return order
