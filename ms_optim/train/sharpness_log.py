"""Sharpness log: the trace of every layer while a network trains, and what it would be at the balanced representative.

Measured on the same training images each time, without augmentation, in evaluation mode.  Nothing is disturbed: modes,
buffers, gradients and random streams are as before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import balance
from ..curvature import hessian_trace
from ..errors import MsOptimError
from ..optim.distributed import gathered
from ..symmetry import ScaleGroup, scale_symmetries

#: Columns of ``sharpness.csv``: one row per epoch and parameter, and one for the whole network.
COLUMNS = ("epoch", "parameter", "trace", "log_scale", "balanced_trace")
WHOLE = "(all)"


@dataclass(frozen=True)
class Measured:
    """What one epoch's measurement found.

    Attributes:
        trace: Tr H, summed over the parameters.
        minimum: Minimum sharpness; ``nan`` where the network's symmetries cannot be read.
        rows: As :data:`COLUMNS` has them.
    """

    trace: float
    minimum: float
    rows: list[list[Any]]


class SharpnessLog:
    """Measures a network now and then.

    Args:
        model: The plain module, before it is sharded: its graph is read once, here.
        images: What it is measured on, ``[N, C, H, W]``.
        columns: Exact columns of each sample; ``None``: all.
    """

    def __init__(self, model: nn.Module, images: Tensor, columns: int | None) -> None:
        self.images, self.columns = images, columns
        self.group: ScaleGroup | None = None
        self.reason = ""
        try:
            self.group = scale_symmetries(model, images[:2])
        except MsOptimError as error:
            self.reason = " ".join(str(error).split())

    def measure(self, model: nn.Module, epoch: int) -> Measured:
        """Measure.

        Args:
            model: The plain module, sharded or not; where it is sharded, all ranks have to ask.
            epoch: For the rows.

        Returns:
            What was found.
        """
        generator = torch.Generator(self.images.device).manual_seed(epoch)
        with gathered(model):
            traces = hessian_trace(
                model, self.images, self.columns, generator=generator, max_memory="pass", progress=False
            )
            found = None if self.group is None else balance(model, traces, self.group)
        scales = {} if found is None else found.log_scale
        minimum = math.nan if found is None else found.minimum_sharpness
        rows: list[list[Any]] = [[epoch, WHOLE, traces.total, math.nan, minimum]]
        for name, trace in traces.items():
            scale = math.nan if found is None else scales.get(name, 0.0)
            rows.append([epoch, name, trace, scale, trace * math.exp(-2 * scale)])
        return Measured(traces.total, minimum, rows)
