r"""Friendly SAM (F-SAM): ascend along what is particular to this batch, without the gradient of all the data.

    ε = ρ d / ‖d‖ ,   d = g − σ m ,      m ← λ m + (1 − λ) g   (the first m is g)

m, an average of the gradients so far, stands for the gradient of all the data; the first step, which has none, is
SAM's. In a metric M, ε = ρ M d / √⟨d, M d⟩.  m is carried along when weights are rescaled, and is in the
``state_dict``.

Source: Li et al., arXiv 2403.12350, Algorithm 1; that d takes the m of the step before is the authors' code's.
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
from ..gradients import combined, inner, weighted_sum
from ..perturbation import Perturbation
from ..requirements import require_nonnegative
from ..sam import ascent, second_pass


class FriendlySAM(SharpnessAware):
    r"""SAM along :math:`g - σ m`, m the running average of gradients; two passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        sigma: σ ≥ 0, how much of the average is taken away; 0 is SAM.
        decay: λ in [0, 1), of the average.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2403.12350, Algorithm 1.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        sigma: float = 1.0,  # σ
        decay: float = 0.9,  # λ
        **options: Any,
    ) -> None:
        require_nonnegative("sigma", sigma)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.sigma, self.decay = sigma, decay

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.radii()
        if not any(rho):
            yield None
            return
        yield Probe()
        here, average = self.gradients(), self.previous_gradients()
        scale = self.loss_scale  # the average is that of gradients without it
        particular = combined(1.0, here, -self.sigma * scale, average)
        if self.kept:
            coming = combined((1.0 - self.decay) / scale, here, self.decay, average)
        else:
            coming = weighted_sum([], here, 1.0 / scale)
        finite = math.isfinite(inner(coming, coming, [1.0] * len(coming)))
        found: list[Perturbation] = [ascent(particular, self.scales("weights"), rho, self.expects_overflow)]
        del here, particular
        yield from second_pass(self, found)
        if finite:  # what is not would stay in the average
            self.keep_next(coming)
