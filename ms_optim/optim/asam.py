r"""ASAM: SAM in a ball that grows with the weights, ε = ρ T_W² g / ‖T_W g‖.

Two operators are in use under this name, and their best ρ differ about fourfold:

    official      T = |W| + η on weights, 1 on everything else; η = 0.01     (the authors' code and paper)
    elementwise   T = |W| on everything                                     (the common re-implementation)

A weight is a parameter whose own name holds "weight": that is the official code's definition, BatchNorm's γ included.
With η = 0 the ball is unchanged by every rescaling that leaves the function unchanged; η > 0 breaks it.  At a
representative α W (``rebalance="metric"``) the operator is T_{αW}, so that M = w T_{αW}² with w = α^{-2}.

Source: Kwon et al., arXiv 2102.11600, Definition 2 and Algorithm 1 (p = 2), and the authors' code for η.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OptimizerError
from .engine import Plan, SharpnessAware
from .sam import Ascent, sam_plan, taken_ascent

Operator = Literal["official", "elementwise"]


def official_operator(weight: Tensor, is_weight: bool, scale: float = 1.0, eta: float = 0.01) -> Tensor:
    """T_{αW} = |αW| + η for a weight, 1 for anything else.

    Args:
        weight: W.
        is_weight: Whether it counts as a weight.
        scale: α.
        eta: η.

    Returns:
        T, shaped as W.
    """
    return weight.abs().mul_(scale).add_(eta) if is_weight else torch.ones_like(weight)


def elementwise_operator(weight: Tensor, scale: float = 1.0) -> Tensor:
    """T_{αW} = |αW|.

    Args:
        weight: W.
        scale: α.

    Returns:
        T, shaped as W.
    """
    return weight.abs().mul_(scale)


class ASAM(SharpnessAware):
    r"""Adaptive SAM, :math:`\min_W \max_{\|T_W^{-1} ε\| ≤ ρ} L(W + ε)`.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        operator: ``"official"`` or ``"elementwise"``; say which in a comparison.
        eta: η ≥ 0 of the official operator.
        ascent: ``"gradient"``; or, in one pass, ``"momentum"``: against the base optimizer's momentum, or
            ``"previous"``: along the gradient of the step before.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number or the operator is out of range.

    Source: arXiv 2102.11600, Algorithm 1.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.5,  # ρ
        operator: Operator = "official",
        eta: float = 0.01,  # η
        ascent: Ascent = "gradient",
        **options: Any,
    ) -> None:
        if operator not in ("official", "elementwise"):
            raise ValueError(f"operator must be 'official' or 'elementwise', got {operator!r}")
        if eta < 0:
            raise ValueError(f"eta must be >= 0, got {eta}")
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.operator, self.eta, self.ascent = operator, eta, taken_ascent(self, ascent)

    def plan(self) -> Plan:
        """See the base class."""
        return sam_plan(self, self.metric, self.ascent)

    def metric(self) -> list[Tensor]:
        """M = w T_{αW}², per parameter.

        Returns:
            One tensor per parameter.

        Raises:
            OptimizerError: If the official operator has no model to read parameter names from.
        """
        if self.operator == "official" and self.model is None:
            raise OptimizerError(
                "operator='official' treats weights and biases differently and needs their names, and no module that "
                "owns all the parameters was called in training; pass the model, or operator='elementwise'"
            )
        triples = list(zip(self.names(), self.parameters(), self.scales("weights"), strict=True))
        with torch.no_grad():
            if self.operator == "elementwise":
                return [elementwise_operator(p, w**-0.5).square_().mul_(w) for _, p, w in triples]
            return [
                official_operator(p, "weight" in name.rpartition(".")[2], w**-0.5, self.eta).square_().mul_(w)
                for name, p, w in triples
            ]
