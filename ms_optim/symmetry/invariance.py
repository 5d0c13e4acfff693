"""Invariance: what a model's logits are with other tensors in place of its own, leaving the model as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..batch import Batch, logits_of


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
