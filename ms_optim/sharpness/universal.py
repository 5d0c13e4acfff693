r"""The universal class of sharpness measures: S = φ( E_{v ~ μ} ψ( ½ vᵀ H v ) ).

A member is a choice of (φ, ψ, μ):

    trace             φ = ψ = id, v ~ N(0, I)                                      S = ½ Tr H
    Frobenius norm    ψ(t) = (t, t²), φ(a, b) = ½ (b − a²), v ~ N(0, I)            S = ½ Var ½ vᵀHv = ¼ ‖H‖_F²
    determinant       ψ(t) = e^{−t/2}, φ(s) = s^{−2}, v uniform in [−1, 1]^d       S ∝ det H, where H is large there

Source: Tahmasebi et al., arXiv 2406.03682, Definition of the class, and the authors' code for the determinant's ψ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature.operator import seeded, whole_number
from ..curvature.products import Matrix, curvature_of
from ..curvature.risk import Loss
from .value import Sharpness

Measure = Literal["normal", "uniform"]


@dataclass(frozen=True)
class Member:
    """A member of the class.

    Attributes:
        name: Its name.
        psi: ψ: numbers ``[n]`` to ``[n]`` or ``[n, k]``, differentiable.
        phi: φ: the mean of ψ over the samples, ``[]`` or ``[k]``, and n (for a correction of bias), to one number.
        measure: μ: ``"normal"``, or ``"uniform"`` in [−1, 1]^d.
        least: The smallest number of samples that it makes sense for.
    """

    name: str
    psi: Callable[[Tensor], Tensor]
    phi: Callable[[Tensor, int], Tensor]
    measure: Measure = "normal"
    least: int = 1

    def value(self, quadratic: Sequence[float]) -> float:
        """φ( (1/n) Σ ψ(t_i) ).

        Args:
            quadratic: t, one per sample.

        Returns:
            The number.
        """
        t = torch.tensor(quadratic, dtype=torch.float64)
        return float(self.phi(self.psi(t).mean(0), len(quadratic)))

    def slopes(self, quadratic: Sequence[float]) -> list[float]:
        """∂/∂t_i φ( (1/n) Σ ψ(t_i) ).

        Args:
            quadratic: t, one per sample.

        Returns:
            One number per sample.
        """
        with torch.enable_grad():
            t = torch.tensor(quadratic, dtype=torch.float64, requires_grad=True)
            value = self.phi(self.psi(t).mean(0), len(quadratic))
            (found,) = torch.autograd.grad(value, t)
        return [float(slope) for slope in found]


def _moments(t: Tensor) -> Tensor:
    return torch.stack([t, t * t], dim=-1)


TRACE = Member("trace", lambda t: t, lambda mean, n: mean)
#: ½ Var t, unbiased: with t = ½ vᵀHv that is ¼ ‖H‖_F².
FROBENIUS = Member(
    "frobenius", _moments, lambda mean, n: 0.5 * (mean[1] - mean[0].square()) * n / max(1, n - 1), least=2
)
DETERMINANT = Member("determinant", lambda t: (-0.5 * t).exp(), lambda mean, n: mean**-2, "uniform")


def universal_sharpness(
    model: nn.Module,
    data: Any,
    member: Member,
    probes: int = 100,  # n
    parameters: Sequence[str] | None = None,
    matrix: Matrix = "hessian",
    loss: Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""A member of the class, :math:`\phi(\frac1n \sum_i \psi(\tfrac12 v_i^\top H v_i))` for v_i from μ.

    With μ normal it is a function of the eigenvalues alone, so unchanged by every orthogonal change of coordinates,
    such as a permutation of units.  Not, in general, by rescalings.

    The standard error is by the delta method, the spread of ∇φ · ψ(t_i) over √n, with ∇φ by autograd.  A φ that is not
    linear biases the value by O(1/n).  :data:`FROBENIUS` is unbiased, but its relative error is at least √(2/n): for
    that norm take :func:`frobenius_sharpness`.  With :data:`DETERMINANT` the mean of e^{−t/2} is over a cube: it has to
    do with a determinant only where the cube cuts nothing off.

    Cost: n products with the matrix, each of the time of 3 to 9 gradients.

    Args:
        model: Measured in evaluation mode, unchanged.
        data: ``(inputs, targets)`` or an iterable of those, as in :func:`ms_optim.hessian_trace`; the Gauss-Newton
            matrix needs no targets.
        member: :data:`TRACE`, :data:`FROBENIUS`, :data:`DETERMINANT`, or one of your own.
        probes: n, at least ``member.least``.
        parameters: Names, for the block of these parameters; ``None``: of all that are trainable.
        matrix: ``"hessian"`` or ``"gauss-newton"``.
        loss: As in :func:`ms_optim.curvature.approximations.hutchinson_diagonal`.
        generator: Draws v; by default a fresh one with a fixed seed.

    Returns:
        The value, with its ``standard_error`` (NaN for one probe).

    Raises:
        CurvatureError: If no parameter is trainable, or a product is not finite.
        DataError: If data is not batches, or lacks targets.
        UnsupportedError: If the loss is not supported.
        ValueError: If a number or a name is out of range.

    Source: arXiv 2406.03682.

    >>> net = torch.nn.Linear(1, 1, bias=False)  # H = 2, and t = v² for v normal
    >>> sharpness = universal_sharpness(net, (torch.ones(1, 1), torch.ones(1, 1)), TRACE, probes=1000, loss="mse")
    >>> abs(sharpness - 1.0) < 4 * sharpness.standard_error
    True
    """
    whole_number("probes", probes, member.least)
    generator = seeded(generator)
    with curvature_of(model, data, loss, matrix) as curvature:
        operator = curvature.block(parameters)
        quadratic: list[float] = []
        for count in operator.together(probes):
            v = operator.draw(count, generator, member.measure)
            quadratic += (0.5 * (v * operator(v)).sum(1)).tolist()
        details = {"dimension": operator.dimension, "products": curvature.products}
        return Sharpness(member.value(quadratic), standard_error=_delta_error(member, quadratic), details=details)


