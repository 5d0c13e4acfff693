r"""The log-determinant of the curvature: how much volume a given rise of the loss leaves around the weights.

    ε > 0     log det( I + H₊ / ε ) = Σ_i log( 1 + max(λ_i, 0) / ε )
    ε = None  log det⁺ H            = Σ_{λ_i > rounding} log λ_i            the pseudo-determinant

The matrices of networks are all but singular, and their determinant is 0.  The first form is finite for every H, is
read as an Occam factor (ε the precision of a Gaussian prior), counts the directions whose curvature is above ε, and is
smooth, so that a few Lanczos steps are enough for it.  The second is the logarithm of the product of all eigenvalues
that are not zero; log λ being infinite at the zeros that it leaves out, a quadrature of few steps, which smears them,
is not to be trusted there, and a note says so.  Negative eigenvalues are left out in both.

The paper's measure is det H itself, its code's monitor the mean of ‖v‖² e₁ᵀ log(T_v) e₁ of another paper; neither says
what becomes of eigenvalues that are not positive, and both forms above are this package's.

Source: arXiv 2406.03682 for the determinant as a sharpness; arXiv 2510.07758's code for quadrature of its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.operator import seeded, whole_number
from ..curvature.products import Matrix, curvature_of
from ..curvature.risk import Loss
from ..curvature.spectrum import spectrum
from .value import Sharpness


def logdet_sharpness(
    model: nn.Module,
    data: Any,
    epsilon: float | None = 1e-3,  # ε
    probes: int = 100,  # m
    steps: int = 15,  # k
    parameters: Sequence[str] | None = None,
    matrix: Matrix = "hessian",
    loss: Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""The log-determinant, :math:`\log\det(I + H_+/\varepsilon)`, or :math:`\sum_{\lambda_i > 0} \log\lambda_i`.

    Unchanged by orthogonal changes of coordinates.  The second form is also unchanged by rescalings that keep the
    volume (Σ_p n_p log α_p = 0) while H is positive definite; neither is by other rescalings.

    Cost: m·k products with the matrix, each of the time of 3 to 9 gradients; for d ≤ m·k parameters (and at most
    2048) d products, from which the spectrum is exact.

    Args:
        model: Measured in evaluation mode, unchanged.
        data: ``(inputs, targets)`` or an iterable of those, as in :func:`ms_optim.hessian_trace`; the Gauss-Newton
            matrix needs no targets.
        epsilon: ε > 0, in units of curvature; ``None``: the pseudo-determinant.
        probes: m.
        steps: k.
        parameters: Names, for the block of these parameters; ``None``: of all that are trainable.
        matrix: ``"hessian"``, or ``"gauss-newton"``, which has no negative eigenvalues.
        loss: As in :func:`ms_optim.curvature.approximations.hutchinson_diagonal`.
        generator: Draws the probes; by default a fresh one with a fixed seed.

    Returns:
        The value, with its ``standard_error`` over the probes (0 if exact). In ``details``: ``positive`` and
        ``negative``, the numbers of eigenvalues above and below rounding, ``steps_error`` (the change from half of the
        steps), ``dimension`` and ``products``.

    Raises:
        CurvatureError: If no parameter is trainable, or a product is not finite.
        DataError: If data is not batches, or lacks targets.
        UnsupportedError: If the loss is not supported.
        ValueError: If a number or a name is out of range.

    Source: the module's docstring says what is whose.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> round(logdet_sharpness(net, (torch.ones(1, 1), torch.ones(1, 1)), epsilon=2.0, loss="mse"), 6)  # H = 2: log 2
    0.693147
    """
    if epsilon is not None and not (epsilon > 0.0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be > 0 and finite, got {epsilon}; None is the pseudo-determinant")
    whole_number("probes", probes)
    whole_number("steps", steps)

    def logarithm(x: Tensor) -> Tensor:
        if epsilon is None:
            return torch.where(x > 0.0, x, 1.0).log()
        return torch.log1p(x.clamp_min(0.0) / epsilon)

    with curvature_of(model, data, loss, matrix) as curvature:
        found = spectrum(curvature.block(parameters), probes, steps, seeded(generator))
        value, error = found.trace(logarithm)
        coarse = math.nan if found.coarse is None else found.coarse.trace(logarithm)[0]
        notes = []
        negative = found.trace(lambda x: (x < 0.0).double())[0]
        if negative > 0.0:
            notes.append(f"negative eigenvalues (about {negative:.3g} of {found.dimension}) are left out")
        if epsilon is None and not found.exact:
            notes.append(
                f"the pseudo-determinant by {steps} Lanczos steps is not reliable where eigenvalues are near 0; take "
                "more steps, or an epsilon"
            )
        return Sharpness(
            value,
            standard_error=error,
            notes=notes,
            details={
                "positive": found.trace(lambda x: (x > 0.0).double())[0],
                "negative": negative,
                "steps_error": 0.0 if found.exact else abs(value - coarse),
                "dimension": found.dimension,
                "products": curvature.products,
            },
        )
