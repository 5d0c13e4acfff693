"""Evaluation: loss and accuracy on a split, exact: every image counts once, however many processes there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .process import Process
from .steps import Autocast

#: Accuracy among the k largest logits.
TOP = (1, 5)


class Batches(Iterable[tuple[Tensor, Tensor]], Protocol):
    """Batches of a split, of which the first ``real`` samples of this process are its own, and the rest padding.

    Attributes:
        real: Their number; of streams it grows while they are read.
    """

    real: int


def evaluate(
    model: nn.Module, batches: Batches, process: Process, autocast: Autocast, channels_last: bool = False
) -> dict[str, float]:
    """Evaluate a model; its mode is as before afterwards.

    Args:
        model: Gives logits ``[N, K]``; in evaluation mode inside.
        batches: The split.
        process: This process; sums are over all.
        autocast: Mixed precision.
        channels_last: Memory layout of the images.

    Returns:
        ``loss`` (cross-entropy, nats), ``top1`` and ``top5`` (%), over all images of the split.
    """
    training = model.training
    model.eval()
    seen = 0
    sums = torch.zeros(2 + len(TOP), dtype=_exact(process), device=process.device)
    try:
        with torch.no_grad():
            for x, y in batches:
                real = max(0, min(len(y), batches.real - seen))  # of streams known only as far as they are read
                seen += len(y)
                if channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                with autocast():
                    logits = _logits(model(x))
                if real:  # of padding alone nothing counts, but sharded models need every rank to call them
                    sums += _of_batch(logits[:real].float(), y[:real], sums)
    finally:
        model.train(training)
    count, loss, *correct = process.summed(*sums)
    found = {"loss": loss / count}
    return found | {f"top{k}": 100 * hits / count for k, hits in zip(TOP, correct, strict=True)}


def _of_batch(logits: Tensor, targets: Tensor, like: Tensor) -> Tensor:
    """Number of samples, summed loss, and hits among the largest logits."""
    loss = cross_entropy(logits, targets, reduction="sum")
    ranked = logits.topk(min(max(TOP), logits.shape[1])).indices.eq(targets[:, None])
    # A logit that is not a number is no answer.
    ranked &= logits.isfinite().all(1, keepdim=True)
    hits = [ranked[:, :k].any(1).sum() for k in TOP]
    return torch.stack([like.new_tensor(len(targets)), loss.to(like.dtype), *(each.to(like.dtype) for each in hits)])


def _logits(output: Any) -> Tensor:
    """The logits of models that return more than them."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _exact(process: Process) -> torch.dtype:
    return torch.float32 if process.device.type == "mps" else torch.float64