def _delta_error(member: Member, quadratic: Sequence[float]) -> float:
    """The standard deviation over samples of φ'(mean ψ) · ψ(t_i), over √n."""
    n = len(quadratic)
    if n < 2:
        return math.nan
    psi = member.psi(torch.tensor(quadratic, dtype=torch.float64)).detach()
    with torch.enable_grad():
        mean = psi.mean(0).requires_grad_()
        (slope,) = torch.autograd.grad(member.phi(mean, n), mean)
    return float((psi * slope).reshape(n, -1).sum(1).std()) / math.sqrt(n)


def frobenius_sharpness(
    model: nn.Module,
    data: Any,
    probes: int = 100,  # m
    parameters: Sequence[str] | None = None,
    matrix: Matrix = "hessian",
    loss: Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""The squared Frobenius norm, :math:`\|H\|_F^2 = E\|Hv\|^2` for signs v: an unbiased estimate, never negative.

    The variance of one probe is 2 Σ_{i≠j} (H²)_ij², at most 2 Σ λ⁴: smaller than that of a variance of vᵀHv, which the
    member :data:`FROBENIUS` takes because an optimizer has no H v.

    Unchanged by orthogonal changes of coordinates, such as a permutation of units; not by rescalings.

    Cost: m products with the matrix, each of the time of 3 to 9 gradients; for d ≤ m parameters d products, and
    the value is exact.

    Args:
        model: Measured in evaluation mode, unchanged.
        data: ``(inputs, targets)`` or an iterable of those, as in :func:`ms_optim.hessian_trace`; the Gauss-Newton
            matrix needs no targets.
        probes: m.
        parameters: Names, for the block of these parameters; ``None``: of all that are trainable.
        matrix: ``"hessian"`` or ``"gauss-newton"``.
        loss: As in :func:`ms_optim.curvature.approximations.hutchinson_diagonal`.
        generator: Draws v; by default a fresh one with a fixed seed.

    Returns:
        The value, in units of squared loss per fourth power of weight, with its ``standard_error`` (0 if exact, NaN for
        one probe); ``layers`` has each parameter's rows, Σ_{i∈p} Σ_j H_ij², which add up to the value.

    Raises:
        CurvatureError: If no parameter is trainable, or a product is not finite.
        DataError: If data is not batches, or lacks targets.
        UnsupportedError: If the loss is not supported.
        ValueError: If a number or a name is out of range.

    Source: arXiv 2406.03682 for the measure; its code (``custom_hessian``) for E‖Hv‖², with Gaussian v.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> frobenius_sharpness(net, (torch.ones(1, 1), torch.ones(1, 1)), loss="mse")  # H = 2
    4.0
    """
    whole_number("probes", probes)
    generator = seeded(generator)
    with curvature_of(model, data, loss, matrix) as curvature:
        names = curvature.chosen(parameters)
        operator = curvature.block(names)
        exact = operator.dimension <= probes
        sizes = [curvature.parameters[name].numel() for name in names]
        if exact:
            parts = [part.square().sum() for part in operator.dense().split(sizes)]
            samples = torch.stack(parts)[None]
        else:
            found = []
            for count in operator.together(probes):
                squares = operator(operator.draw(count, generator)).square()
                found.append(torch.stack([part.sum(1) for part in squares.split(sizes, 1)], 1))
            samples = torch.cat(found)
        totals = samples.sum(1)
        error = 0.0 if exact else math.nan if probes == 1 else float(totals.std()) / math.sqrt(probes)
        return Sharpness(
            float(totals.mean()),
            standard_error=error,
            layers=dict(zip(names, samples.mean(0).tolist(), strict=True)),
            details={"dimension": operator.dimension, "products": curvature.products},
        )
