r"""The largest eigenvalue of the curvature, λ_max = max_v vᵀ H v / ‖v‖²: the sharpest direction.

It is what SAM's ascent looks for to second order, and what a step of gradient descent must not exceed (lr < 2/λ_max).
Lanczos finds it from products alone, and ‖Hv − λv‖ proves how near an eigenvalue is.

Source: Parlett, "The symmetric eigenvalue problem", 1998.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..curvature.operator import seeded, whole_number
from ..curvature.products import Matrix, curvature_of
from ..curvature.risk import Loss
from ..curvature.spectrum import Eigenpairs, extreme_eigenpairs
from .value import Sharpness


def top_eigenvalue(
    model: nn.Module,
    data: Any,
    count: int = 1,
    parameters: Sequence[str] | None = None,
    matrix: Matrix = "hessian",
    tolerance: float = 1e-4,
    products: int = 200,
    loss: Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""The largest eigenvalue, :math:`\lambda_{\max}(H)`, by Lanczos, with a proven bound on its error.

    Unchanged by orthogonal changes of coordinates, such as a permutation of units; not by rescalings.

    Cost: as many products as it takes (usually 10 to 40), each of the time of 3 to 9 gradients; at most 40
    vectors of d float64 numbers are kept.

    Args:
        model: Measured in evaluation mode, unchanged.
        data: ``(inputs, targets)`` or an iterable of those, as in :func:`ms_optim.hessian_trace`; the Gauss-Newton
            matrix needs no targets.
        count: How many of the largest eigenvalues.
        parameters: Names, for the block of these parameters; ``None``: of all that are trainable.
        matrix: ``"hessian"`` or ``"gauss-newton"``.
        tolerance: The residual to reach, as a part of the eigenvalue of largest magnitude. The error is then about the
            residual's square over the distance to the next eigenvalue.
        products: The number of products after which to stop.
        loss: As in :func:`ms_optim.curvature.approximations.hutchinson_diagonal`.
        generator: Draws the start; by default a fresh one with a fixed seed.

    Returns:
        The largest eigenvalue, in units of loss per squared weight. In ``details``: ``residual``, ‖Hv − λv‖, within
        which an eigenvalue lies (to the products' own rounding); ``eigenvalue 2``, ``residual 2``, … for the others;
        ``dimension``, ``products``. A note says so where the tolerance was not reached.

    Raises:
        CurvatureError: If no parameter is trainable, or a product is not finite.
        DataError: If data is not batches, or lacks targets.
        UnsupportedError: If the loss is not supported.
        ValueError: If a number or a name is out of range.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> round(top_eigenvalue(net, (torch.tensor([[3.0, 4.0]]), torch.ones(1, 1)), loss="mse"), 4)  # 2 ‖x‖²
    50.0
    """
    whole_number("count", count)
    checked_search(tolerance, products)
    with curvature_of(model, data, loss, matrix) as curvature:
        operator = curvature.block(parameters)
        if count > operator.dimension:
            raise ValueError(f"count must be at most the {operator.dimension} parameters of the block, got {count}")
        found = extreme_eigenpairs(operator, count, seeded(generator), "largest", tolerance, products)
        others = {
            f"{what} {place}": number
            for what, numbers in (("eigenvalue", found.values), ("residual", found.residuals))
            for place, number in enumerate(numbers[1:], 2)
        }
        return Sharpness(
            found.values[0],
            notes=not_converged(found, tolerance),
            details={
                "residual": found.residuals[0],
                **others,
                "dimension": operator.dimension,
                "products": curvature.products,
            },
        )


def checked_search(tolerance: float, products: int) -> None:
    """Refuse numbers that no search for an eigenvalue can go by.

    Args:
        tolerance: The residual to reach.
        products: The number of products.

    Raises:
        ValueError: If one is out of range.
    """
    if not (tolerance > 0.0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance must be > 0 and finite, got {tolerance}; the default is 1e-4")
    whole_number("products", products)


def not_converged(found: Eigenpairs, tolerance: float) -> list[str]:
    """What to say of a search that stopped early.

    Args:
        found: What it found.
        tolerance: The residual that was to be reached.

    Returns:
        At most one note.
    """
    if found.converged:
        return []
    worst = max(found.residuals)
    return [
        f"not converged: a residual is {worst:.3g} after {found.products} products, for a tolerance of {tolerance:g} "
        "of the largest eigenvalue; allow more products, or measure in float64 with model.double()"
    ]
