r"""Minimum sharpness: the smallest Hessian trace over all networks with the same function.

    granularity="layer":   MS(θ) = min_t Σ_p c_p e^{−2 (B t)_p}
    granularity="neuron":  MS(θ) = min_t Σ_p Σ_{j,i} C_p,ji e^{−2 (u_j − v_i)(t)}

over the layer-wise scale group log α = B t of the network, or over that of its single hidden units (channels), with c_p
the traces and C_p the diagonals of the Hessian's blocks.  Weights that a normaliser makes scale-free are held at unit
norm (per output on average, or each output): their trace alone could be made as small as one likes.  For a bias-free
chain of D layers the first is the paper's D (Π_d c_d)^{1/D}; without normalisers the second is never larger.

Source: arXiv 2106.12612, Definition of minimum sharpness and Thm 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from ..balancing import balance, balance_neurons
from ..batch import peek
from ..curvature import hessian_diagonal, hessian_trace
from ..symmetry import NeuronGroup, ScaleGroup, neuron_symmetries, scale_symmetries
from .value import Sharpness


def minimum_sharpness(
    model: nn.Module,
    data: Any,
    columns: int | None = None,  # r: exact columns of S per sample; None: all
    group: ScaleGroup | NeuronGroup | None = None,
    granularity: Literal["layer", "neuron"] = "layer",
) -> Sharpness:
    r"""Minimum sharpness, :math:`\min_t \sum_p c_p e^{-2 (B t)_p}`: a trace, in units of loss per squared weight.

    Unchanged by every element of the scale group. Without a symmetry it is the trace (and a warning is given).

    Args:
        model: A classifier; measured in evaluation mode, unchanged.
        data: Inputs or batches, as in :func:`ms_optim.hessian_trace`.
        columns: ``None`` is exact; ``r`` samples the traces (the minimum of noisy traces is biased downwards a little).
        group: The group; discovered on the first batch if ``None``.
        granularity: What is rescaled: whole layers, or single hidden units.

    Returns:
        The minimum, with each parameter's part in ``layers`` (for layers), the trace itself in ``details["trace"]``
        and notes.

    Raises:
        SymmetryError: If the model cannot be read, or the group is another model's.
        CurvatureError: If a parameter has no curvature rule, or a trace is not finite.
        DataError: If data is not batches, is empty or not finite.
        ValueError: If the granularity is unknown, or not the group's.

    Source: arXiv 2106.12612.
    """
    if granularity not in ("layer", "neuron"):
        raise ValueError(f"granularity must be 'layer' or 'neuron', got {granularity!r}")
    expected = ScaleGroup if granularity == "layer" else NeuronGroup
    if group is not None and not isinstance(group, expected):
        raise ValueError(
            f"granularity={granularity!r} rescales by a {expected.__name__}, and the group is a "
            f"{type(group).__name__}; pass the other granularity, or no group"
        )
    example, data = peek(data, model)
    if granularity == "neuron":
        units = group if isinstance(group, NeuronGroup) else neuron_symmetries(model, example)
        balanced = balance_neurons(model, hessian_diagonal(model, data, columns), units)
        details = {"trace": balanced.trace, "residual": balanced.residual, "units": float(units.units)}
        return Sharpness(balanced.minimum_sharpness, notes=balanced.notes, details=details)
    layers = group if isinstance(group, ScaleGroup) else scale_symmetries(model, example)
    traces = hessian_trace(model, data, columns)
    found = balance(model, traces, layers)
    parts = {name: traces[name] * math.exp(-2 * a) for name, a in found.log_scale.items() if name in traces}
    return Sharpness(found.minimum_sharpness, layers=parts, notes=found.notes, details={"trace": found.trace})
