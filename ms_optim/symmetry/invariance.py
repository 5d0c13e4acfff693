"""Invariance: what a model's logits are with other tensors in place of its own, leaving the model as it is.

Also what a group asks of a model before it acts, and how its promise is checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Batch, logits_of
from ..errors import SymmetryError


@dataclass(frozen=True)
class Check:
    """How far a random group element moved the logits, relative to the largest logit.

    Attributes:
        eval_error: In evaluation mode, where the symmetry is exact but for LayerNorm-like ε.
        training_error: In training mode, where BatchNorm's ε counts too.
        tolerance: What ``eval_error`` was held against.
    """

    eval_error: float
    training_error: float
    tolerance: float


def rounding_tolerance(eps: float, inexact: bool) -> float:
    """The relative error that rounding explains: 4096 units of it, at most 0.1; at least 1e-2 with LayerNorm-like ε.

    Args:
        eps: A unit of rounding.
        inexact: Whether there is a normaliser whose ε does not move.

    Returns:
        The tolerance.
    """
    tolerance = min(0.1, 4096 * eps)
    return max(tolerance, 1e-2) if inexact else tolerance


def compared(
    model: nn.Module,
    batch: Batch,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    tolerance: float | None,
    inexact: bool,
    what: str,
    discovery: str,
) -> Check:
    """Compare two versions of the logits in both modes; see :func:`undisturbed`.

    Args:
        model: The model.
        batch: The batch.
        before: Parameters and buffers in place of the model's own.
        after: The same, moved by a group element.
        tolerance: Largest relative error in evaluation mode; ``None``: :func:`rounding_tolerance` of the logits' dtype.
        inexact: Whether there is a normaliser whose ε does not move.
        what: What acts, for the message.
        discovery: The function that finds such a group, for the message.

    Returns:
        The errors in both modes.

    Raises:
        SymmetryError: If the evaluation-mode error exceeds the tolerance.
    """
    eval_error, dtype = relative_difference(model, batch, before, after, training=False)
    training_error, _ = relative_difference(model, batch, before, after, training=True)
    tolerance = rounding_tolerance(torch.finfo(dtype).eps, inexact) if tolerance is None else tolerance
    # Written so that NaN fails.
    if not eval_error <= tolerance:
        raise SymmetryError(
            f"a random {what} changed the logits of {type(model).__name__} by {eval_error:.2e} of their size in "
            f"evaluation mode, more than {tolerance:.0e}; the group is another model's, or this one does what its "
            f"graph does not show: call {discovery} again, or, if it has normalisers whose ε is large against the "
            "variance, pass a larger tolerance"
        )
    return Check(eval_error, training_error, tolerance)


def lowest_variance(
    model: nn.Module, buffers: Mapping[str, Tensor], mean: str, variance: str, discovery: str
) -> float:
    """The smallest running variance; a model without the statistics of a group, or whose variance is none, is refused.

    Args:
        model: The model.
        buffers: Its buffers, by name.
        mean: Name of running_mean.
        variance: Name of running_var.
        discovery: The function that finds such a group, for the message.

    Returns:
        The smallest.

    Raises:
        SymmetryError: If it is one.
    """
    absent = [name for name in (mean, variance) if name not in buffers]
    if absent:
        raise SymmetryError(
            f"{type(model).__name__} lacks the buffer {absent[0]}, so it is not the model of this group; "
            f"call {discovery}(model, example_inputs) again"
        )
    lowest = float(buffers[variance].min())
    if not 0 <= lowest < math.inf:
        raise SymmetryError(f"buffer {variance} holds {lowest:.3g}, which is not a variance; reset its statistics")
    return lowest


def relative_difference(
    model: nn.Module, batch: Batch, before: Mapping[str, Tensor], after: Mapping[str, Tensor], training: bool
) -> tuple[float, torch.dtype]:
    """The largest difference between two versions of the logits, relative to the largest logit.

    Both versions draw the same random numbers (dropout masks).  Modes and random streams change; see
    :func:`undisturbed`.

    Args:
        model: The model; its buffers are not written to.
        batch: The batch.
        before: Parameters and buffers in place of the model's own.
        after: The same, for the second version.
        training: Call the model in training mode.

    Returns:
        max |o' − o| / max |o|, and the logits' dtype.
    """
    set_training(model, training)
    streams = _random_streams(model)
    with torch.no_grad():
        first = _logits_with(model, before, batch)
        _set_random_streams(streams)
        second = _logits_with(model, after, batch)
    largest = float(first.abs().max())
    return float((second - first).abs().max()) / (largest if largest > 0 else 1.0), first.dtype


def set_training(model: nn.Module, training: bool) -> None:
    """Set the mode of every module, past any ``train`` of the model's own, which may do more than that.

    Args:
        model: The model.
        training: The mode.
    """
    for module in model.modules():
        module.training = training


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave modes and the random streams (the CPU's and those of the model's devices) as they were.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    streams = _random_streams(model)
    try:
        yield
    finally:
        _set_random_streams(streams)
        for module, training in modes:
            module.training = training


def _logits_with(model: nn.Module, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return logits_of(torch.func.functional_call(model, buffers | dict(tensors), batch.args, batch.kwargs))


def _random_streams(model: nn.Module) -> dict[torch.device, Tensor]:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    return {torch.device("cpu"): torch.get_rng_state(), **{d: torch.cuda.get_rng_state(d) for d in devices}}


def _set_random_streams(streams: Mapping[torch.device, Tensor]) -> None:
    for device, stream in streams.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(stream, device)
        else:
            torch.set_rng_state(stream)
