"""Gradients: lists of them, one entry per parameter and ``None`` where there is none, and the parts of a batch."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..errors import OptimizerError
from .copies import copy_lists
from .distributed import completed, local
from .requirements import MicroBatch

Gradients = list[Tensor | None]
Version = tuple["weakref.ReferenceType[Tensor] | None", int]  # which tensor, and how often it was written to


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where either may be absent."""
    if a is None or b is None:
        return b if a is None else a
    # A sparse tensor takes no dense one; the other way around it works.
    return b + a if a.is_sparse and not b.is_sparse else a + b


def inner(a: Gradients, b: Gradients, weights: list[float]) -> float:
    """Σ_p w_p ⟨a_p, b_p⟩ in float64, over all ranks that hold a part.

    Args:
        a: One gradient per parameter; an absent one is 0.
        b: Others.
        weights: w, one number per parameter.

    Returns:
        The sum.
    """
    whole, products = [], []
    with torch.no_grad():
        for x, y, w in zip(a, b, weights, strict=True):
            if x is not None and y is not None:
                whole.append(x)
                products.append(w * (_dense(x) * _dense(y)).sum(dtype=torch.float64))
    return completed(products, whole) if products else 0.0


def power_sum(grads: Gradients, scales: list[float], power: float) -> float:
    """Σ_p Σ_j |s_p g_pj|^power in float64, over all ranks that hold a part.

    Args:
        grads: g, one gradient per parameter; an absent one is 0.
        scales: s, one number per parameter.
        power: > 0.

    Returns:
        The sum.
    """
    present = [(g, s) for g, s in zip(grads, scales, strict=True) if g is not None]
    with torch.no_grad():
        sums = [(_dense(g).double() * s).abs().pow(power).sum() for g, s in present]
    return completed(sums, [g for g, _ in present]) if present else 0.0


def combined(x: float, a: Gradients, y: float, b: Gradients) -> Gradients:
    """x a + y b, entry by entry, where either may be absent.

    Args:
        x: A number.
        a: One gradient per parameter.
        y: A number.
        b: Others.

    Returns:
        New tensors.
    """
    return weighted_sum(weighted_sum([], a, x), b, y)


def held(grads: Gradients) -> Gradients:
    """Gradients that the next pass does not write to."""
    return [None if grad is None else grad.detach().clone() for grad in grads]


def _dense(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient, dense: sums of products of two sparse ones have no kernel."""
    part = local(gradient)
    return part.to_dense() if part.is_sparse else part


def weighted_sum(total: Gradients, grads: Gradients, weight: float) -> Gradients:
    """total + weight · grads.

    Args:
        total: A sum; empty for none yet.
        grads: What is added.
        weight: Its weight.

    Returns:
        The sum.
    """
    with torch.no_grad():
        scaled = [None if grad is None else grad * weight for grad in grads]
        return [plus(a, b) for a, b in zip(total, scaled, strict=True)] if total else scaled


def copied(grads: Gradients, into: Gradients) -> Gradients:
    """Copies, in the memory of earlier ones where they fit.

    Args:
        grads: What is copied.
        into: Earlier copies.

    Returns:
        The copies.
    """
    into = into + [None] * (len(grads) - len(into))
    found: Gradients = []
    sources, targets = [], []
    with torch.no_grad():
        for grad, old in zip(grads, into, strict=True):
            if grad is not None and old is not None and _fits(grad, old):
                sources.append(local(grad))
                targets.append(local(old))
                found.append(old)
            else:
                found.append(None if grad is None else grad.detach().clone())
        copy_lists(targets, sources)
    return found


def _fits(grad: Tensor, memory: Tensor) -> bool:
    """Whether one dense tensor can be copied into another without a change of type."""
    sparse = grad.is_sparse or memory.is_sparse
    return not sparse and grad.shape == memory.shape and grad.dtype == memory.dtype


def versions(grads: Gradients) -> list[Version]:
    """What is there, without keeping it.

    Args:
        grads: Gradients.

    Returns:
        One version each.
    """
    return [(None, -1) if grad is None else (weakref.ref(grad), grad._version) for grad in grads]


def written_since(before: list[Version], grads: Gradients) -> bool:
    """Whether a gradient is there that was not, or was another.

    Args:
        before: What was there; empty for nothing that is known.
        grads: What is there now.

    Returns:
        Whether there is one.
    """
    pairs = list(zip(before, grads, strict=True)) if len(before) == len(grads) else []
    then = [(None if there is None else there(), version, grad) for (there, version), grad in pairs]
    return any(grad is not None and (grad is not old or grad._version != version) for old, version, grad in then)


def slices(samples: int | None, m: MicroBatch) -> list[tuple[slice, float]]:
    """The parts of a batch that share a perturbation, each with its share of the samples.

    Args:
        samples: The size of the batch.
        m: A number of samples; for a word the batch is one part.

    Returns:
        Slices and weights.

    Raises:
        OptimizerError: If the size is needed and missing, or is not positive.
    """
    if not isinstance(m, int):
        return [(slice(None), 1.0)]
    if samples is None or samples < 1:
        raise OptimizerError(
            f"m={m} samples share a perturbation, so a step has to know how many there are (got samples={samples}); "
            "call passes(samples=len(x)) and take x[gradient_pass.samples], or step(closure, samples=len(x)) with a "
            "closure that takes the slice"
        )
    starts = range(0, samples, m)
    return [(slice(i, min(i + m, samples)), (min(i + m, samples) - i) / samples) for i in starts]
