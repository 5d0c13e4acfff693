r"""MSSAM: SAM whose ball is drawn at the balanced representative of the network.

    ε_p = ρ w_p g_p / √(Σ_q w_q ‖g_q‖²) ,      w_p = α_p^{-2}

is SAM's step at the rescaled weights αW, written in today's coordinates, so it does not depend on which of the
equivalent networks is being trained.  Which α is the gauge's choice: κ = 0 is the α* of the smallest trace, κ = ½ (the
default) that of the smallest product of trace and squared norm, the one in PAC-Bayes bounds.

``rebalance="metric"`` does exactly this.  ``"rows"`` (the default) also rescales the weights and the base optimizer's
state, at every refresh, to where the rows of all layers have one size, as at the usual initialisations, and descends
from there; ``"move"`` rescales them to the representative itself, where w = 1.  With either the descent is scale-free
as well: from every equivalent start the network follows the same trajectory in function space.

Defaults were chosen on one development row, an MLP on MNIST with noisy labels (``benchmarks/results/gauge``): the
perturbed network is that of the same ball with "rows" and with "move", and at every κ descent from the rows reached a
little more; at κ = ½ and 1 by less than the errors.

Source: arXiv 2106.12612, Thm 1, for α*; arXiv 2010.01412 for the ascent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from .engine import Plan, SharpnessAware
from .requirements import Rebalance, automatic
from .sam import Ascent, sam_plan, taken_ascent


class MSSAM(SharpnessAware):
    r"""SAM in the ball of the balanced representative, :math:`\max_{\|α ε\| ≤ ρ} L(W + ε)`.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius at the representative; 0 is the base optimizer (there), in one pass.
        rebalance: ``"rows"``, ``"move"``, ``"metric"``, or ``None`` for plain SAM; ``"auto"``: ``"rows"``, and with
            single hidden units, for which there is none, ``"move"``.
        ascent: ``"gradient"``; or, in one pass, ``"momentum"``: against the base optimizer's momentum, or
            ``"previous"``: along the gradient of the step before.
        gauge: κ ∈ [0, 1]; ``None``: ½, and with single hidden units 0.
        **options: ``model``, ``refresh_every``, ``columns``, ``granularity``, ``group``, ``seed``,
            ``every``, ``m`` … (see :class:`SharpnessAware`), and the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2106.12612, Thm 1; arXiv 2010.01412, Algorithm 1.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        rebalance: Rebalance | Literal["auto"] = "auto",
        ascent: Ascent = "gradient",
        gauge: float | None = None,  # κ
        **options: Any,
    ) -> None:
        if gauge is None:
            gauge = 0.0 if options.get("granularity") == "neuron" else 0.5
        where = automatic(rebalance, options)
        super().__init__(model_or_params, base, {"rho": rho}, rebalance=where, gauge=gauge, **options)
        self.ascent = taken_ascent(self, ascent)

    def plan(self) -> Plan:
        """See the base class."""
        return sam_plan(self, lambda: self.scales("weights"), self.ascent)
