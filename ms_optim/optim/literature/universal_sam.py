r"""Universal SAM: descend along the gradient of L + λ ρ² φ(E ψ((L(W + ρ v) − L(W)) / ρ²)), v ~ μ.

With one mini-batch for the loss here and at n random points, d_i = (L_i − L_0) / ρ²,

    g = g_0 + λ Σ_i c_i (g_i − g_0) ,   c_i = ∂R/∂d_i ,   R = φ( (1/n) Σ_i ψ(d_i) )

in 1 + n passes.  Members (φ, ψ, μ) are :class:`ms_optim.sharpness.Member`; two have classes of their own:

    FrobSAM   R = ½ Var d, v ~ N(0, I):  g = g_0 + (λ/ρ²) Cov(L_i, g_i), the gradient of
              L + (λ / 2ρ²) Var L(W + ρ v) ≈ L + (λ/2) ‖g‖² + (λ ρ²/4) ‖H‖_F²
    DetSAM    ψ(t) = e^{−t/2}, φ(s) = s^{−2}, ρ v uniform in [−h, h]^d, d_i = L_i − L_0: with n = 1,
              g = g_0 + λ e^{L_1 − L_0} (g_1 − g_0)

Each pass's loss has to be known: ``step(closure)`` does it, in explicit passes set ``gradient_pass.loss``.  Noise is
drawn at the representative where there is one: √w_p v.

Source: Tahmasebi et al., arXiv 2406.03682, and the authors' code (classes ISAM, FROSAM).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...errors import NonFiniteWarning
from ...sharpness.universal import DETERMINANT, FROBENIUS, Member
from ..engine import Plan, SharpnessAware
from ..gradients import Gradients, weighted_sum
from ..noise import deviations, noise
from ..requirements import require_count


def universal_gradient(
    here: Gradients,
    there: list[Gradients],
    slopes: list[float],  # c
    strength: list[float],  # λ
) -> Gradients:
    """g_0 + λ_p Σ_i c_i (g_i − g_0).

    Args:
        here: g_0.
        there: g_i, one list per sample.
        slopes: c, one per sample.
        strength: λ, per parameter.

    Returns:
        The direction.
    """
    total = weighted_sum([], here, -sum(slopes))
    for slope, grads in zip(slopes, there, strict=True):
        total = weighted_sum(total, grads, slope)
    with torch.no_grad():
        scaled = [None if t is None else t * s for t, s in zip(total, strength, strict=True)]
    return weighted_sum(list(here), scaled, 1.0)


class _AtRandomPoints(SharpnessAware):
    """What the members have in common: a gradient here, and at n random points."""

    combines_passes = is_of_all_ranks = True
    member: Member
    samples: int
    unit: bool  # whether d is L_i − L_0, and not over ρ²

    def plan(self) -> Plan:
        """See the base class."""
        strength, rho = self.setting("strength"), self.setting("rho")
        if not any(strength) or not any(rho):
            yield None
            return
        yield None
        base, here = self.loss_found(), self.held_gradients()
        losses: list[float] = []
        there: list[Gradients] = []
        kind = self.member.measure
        for _ in range(self.samples):
            yield noise(self, deviations([r * r for r in rho], self.scales("weights")), kind)
            losses.append(self.loss_found())
            there.append(self.held_gradients())
        square = 1.0 if self.unit else max(rho) ** 2
        differences = [(loss - base) / square for loss in losses]
        # Where the base optimizer ascends, the objective is −L.
        signed = {sign: self.member.slopes([sign * d for d in differences]) for sign in sorted(set(self.signs()))}
        usable = all(math.isfinite(slope) for slopes in signed.values() for slope in slopes)
        if not usable and not self.expects_overflow:  # which a scaler is to see
            message = "a loss at a random point is not finite, or too large; this step goes on without the penalty"
            warnings.warn(message, NonFiniteWarning, stacklevel=2)
            self.set_gradients(here)
        else:
            found = {sign: universal_gradient(here, there, slopes, strength) for sign, slopes in signed.items()}
            self.set_gradients([found[sign][i] for i, sign in enumerate(self.signs())])


class UniversalSAM(_AtRandomPoints):
    r"""SGD on :math:`L + λ ρ^2 φ(E\, ψ((L(W + ρ v) - L(W)) / ρ^2))`; 1 + n passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        member: (φ, ψ, μ).
        rho: ρ ≥ 0, the size of the noise; of several groups the largest is the one that losses are divided by.
        strength: λ ≥ 0; 0 is the base optimizer, in one pass.
        samples: n.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none),
            ``seed``, and the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's, or, in a step, a pass's loss is not known.
        ValueError: If a number is out of range.

    Source: arXiv 2406.03682, general algorithm.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        member: Member = FROBENIUS,
        rho: float = 0.005,  # ρ
        strength: float = 0.005,  # λ
        samples: int = 2,  # n
        **options: Any,
    ) -> None:
        require_count("samples", samples, member.least)
        super().__init__(model_or_params, base, {"rho": rho, "strength": strength}, **options)
        self.member, self.samples, self.unit = member, samples, False


class FrobSAM(_AtRandomPoints):
    r"""SGD on :math:`L + (λ / 2ρ^2) \mathrm{Var}\, L(W + ρ v)`, hence against :math:`\|H\|_F^2`; 1 + n passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the standard deviation of the noise.
        strength: λ ≥ 0; 0 is the base optimizer, in one pass.
        samples: n ≥ 2.
        **options: As in :class:`UniversalSAM`.

    Raises:
        OptimizerError: As in :class:`UniversalSAM`.
        ValueError: If a number is out of range.

    Source: arXiv 2406.03682, Frob-SAM; the authors' code (ρ = λ = 0.005, n = 2 for CIFAR-10).
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.005,  # ρ
        strength: float = 0.005,  # λ
        samples: int = 2,  # n
        **options: Any,
    ) -> None:
        require_count("samples", samples, 2)
        super().__init__(model_or_params, base, {"rho": rho, "strength": strength}, **options)
        self.member, self.samples, self.unit = FROBENIUS, samples, False


class DetSAM(_AtRandomPoints):
    r"""SGD on the loss and the determinant of the Hessian, sampled; 1 + n passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: h ≥ 0, half the side of the cube that the points lie in.
        strength: λ ≥ 0; 0 is the base optimizer, in one pass.
        samples: n.
        **options: As in :class:`UniversalSAM`.

    Raises:
        OptimizerError: As in :class:`UniversalSAM`.
        ValueError: If a number is out of range.

    Source: arXiv 2406.03682, Det-SAM; the authors' code (h = 0.01, ρ = 1 there, λ = 1, n = 1).
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.01,  # h
        strength: float = 1.0,  # λ
        samples: int = 1,  # n
        **options: Any,
    ) -> None:
        require_count("samples", samples)
        super().__init__(model_or_params, base, {"rho": rho, "strength": strength}, **options)
        self.member, self.samples, self.unit = DETERMINANT, samples, True
