r"""The trace as a measure: Tr H = Σ_p Tr H_p, the sum over all parameters, at the network as it is.

It depends on the scaling: a layer multiplied by a has its trace divided by a².  It is what minimum sharpness minimises.

Source: arXiv 2106.12612, Prop. 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..curvature import LayerTraces, hessian_trace
from .value import Sharpness


def trace_sharpness(
    model: nn.Module,
    data: Any,
    columns: int | None = None,  # r: exact columns of S per sample; None: all
    probes: int = 1,  # m
    loss: str | nn.Module = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""Trace of the Hessian, :math:`\sum_p \operatorname{Tr} H_p`, in units of loss per squared weight.

    Args:
        model: A classifier; measured in evaluation mode, unchanged.
        data: Inputs or batches, as in :func:`ms_optim.hessian_trace`; labels are not read.
        columns: ``None`` is exact; ``r`` samples the traces.
        probes: Signed columns for what the r leave; from 2 on the standard error is known.
        loss: As in :func:`ms_optim.hessian_trace`.
        generator: Draws the signs.

    Returns:
        The sum, with the traces of the parameters as ``layers``.

    Raises:
        CurvatureError: If a trace is not finite, or there is no trainable parameter.
        DataError: If data is not batches, is empty or not finite.

    Source: arXiv 2106.12612, Prop. 1.

    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> round(trace_sharpness(net, torch.ones(4, 3)), 6)  # ‖x‖² (1 − 1/K) = 3 / 2
    1.5
    """
    return summed(hessian_trace(model, data, columns, loss=loss, generator=generator, probes=probes))


def summed(traces: LayerTraces) -> Sharpness:
    """Tr H from the traces of all parameters.

    Args:
        traces: As measured.

    Returns:
        The sum. All layers are probed by the same signs, so their errors are not independent: the standard error is the
        bound Σ_p se(c_p) of the triangle inequality.
    """
    approximate = [name for name, kind in traces.kind.items() if kind != "hessian"]
    notes = [f"of {len(approximate)} of {len(traces)} parameters the Gauss-Newton trace"] if approximate else []
    return Sharpness(traces.total, sum(traces.standard_error.values()), traces, notes)
