r"""StableSAM (SSAM): SAM with the step rescaled to the length of the gradient at the weights.

    g̃ = ∇L(W + ρ g / ‖g‖) ,      step along (‖g‖ / ‖g̃‖) g̃

(``normalized=False``: ε = ρ g, the variant that the paper analyses.)  In a metric M both norms are √⟨·, M ·⟩, and g
in ε is M g.

Source: Tan et al., arXiv 2401.07250, Algorithm 1, and the authors' code for the two variants.
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
from ..gradients import Gradients, inner, weighted_sum
from ..perturbation import Perturbation, Scaled
from ..sam import ascent, second_pass


def stable_ascent(
    grads: Gradients,
    metric: list[float],  # M
    rho: list[float],  # ρ
    normalized: bool = True,
    quiet: bool = False,
) -> Perturbation:
    """ε_p = ρ_p M_p g_p / √⟨g, M g⟩, or without the denominator.

    Args:
        grads: g, entry by entry.
        metric: M.
        rho: The radius of each parameter's group.
        normalized: Whether there is a denominator.
        quiet: Whether a gradient that is not finite is to be expected.

    Returns:
        ε, as :func:`ms_optim.optim.sam.ascent` does.
    """
    found = ascent(grads, metric, rho, quiet)
    if normalized or found is None or not any(d is not None for d in found.directions):
        return found
    return Scaled(grads, [r * m for r, m in zip(rho, metric, strict=True)])


class StableSAM(SharpnessAware):
    r"""SAM whose step has the length of the gradient, :math:`\|g\| \tilde g / \|\tilde g\|`; two passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius (a step size, if not normalized); 0 is the base optimizer, in one pass.
        normalized: Whether the ascent is.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2401.07250, Algorithm 1.
    """

    combines_passes = is_of_all_ranks = True

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        normalized: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.normalized = normalized

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.radii()
        if not any(rho):
            yield None
            return
        yield Probe()
        metric = self.scales("weights")
        length = math.sqrt(inner(self.gradients(), self.gradients(), metric))
        if not self.normalized:
            rho = [r / self.loss_scale for r in rho]
        found = [stable_ascent(self.gradients(), metric, rho, self.normalized, self.expects_overflow)]
        if not (yield from second_pass(self, found)):
            return
        there = self.gradients()
        other = math.sqrt(inner(there, there, metric))
        if other > 0 and math.isfinite(length) and math.isfinite(other):
            self.set_gradients(weighted_sum([], there, length / other))
