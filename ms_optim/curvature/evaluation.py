"""Evaluation: the network whose curvature is measured, without disturbing the one that trains.

The trace belongs to a deterministic function of the parameters in which each sample's logits depend on that sample
alone.  So dropout is off, and BatchNorm's statistics are constants: the running ones for a measurement; for an
optimizer's refresh those that the training forward uses, which are the batch's own unless the module is in evaluation
mode (early in training the running ones are fresh or stale and describe another network).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = Literal["running", "batch", "training"]


@contextmanager
def evaluation(model: nn.Module, statistics: Statistics = "running") -> Iterator[None]:
    """Run the model in evaluation mode, with gradients, and leave no trace of it.

    Modes, buffers and the random streams are as before on leaving, whatever happens inside; autocast is off, because
    squared norms of half-precision columns under- and overflow.

    Args:
        model: The model.
        statistics: ``"running"``: BatchNorm uses its running statistics (the batch's, where it keeps none).
            ``"batch"``: the batch's own mean and biased variance, held constant. ``"training"``: the batch's own for
            modules in training mode, the running ones for the others.

    Yields:
        Nothing; forward passes inside see the evaluation network.

    Raises:
        ValueError: If ``statistics`` is another word.
    """
    if statistics not in ("running", "batch", "training"):
        raise ValueError(f"statistics must be 'running', 'batch' or 'training', got {statistics!r}")
    modes = [(module, module.training) for module in model.modules()]
    norms = [(module, training) for module, training in modes if isinstance(module, _BatchNorm)]
    of_batch = {"running": lambda training: False, "batch": lambda training: True, "training": bool}[statistics]
    own = [norm for norm, training in norms if of_batch(training) or norm.running_mean is None]
    kept = [(norm, norm._buffers.get("running_mean"), norm._buffers.get("running_var")) for norm in own]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    hooks = [norm.register_forward_pre_hook(_use_batch_statistics) for norm in own]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    kind = next((p.device.type for p in model.parameters()), "cpu")
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad(), torch.autocast(kind, enabled=False):
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, mean, variance in kept:
            norm._buffers["running_mean"], norm._buffers["running_var"] = mean, variance
        with torch.no_grad():
            for buffer, version, kept_buffer in buffers:
                if buffer._version != version:  # a forward of the model's own wrote to it
                    buffer.copy_(kept_buffer)
        for module, training in modes:
            module.training = training


def _use_batch_statistics(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Give a BatchNorm in evaluation mode this input's statistics in place of its buffers (which are put back)."""
    x: Tensor = inputs[0]
    with torch.no_grad():
        axes = [axis for axis in range(x.ndim) if axis != 1]
        variance, mean = torch.var_mean(x.float() if x.dtype in (torch.half, torch.bfloat16) else x, axes, correction=0)
        norm._buffers["running_mean"], norm._buffers["running_var"] = mean, variance
