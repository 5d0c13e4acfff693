r"""Tilted SAM (TSAM): many perturbations, the worse the loss at one, the more its gradient counts.

    ε_j = z_j + ρ M g_j / √⟨g_j, M g_j⟩ ,  g_j = ∇L(W + z_j) ,  z_j ~ N(0, σ² M) ,  j = 1 … s
    step along Σ_j softmax(t L_j) ∇L(W + ε_j) ,  L_j = L(W + ε_j)

is the gradient of L^t = (1/t) log E exp(t L(W + ε)) over s points: t = 0 is their mean, t → ∞ the worst of them.  2s
passes a step.  Each pass's loss has to be known: ``step(closure)`` does it, in explicit passes set
``gradient_pass.loss``.

Source: Li et al., arXiv 2410.22656, eq. 2, with the sampling of the authors' code ("random1": noise, then a SAM step
from there), whose noise is clipped and scaled otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine import Plan, SharpnessAware
from ..gradient_pass import Probe
from ..gradients import Gradients, inner, plus, weighted_sum
from ..noise import deviations, noise
from ..perturbation import Perturbation, Scaled
from ..requirements import require_count, require_nonnegative
from ..sam import ascent


def tilted_weights(losses: list[float], tilt: float) -> list[float]:
    """softmax(t L).

    Args:
        losses: L, one per point.
        tilt: t.

    Returns:
        Weights that sum to 1; equal ones where a loss is not finite.
    """
    if not all(math.isfinite(loss) for loss in losses):
        return [1.0 / len(losses)] * len(losses)
    largest = max(tilt * loss for loss in losses)
    exponentials = [math.exp(tilt * loss - largest) for loss in losses]
    return [e / sum(exponentials) for e in exponentials]


def shifted(drawn: list[Tensor | None], found: Perturbation) -> list[Tensor | None]:
    """z + ε.

    Args:
        drawn: z, per parameter.
        found: ε.

    Returns:
        Their sum.
    """
    if found is None or not isinstance(found, Scaled):
        return drawn
    with torch.no_grad():
        scale = 1.0 if found.scale is None else found.scale
        # (0 times what is not finite is not 0)
        products = [None if d is None else (d * (scale * f)).nan_to_num(0.0, 0.0, 0.0) for d, f in zip(
            found.directions, found.factors, strict=True)]
        return [plus(z, product) for z, product in zip(drawn, products, strict=True)]


class TiltedSAM(SharpnessAware):
    r"""SAM at s noisy points, their gradients weighted by softmax(t · loss); 2s passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius of SAM's step from each point.
        sigma: σ ≥ 0, the standard deviation of the noise; 0 with one sample is SAM, and with ρ = 0 the base optimizer.
        tilt: t ≥ 0.
        samples: s ≥ 1.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's, or, in a step, a pass's loss is not known.
        ValueError: If a number is out of range.

    Source: arXiv 2410.22656, eq. 2.
    """

    combines_passes = is_of_all_ranks = True

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        sigma: float = 0.01,  # σ
        tilt: float = 1.0,  # t
        samples: int = 3,  # s
        **options: Any,
    ) -> None:
        require_nonnegative("sigma", sigma)
        require_nonnegative("tilt", tilt)
        require_count("samples", samples)
        super().__init__(model_or_params, base, {"rho": rho, "sigma": sigma}, **options)
        self.tilt, self.samples = tilt, samples

    def plan(self) -> Plan:
        """See the base class."""
        rho, sigma = self.radii(), self.setting("sigma")
        if not any(rho) and not any(sigma):
            yield None
            return
        losses: list[float] = []
        found: list[Gradients] = []
        overflowed: Gradients | None = None
        ones = [1.0] * len(rho)
        for _ in range(self.samples):
            drawn: list[list[Tensor | None]] = []

            def draw(drawn: list[list[Tensor | None]] = drawn) -> list[Tensor | None]:
                spread = deviations([s * s for s in sigma], self.scales("weights"))
                drawn.append(noise(self, spread))
                return drawn[0]

            if any(rho):
                yield Probe(draw)
                if self.expects_overflow and not math.isfinite(inner(self.gradients(), self.gradients(), ones)):
                    overflowed = self.held_gradients()  # which the loss scaler is to see in the end
                step = ascent(self.gradients(), self.scales("weights"), rho, self.expects_overflow)
                # (A loss of no module, in the first step: noise waits for a model that could be called, in vain.)
                yield shifted(drawn.pop() if drawn else [None] * len(rho), step)
            else:
                yield draw
            losses.append(self.loss_found())
            found.append(self.held_gradients())
        signed: dict[float, Gradients] = {}
        for sign in set(self.signs()):  # where the base optimizer ascends, the objective is −L
            total: Gradients = []
            for weight, grads in zip(tilted_weights(losses, sign * self.tilt), found, strict=True):
                total = weighted_sum(total, grads, weight)
            signed[sign] = total
        mixed = [signed[sign][i] for i, sign in enumerate(self.signs())]
        self.set_gradients(mixed if overflowed is None else overflowed)
