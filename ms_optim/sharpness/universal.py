r"""The universal class of sharpness measures: S = φ( E_{v ~ μ} ψ( ½ vᵀ H v ) ).

A member is a choice of (φ, ψ, μ):

    trace                     φ = ψ = id, v ~ N(0, I)                       S = ½ Tr H
    Frobenius norm            ψ(t) = (t, t²), φ(a, b) = 2 (b − a²), v ~ N(0, I)   S = ‖H‖_F²
    determinant               ψ(t) = e^{−t/2}, φ(s) = s^{−2}, v uniform     S ∝ det H, where H is large in the cube

Source: Tahmasebi et al., arXiv 2406.03682, Definition of the class, and the authors' code for the determinant's ψ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
