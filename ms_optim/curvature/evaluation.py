"""Evaluation: the network whose curvature is measured, without disturbing the one that trains.

The trace belongs to a deterministic function of the parameters in which each sample's logits depend on that sample
alone.  So dropout is off, and BatchNorm's statistics are constants: the running ones for a measurement; for an
optimizer's refresh those that the training forward uses, which are the batch's own unless the module is in evaluation
mode (early in training the running ones are fresh or stale and describe another network).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = Literal["running", "batch", "training"]


class BatchStatistics:
    """The statistics that BatchNorms take from the batch instead of their buffers.

    As long as the model sees whole batches they are computed as it runs.  To run it on parts of a batch with the
    statistics of the whole, one pass over the whole is recorded, and every pass over a part replays it.

    Args:
        norms: The modules that take their statistics from the batch.

    Attributes:
        of_batch: Whether there are any.
    """

    def __init__(self, norms: list[_BatchNorm]) -> None:
        self.of_batch = bool(norms)
        self._recorded: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._used: dict[nn.Module, int] = {}
        self._mode: Literal["live", "record", "replay"] = "live"
        self._hooks = [norm.register_forward_pre_hook(self._before, with_kwargs=True) for norm in norms]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forward passes inside are of the whole batch; those afterwards replay its statistics."""
        self._recorded, self._mode = {}, "record"
        yield
        self._mode = "replay"

    def rewind(self) -> None:
        """A pass over the next part begins."""
        self._used = {}

    def forget(self) -> None:
        """The batch is done."""
        self._recorded, self._mode = {}, "live"

    def remove(self) -> None:
        """Leave the modules."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, norm: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Give a BatchNorm in evaluation mode these statistics in place of its buffers (which are put back)."""
        if self._mode == "replay":
            call = self._used.get(norm, 0)
            self._used[norm] = call + 1
            mean, variance = self._recorded[norm][call]
        else:
            x: Tensor = inputs[0] if inputs else named["input"]
            with torch.no_grad():
                axes = [axis for axis in range(x.ndim) if axis != 1]
                wide = x.float() if x.dtype in (torch.half, torch.bfloat16) else x
                variance, mean = torch.var_mean(wide, axes, correction=0)
                # Kernels want them in the type of the affine parameters, if there are any.
                affine = norm._parameters.get("weight")
                kind = x.dtype if affine is None else affine.dtype
                mean, variance = mean.to(kind), variance.to(kind)
                # A variance that overflows in half precision would silently make all outputs zero.
                variance = variance.masked_fill(variance.isinf(), math.nan)
            if self._mode == "record":
                self._recorded.setdefault(norm, []).append((mean, variance))
        norm._buffers["running_mean"], norm._buffers["running_var"] = mean, variance


def _eagerly() -> AbstractContextManager[Any]:
    """Modules that were compiled in place run as they were written: a compiled graph hides the uses of parameters."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import the compiler takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluation(model: nn.Module, statistics: Statistics = "running") -> Iterator[BatchStatistics]:
    """Run the model in evaluation mode, with gradients, and leave no trace of it.

    Modes, buffers and the random streams are as before on leaving, whatever happens inside; autocast is off, because
    squared norms of half-precision columns under- and overflow.

    Args:
        model: The model.
        statistics: ``"running"``: BatchNorm uses its running statistics (the batch's, where it keeps none).
            ``"batch"``: the batch's own mean and biased variance, held constant. ``"training"``: the batch's own for
            modules in training mode, the running ones for the others.

    Yields:
        The statistics taken from batches; forward passes inside see the evaluation network.

    Raises:
        ValueError: If ``statistics`` is another word.
    """
    if statistics not in ("running", "batch", "training"):
        raise ValueError(f"statistics must be 'running', 'batch' or 'training', got {statistics!r}")
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    norms = [(module, training) for module, training in modes if isinstance(module, _BatchNorm)]
    of_batch = {"running": lambda training: False, "batch": lambda training: True, "training": bool}[statistics]
    own = [norm for norm, training in norms if of_batch(training) or norm.running_mean is None]
    registered = [(module, dict(module._buffers)) for module in modules if module._buffers]
    held = {id(b): b for module in modules for b in module._buffers.values() if b is not None}
    for module in modules:  # an embedding with a largest norm renormalises its weight as it is looked up
        weight = module._parameters.get("weight")
        if weight is not None and vars(module).get("max_norm") is not None:
            held[id(weight)] = weight
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in held.values()]
    taken = BatchStatistics(own)
    where = [p.device for module in modules for p in module._parameters.values() if p is not None]
    devices = {device for device in where if device.type == "cuda"}
    kind = where[0].type if where else "cpu"
    try:
        here = (torch.random.fork_rng(devices=list(devices)), torch.enable_grad(), torch.autocast(kind, enabled=False))
        with here[0], here[1], here[2], _eagerly():
            for module, training in modes:
                if training:  # an assignment is slow, and most measurements are of models in evaluation mode
                    module.training = False
            yield taken
    finally:
        taken.remove()
        for module, own_buffers in registered:  # a forward pass may put others in their place
            module._buffers.update(own_buffers)
        with torch.no_grad():
            for buffer, version, kept_buffer in buffers:
                if buffer._version != version:  # a forward of the model's own wrote to it
                    buffer.copy_(kept_buffer)
        for module, training in modes:
            if module.training is not training:
                module.training = training

