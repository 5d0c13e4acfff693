r"""SAM: descend along the gradient at the worst nearby point, ε = ρ M g / √⟨g, M g⟩ in a diagonal metric M.

    SAM      M = 1              the ball of radius ρ around the weights
    MSSAM    M = w = α*^{-2}    the ball around the α*-balanced representative, in today's coordinates
    ASAM     M = T_W²           the ball that grows with the weights

One global norm; a parameter group's ρ multiplies its part of ε.

With ``ascent="momentum"`` the base optimizer's running average of gradients m takes the place of g, with the opposite
sign: the gradient is taken at a point in the direction of the coming step, ε = −ρ M m / √⟨m, M m⟩.  That direction is
known before the pass, so one pass is enough, at half of SAM's cost and in unmodified loops.

Source: Foret et al., arXiv 2010.01412, eq. 2 and 3 for M = 1 (second-order terms dropped, as there); for the momentum
Becker et al., arXiv 2401.12033, Algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import NonFiniteWarning
from .engine import Plan, SharpnessAware
from .gradient_pass import Perturbation, Scaled

Metric = list[float] | list[Tensor]
Ascent = Literal["gradient", "momentum"]


def ascent(
    grads: list[Tensor | None],
    metric: Metric,  # M_p: one number, or one tensor of the parameter's shape, per parameter
    rho: list[float],  # ρ_p: radius
    quiet: bool = False,
) -> Perturbation:
    """ε_p = ρ_p M_p g_p / √(Σ_q ⟨g_q, M_q g_q⟩).

    Args:
        grads: g, entry by entry; ``None`` where a parameter took no part.
        metric: M.
        rho: The radius of each parameter's group.
        quiet: Whether a gradient that is not finite is to be expected, as with a loss scale.

    Returns:
        ε, or ``None`` if there is no direction: no gradient, a zero gradient, or one that is not finite (warned of).
    """
    taking_part = [i for i, grad in enumerate(grads) if grad is not None]
    g = [grad for grad in grads if grad is not None]
    if not g:
        return None
    tensors = [m for m in (metric[i] for i in taking_part) if isinstance(m, Tensor)]
    numbers = [m for m in (metric[i] for i in taking_part) if not isinstance(m, Tensor)]
    with torch.no_grad():
        # The one synchronisation of a step, `tolist`: a norm that is not finite must not reach the weights.
        if tensors:
            raised = list(torch._foreach_mul(g, tensors))
            squares = torch.stack([torch.sum(a * b, dtype=torch.float64) for a, b in zip(g, raised, strict=True)])
            numbers = [1.0] * len(g)
            norm = math.sqrt(sum(squares.tolist()))
        else:
            raised = g
            norms = torch.stack(torch._foreach_norm(g)).tolist()
            norm = math.sqrt(sum(m * n * n for m, n in zip(numbers, norms, strict=True)))
        if not math.isfinite(norm) and not quiet:
            message = "the gradient norm is not finite; this step goes on without a perturbation"
            warnings.warn(message, NonFiniteWarning, stacklevel=2)
        if not math.isfinite(norm) or norm == 0.0:
            return None
    directions: list[Tensor | None] = [None] * len(grads)
    factors = [0.0] * len(grads)
    for i, direction, m in zip(taking_part, raised, numbers, strict=True):
        directions[i], factors[i] = direction, rho[i] * m / norm
    return Scaled(directions, factors)


def taken_ascent(optimizer: SharpnessAware, ascent: Ascent) -> Ascent:
    """The direction of a new optimizer, which takes the passes of unmodified loops if that needs one pass only.

    Args:
        optimizer: The optimizer.
        ascent: The direction.

    Returns:
        The same.

    Raises:
        ValueError: If it is another word, or the momentum of a base optimizer without one.
    """
    if ascent not in ("gradient", "momentum"):
        raise ValueError(f"ascent must be 'gradient' or 'momentum', got {ascent!r}")
    entries = optimizer.base.param_groups
    if ascent == "momentum" and not all(entry.get("momentum", 0.0) > 0 or "betas" in entry for entry in entries):
        raise ValueError(
            f"ascent='momentum' needs a running average of gradients, and {type(optimizer.base).__name__} was built "
            "without momentum; pass momentum=0.9, say, or ascent='gradient'"
        )
    if ascent == "momentum":
        optimizer.attach()
    return ascent


def sam_plan(optimizer: SharpnessAware, metric: Callable[[], Metric], ascent_along: Ascent) -> Plan:
    """The plan of every SAM: the gradient here, then the gradient at ε; one pass where ρ = 0, or ε is known before.

    Args:
        optimizer: The optimizer.
        metric: Gives M once the first gradient, and with it a refresh, is there.
        ascent_along: What gives the direction.

    Yields:
        ``None``, then ε; or ε alone.
    """
    rho = optimizer.setting("rho")
    if ascent_along == "momentum" and any(rho):
        # A function: after a refresh that is due in this pass, M and the momentum are others.
        yield lambda: ascent(optimizer.momentum(), metric(), [-r for r in rho])
        return
    yield None
    if any(rho):
        found = [ascent(optimizer.gradients(), metric(), rho, quiet=optimizer.scaler is not None)]
        if found[0] is not None:
            yield found.pop()  # no reference stays here: the second pass reuses the memory of the first one's gradients


class SAM(SharpnessAware):
    r"""Sharpness-aware minimization, :math:`\min_W \max_{\|ε\| ≤ ρ} L(W + ε)`, around any optimizer of torch.

    Args:
        model_or_params: The model (BatchNorm's statistics then move once a step), or parameters or groups.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        ascent: ``"gradient"``, or ``"momentum"``: one pass, against the base optimizer's momentum.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: Foret et al., arXiv 2010.01412, Algorithm 1.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        ascent: Ascent = "gradient",
        **options: Any,
    ) -> None:
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.ascent = taken_ascent(self, ascent)

    def plan(self) -> Plan:
        """See the base class."""
        return sam_plan(self, lambda: self.scales("weights"), self.ascent)
