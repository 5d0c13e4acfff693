"""Rebalance: discover, trace, solve, rescale — from any network to its canonical representative, in one call."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..batch import peek
from ..curvature import hessian_trace
from ..symmetry import ScaleGroup, scale_symmetries
from .solve import Balance, balance


def rebalance_(
    model: nn.Module,
    data: Any,
    optimizer: Optimizer | None = None,
    columns: int | None = None,  # r: exact columns of S per sample; None: all
    group: ScaleGroup | None = None,
    gauge: float = 0.0,  # κ
) -> Balance:
    """Rescale the model to the equivalent network with the smallest Hessian trace; the function is unchanged.

    The same as ``hessian_trace``, ``balance`` and ``group.rescale_`` one after the other; weights, running statistics,
    gradients and the optimizer's state move together, or, if anything raises, not at all.

    Args:
        model: The model; changed in place.
        data: Inputs or batches, as in :func:`ms_optim.hessian_trace`.
        optimizer: An optimizer whose state moves along.
        columns: ``None`` is exact; ``r`` samples the traces.
        group: The scale group; discovered on the first batch if ``None``.
        gauge: κ ∈ [0, 1], as in :func:`ms_optim.balance`.

    Returns:
        The balance that was applied: ``.log_scale`` says by how much each parameter was rescaled.

    Raises:
        SymmetryError: If the model cannot be read, or the group is another model's.
        CurvatureError: If a parameter has no curvature rule, or a trace is not finite.
        UnsupportedError: If the optimizer holds state of a kind that is not known to transform.

    Source: arXiv 2106.12612, Thm 1.
    """
    example, data = peek(data, model)
    group = scale_symmetries(model, example) if group is None else group
    traces = hessian_trace(model, data, columns)
    found = balance(model, traces, group, gauge)
    t = group.bound(model, found.t)
    found = found if bool((t == found.t).all()) else found.at(t)
    group.rescale_(model, t, optimizer)
    return found
