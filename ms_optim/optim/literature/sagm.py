r"""SAGM: the gradients at the weights and at a point between ascent and descent, averaged.

    ε = (ρ / ‖g‖ − a) g ,      step along (∇L(W) + ∇L(W + ε)) / 2

The objective is L(W) + L_p(W − a ∇L(W)), L_p the loss at SAM's worst point, so that the two gradients come to agree.
In a metric M (the representative's, w = α*^{-2}) g is M g in ε and ‖g‖ = √⟨g, M g⟩.

Source: Wang et al., arXiv 2303.10353, Algorithm 1; the ½ is the authors' code's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..engine import Plan, SharpnessAware
from ..gradient_pass import Probe
from ..gradients import Gradients, combined, inner
from ..perturbation import Perturbation, Scaled, nothing_finite
from ..requirements import require_nonnegative
from ..sam import second_pass


def sagm_ascent(
    grads: Gradients,
    metric: list[float],  # M
    rho: list[float],  # ρ
    alpha: float,  # a
    quiet: bool = False,
) -> Perturbation:
    """ε_p = (ρ_p / √⟨g, M g⟩ − a) M_p g_p.

    Args:
        grads: g, entry by entry; ``None`` where a parameter took no part.
        metric: M.
        rho: The radius of each parameter's group, negative where the base optimizer ascends.
        alpha: a.
        quiet: Whether a gradient that is not finite is to be expected.

    Returns:
        ε, as :func:`ms_optim.optim.sam.ascent` does.
    """
    norm = math.sqrt(inner(grads, grads, metric))
    if not math.isfinite(norm):
        return nothing_finite(grads, quiet)
    if norm == 0.0:
        return None
    return Scaled(grads, [(r / norm - math.copysign(alpha, r)) * m for r, m in zip(rho, metric, strict=True)])


class SAGM(SharpnessAware):
    r"""Sharpness-aware gradient matching, :math:`L(W) + L_p(W - a \nabla L(W))`; two passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; with ``alpha=0`` as well, the base optimizer in one pass.
        alpha: a ≥ 0.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2303.10353, Algorithm 1.
    """

    combines_passes = is_of_all_ranks = True

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        alpha: float = 1e-3,  # a
        **options: Any,
    ) -> None:
        require_nonnegative("alpha", alpha)
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.alpha = alpha

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.radii()
        if not any(rho) and not self.alpha:
            yield None
            return
        yield Probe()
        first = self.held_gradients()
        alpha = self.alpha / self.loss_scale
        found = [sagm_ascent(first, self.scales("weights"), rho, alpha, self.expects_overflow)]
        if (yield from second_pass(self, found)):
            self.set_gradients(combined(0.5, first, 0.5, self.gradients()))
