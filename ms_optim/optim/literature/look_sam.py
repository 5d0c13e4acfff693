r"""LookSAM: SAM in every k-th step, whose direction is reused in the steps between.

    every k-th step   g_s = ∇L(W + ρ g / ‖g‖) ,   kept: g_v = g_s − (⟨g, g_s⟩ / ‖g‖²) g ,   step along g_s
    the others        step along g + α (‖g‖ / ‖g_v‖) g_v

g_v is the part of SAM's gradient across the plain one, which changes slowly.  A step costs 1 + 1/k passes on average.
In a metric M all inner products are ⟨·, M ·⟩; g_v is carried along when weights are rescaled, and is in the
``state_dict``.

Source: Liu et al., arXiv 2203.02714, Algorithm 1.
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


def across(
    here: Gradients,
    there: Gradients,
    metric: list[float],  # M
) -> Gradients:
    """g_v = g_s − (⟨g, M g_s⟩ / ⟨g, M g⟩) g.

    Args:
        here: g.
        there: g_s.
        metric: M.

    Returns:
        g_v.
    """
    square = inner(here, here, metric)
    share = inner(here, there, metric) / square if square > 0 else 0.0
    return combined(1.0, there, -share, here)


class LookSAM(SharpnessAware):
    r"""SAM whose perturbed gradient is taken in every k-th step, :math:`g + α \|g\| g_v / \|g_v\|` in the others.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        k: Steps from one with two passes to the next, of those with a part of ours (``every``, ``start``); 1 is SAM.
        alpha: α ≥ 0, the weight of the direction that is reused.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2203.02714, Algorithm 1.
    """

    combines_passes = is_of_all_ranks = True

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.1,  # ρ
        k: int = 5,
        alpha: float = 0.7,  # α
        **options: Any,
    ) -> None:
        require_nonnegative("alpha", alpha)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a number of steps >= 1, got {k!r}; k=1 is SAM")
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.k, self.alpha = k, alpha

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.radii()
        if not any(rho):
            yield None
        elif self.schedule.number(self.steps) % self.k == 0 or not self.kept:
            yield Probe()
            here, metric = self.held_gradients(), self.scales("weights")
            taken = yield from second_pass(self, [ascent(here, metric, rho, self.expects_overflow)])
            if taken and self.k > 1:
                coming = across(here, self.gradients(), metric)
                if math.isfinite(inner(coming, coming, metric)):
                    self.keep_next(coming)
        else:
            yield None
            here, metric, kept = self.gradients(), self.scales("weights"), self.previous_gradients()
            length, other = (math.sqrt(inner(g, g, metric)) for g in (here, kept))
            if other > 0 and math.isfinite(length) and math.isfinite(other):
                self.set_gradients(combined(1.0, here, self.alpha * length / other, kept))
