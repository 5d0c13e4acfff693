r"""MSSAM: SAM whose ball is drawn at the α*-balanced representative of the network.

    ε_p = ρ w_p g_p / √(Σ_q w_q ‖g_q‖²) ,      w_p = α_p*^{-2}

is SAM's step at the rescaled weights α*W, written in today's coordinates, so it does not depend on which of the
equivalent networks is being trained.  ``rebalance="metric"`` does exactly this.  ``rebalance="move"`` (the default)
rescales the weights and the base optimizer's state to the representative at every refresh, so that w = 1 there and the
descent is scale-free as well: from every equivalent start the network follows the same trajectory in function space.
``rebalance="rows"`` is scale-free, too: it perturbs the same network by the same ball, and descends from where the rows
of all layers have one size, as at the usual initialisations, where the usual learning rates are good.

Source: arXiv 2106.12612, Thm 1, for α*; arXiv 2010.01412 for the ascent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .engine import Plan, SharpnessAware
from .requirements import Rebalance
from .sam import Ascent, sam_plan, taken_ascent


class MSSAM(SharpnessAware):
    r"""SAM at the representative with the smallest Hessian trace, :math:`\max_{\|α ε\| ≤ ρ} L(W + ε)`.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius at the representative; 0 is the base optimizer (there), in one pass.
        rebalance: ``"move"``, ``"rows"``, ``"metric"``, or ``None`` for plain SAM.
        ascent: ``"gradient"``; or, in one pass, ``"momentum"``: against the base optimizer's momentum, or
            ``"previous"``: along the gradient of the step before.
        **options: ``model``, ``refresh_every``, ``columns``, ``gauge``, ``granularity``, ``group``, ``seed``,
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
        rebalance: Rebalance = "move",
        ascent: Ascent = "gradient",
        **options: Any,
    ) -> None:
        super().__init__(model_or_params, base, {"rho": rho}, rebalance=rebalance, **options)
        self.ascent = taken_ascent(self, ascent)

    def plan(self) -> Plan:
        """See the base class."""
        return sam_plan(self, lambda: self.scales("weights"), self.ascent)
