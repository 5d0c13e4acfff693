r"""GSAM: descend the loss at the worst nearby point, and the gap between it and the loss here.

    g_p = ∇L(W + ρ g / ‖g‖) ,      step along g_p − α g_⊥ ,      g_⊥ = g − (⟨g, g_p⟩ / ‖g_p‖²) g_p

g_⊥ is the part of the gradient here across the gradient there: to go against it lowers the surrogate gap
L(W + ε) − L(W) and leaves L(W + ε) as it is, to first order.  In a metric M all inner products are ⟨·, M ·⟩.  The paper
lets ρ fall with the learning rate: drive ``param_groups[…]["rho"]``.

Source: Zhuang et al., arXiv 2203.08065, Algorithm 1, and the authors' code.
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
from ..requirements import require_nonnegative
from ..sam import ascent, second_pass


def surrogate_gap_gradient(
    here: Gradients,
    there: Gradients,
    metric: list[float],  # M
    alpha: float,  # α
) -> Gradients:
    """g_p − α g_⊥.

    Args:
        here: g, at the weights.
        there: g_p, at the perturbed weights.
        metric: M.
        alpha: α.

    Returns:
        The direction; g_p itself where an inner product is not finite, or g_p is 0.
    """
    along, square = inner(here, there, metric), inner(there, there, metric)
    if not (math.isfinite(along) and math.isfinite(square)) or square == 0.0:
        return there
    return combined(1.0 + alpha * along / square, there, -alpha, here)


class GSAM(SharpnessAware):
    r"""SAM that also lowers the surrogate gap, :math:`g_p - α g_⊥`; two passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        alpha: α ≥ 0, the weight of the gap; 0 is SAM.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2203.08065, Algorithm 1.
    """

    combines_passes = is_of_all_ranks = True

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        alpha: float = 0.4,  # α
        **options: Any,
    ) -> None:
        require_nonnegative("alpha", alpha)
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.alpha = alpha

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.radii()
        if not any(rho):
            yield None
            return
        yield Probe()
        here, metric = self.held_gradients(), self.scales("weights")
        taken = yield from second_pass(self, [ascent(here, metric, rho, self.expects_overflow)])
        if taken and self.alpha:
            self.set_gradients(surrogate_gap_gradient(here, self.gradients(), metric, self.alpha))
