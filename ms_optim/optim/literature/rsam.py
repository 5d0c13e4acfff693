r"""RSAM: a step along minus the gradient's own entropy, Rényi's, as a proxy for that of the Hessian's spectrum.

With diag(g)² in the place of the Hessian, Σ_j g_j² is its trace and Σ_j |g_j|^{2a} that of its a-th power, so that R
= −sign(1 − a) Σ_j |g_j|^{2a} / (Σ_j g_j²)^a grows and falls with the Rényi sharpness −H_a.  The gradient is taken at
W + ε,

    ε = −c g ,   c = sign(1 − a) ρ s_a / s_1^{a+1} ,   s_1 = Σ g_j² ,   s_a = Σ |g_j|^{2a} ,

where L(W + ε) ≈ L + ρ R.  For a > 1 that is an ascent of length ρ exp((1 − a) H_a(p)) / ‖g‖, p_j = g_j² / ‖g‖², so,
unlike SAM's, it shrinks as 1/‖g‖ when the gradient grows; for a < 1 it is a descent, enormous unless ρ is tiny.  In a
metric M = α*^{-2} the entries are those at the representative, √M g.

Source: arXiv 2510.07758, eq. 9 to 13, and the authors' code (class NEWRSAM), which adds 1e-16 to both sums.
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
from ..gradients import Gradients, inner, power_sum
from ..perturbation import Perturbation, Scaled, nothing_finite
from ..sam import second_pass

_TINY = 1e-16


def renyi_ascent(
    grads: Gradients,
    metric: list[float],  # M
    rho: list[float],  # ρ
    order: float,  # a
    quiet: bool = False,
    scale: float = 1.0,
) -> Perturbation:
    """ε_p = −sign(1 − a) ρ_p (s_a / s_1^{a+1}) M_p g_p.

    Args:
        grads: g, entry by entry; ``None`` where a parameter took no part.
        metric: M.
        rho: ρ of each parameter's group, negative where the base optimizer ascends.
        order: a > 0, not 1.
        quiet: Whether a gradient that is not finite is to be expected.
        scale: What g is multiplied by: ε is that of g without it.

    Returns:
        ε, as :func:`ms_optim.optim.sam.ascent` does.
    """
    trace = inner(grads, grads, metric) / scale**2
    if not math.isfinite(trace):
        return nothing_finite(grads, quiet)
    if trace == 0.0:
        return None
    trace_of_power = power_sum(grads, [math.sqrt(m) / scale for m in metric], 2.0 * order)
    factor = math.copysign(1.0, 1.0 - order) * (trace_of_power + _TINY) / (trace + _TINY) ** (order + 1.0)
    if not math.isfinite(factor):
        return nothing_finite(grads, quiet)
    return Scaled(grads, [-factor / scale * r * m for r, m in zip(rho, metric, strict=True)])


class RSAM(SharpnessAware):
    r"""Rényi sharpness-aware minimization, the gradient at :math:`W - c(g) g`; two passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0; 0 is the base optimizer, in one pass.
        order: a > 0, a ≠ 1.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``. The paper begins after five epochs of plain SGD:
            ``start=``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2510.07758, eq. 9 to 13.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.65,  # ρ
        order: float = 1.2,  # a
        **options: Any,
    ) -> None:
        if not (math.isfinite(order) and order > 0 and order != 1.0):
            raise ValueError(f"order must be > 0, finite and not 1, got {order}; the paper takes 1.05 to 1.6")
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.order = order

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.radii()
        if not any(rho):
            yield None
            return
        yield Probe()
        metric, quiet = self.scales("weights"), self.expects_overflow
        found = [renyi_ascent(self.gradients(), metric, rho, self.order, quiet, self.loss_scale)]
        yield from second_pass(self, found)
