r"""The spectral norm of the curvature in units of the tensors' norms: flatness on the quotient by rescalings.

On the manifold of networks modulo W_p ~ α_p W_p, Π α_p = 1, the metric

    g_W(η, ξ) = Σ_p ⟨η_p, ξ_p⟩ / ‖W_p‖²_F

is the same at every representative.  The measure is the largest curvature of the loss along a vector of unit length,

    max_ξ |ξᵀ H ξ| / g_W(ξ, ξ) = ‖ D^{1/2} H D^{1/2} ‖₂ ,        D = diag(‖W_p‖²_F) ,

with H the ordinary Hessian over all parameters together.  A rescaling T turns H into T⁻¹ H T⁻¹ and D into T² D exactly,
so the value does not change, at a minimum or anywhere else, with biases and whatever the group is, as long as each
tensor has one scale.  Rescalings of single units change ‖W_p‖ by no common factor, and the value.

What is whose.  From the authors' code (akshay-r/scale-invariant-flatness): the metric, with weights *and* biases as
tensors of their own; the product ‖W_p‖² (H ξ)_p; the power method on it, whose Rayleigh quotient is reported.  That
finds the eigenvalue of largest magnitude, with its sign; here its magnitude is the value.  The code's experiments on
CIFAR-10 divide by 2 + 2L (L the loss), which is not done here.  The paper's text was not available beyond its abstract
and introduction.  Away from a minimum the Riemannian Hessian of that metric has further terms in the gradient; they are
left out in the code and here.

Source: Rangamani, Nguyen, Kumar, Phan, Chin, Tran, "A scale invariant flatness measure for deep network minima",
arXiv 1902.02434 (ICASSP 2021), through its abstract and its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..curvature.operator import seeded
from ..curvature.products import Matrix, curvature_of
from ..curvature.risk import Loss
from ..curvature.spectrum import extreme_eigenpairs
from .eigenvalue import checked_search, not_converged
from .value import Sharpness


def riemannian_sharpness(
    model: nn.Module,
    data: Any,
    parameters: Sequence[str] | None = None,
    matrix: Matrix = "hessian",
    tolerance: float = 1e-4,
    products: int = 200,
    loss: Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""The scale-invariant spectral norm, :math:`\max_\xi |\xi^\top H \xi| / \sum_p \|\xi_p\|^2 \|W_p\|_F^{-2}`.

    Unchanged by rescalings of layers (of whole tensors); not by rescalings of single units.

    Cost: as many products as it takes (usually 10 to 40), each of the time of 3 to 9 gradients.

    Args:
        model: Measured in evaluation mode, unchanged. A tensor that is 0 has no scale, and its directions none in the
            metric: it drops out.
        data: ``(inputs, targets)`` or an iterable of those, as in :func:`ms_optim.hessian_trace`; the Gauss-Newton
            matrix needs no targets.
        parameters: Names, for the block of these parameters; ``None``: of all that are trainable, biases too.
        matrix: ``"hessian"`` or ``"gauss-newton"``.
        tolerance: The residual to reach, as a part of the value.
        products: The number of products after which to stop.
        loss: As in :func:`ms_optim.curvature.approximations.hutchinson_diagonal`.
        generator: Draws the start; by default a fresh one with a fixed seed.

    Returns:
        The value, in units of loss. In ``details``: ``eigenvalue``, the same with its sign; ``residual``, within which
        an eigenvalue lies; ``dimension``, ``products``. In ``layers``: each tensor's part ‖v_p‖² of the unit vector v
        that attains it, which add up to 1.

    Raises:
        CurvatureError: If no parameter is trainable, or a product is not finite.
        DataError: If data is not batches, or lacks targets.
        UnsupportedError: If the loss is not supported.
        ValueError: If a number or a name is out of range.

    Source: arXiv 1902.02434; the module's docstring says what of it.

    >>> net = torch.nn.Linear(1, 1, bias=False)  # H = 2, and w² = 9
    >>> _ = torch.nn.init.constant_(net.weight, 3.0)
    >>> round(riemannian_sharpness(net, (torch.ones(1, 1), torch.ones(1, 1)), loss="mse"), 4)
    18.0
    """
    checked_search(tolerance, products)
    with curvature_of(model, data, loss, matrix) as curvature:
        names = curvature.chosen(parameters)
        tensors = [curvature.parameters[name].detach() for name in names]
        norms = [float(p.double().norm()) for p in tensors]
        roots = [torch.full((p.numel(),), norm, dtype=torch.float64) for p, norm in zip(tensors, norms, strict=True)]
        operator = curvature.block(names).scaled(torch.cat(roots))
        found = extreme_eigenpairs(operator, 1, seeded(generator), "magnitude", tolerance, products)
        notes = not_converged(found, tolerance)
        still = [name for name, norm in zip(names, norms, strict=True) if norm == 0.0]
        if still:
            notes.append(f"{', '.join(still[:3])}{' …' if len(still) > 3 else ''} is 0 and drops out")
        parts = found.vectors[0].split([p.numel() for p in tensors])
        return Sharpness(
            abs(found.values[0]),
            layers={name: float(part.square().sum()) for name, part in zip(names, parts, strict=True)},
            notes=notes,
            details={
                "eigenvalue": found.values[0],
                "residual": found.residuals[0],
                "dimension": operator.dimension,
                "products": curvature.products,
            },
        )
