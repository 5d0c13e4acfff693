r"""Minimum sharpness: the smallest Hessian trace over all networks with the same function.

    MS(θ) = min_t Σ_p c_p e^{−2 (B t)_p}

over the layer-wise scale group log α = B t of the network, with weights that a normaliser makes scale-free held at unit
norm per output on average (their trace alone could be made as small as one likes).  For a bias-free chain of D layers
this is the paper's D (Π_d c_d)^{1/D}.

Source: arXiv 2106.12612, Definition of minimum sharpness and Thm 1.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..balancing import balance
from ..batch import peek
from ..curvature import hessian_trace
from ..symmetry import ScaleGroup, scale_symmetries


def minimum_sharpness(
    model: nn.Module,
    data: Any,
    columns: int | None = None,  # r: exact columns of S per sample; None: all
    group: ScaleGroup | None = None,
) -> float:
    r"""Minimum sharpness, :math:`\min_t \sum_p c_p e^{-2 (B t)_p}`: a trace, in units of loss per squared weight.

    Unchanged by every element of the scale group. Without a symmetry it is the trace (and a warning is given).

    Args:
        model: A classifier; measured in evaluation mode, unchanged.
        data: Inputs or batches, as in :func:`ms_optim.hessian_trace`.
        columns: ``None`` is exact; ``r`` samples the traces (the minimum of noisy traces is biased downwards a little).
        group: The scale group; discovered on the first batch if ``None``.

    Returns:
        The minimum.

    Raises:
        SymmetryError: If the model cannot be read, or the group is another model's.
        CurvatureError: If a parameter has no curvature rule, or a trace is not finite.
        DataError: If data is not batches, is empty or not finite.

    Source: arXiv 2106.12612.
    """
    example, data = peek(data, model)
    group = scale_symmetries(model, example) if group is None else group
    return balance(model, hessian_trace(model, data, columns), group).minimum_sharpness
