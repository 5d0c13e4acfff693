r"""ASAM: SAM in a ball that grows with the weights, ε = ρ T_W² g / ‖T_W g‖.

Two operators are in use under this name, and their best ρ differ about fourfold:

    official      T = |W| + η on weights, 1 on everything else; η = 0.01     (the authors' code and paper)
    elementwise   T = |W| on everything                                     (the common re-implementation)
    filter        T = ‖f‖ on the entries of a filter (an output of a weight), |W| on vectors       (the paper's second)
    layer         T = ‖W‖ on the entries of a tensor                        (the variant of arXiv 2306.04226)

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

from ..errors import OptimizerError, UnsupportedError
from ..sharpness import adaptive
from .distributed import is_sharded, local, whole
from .engine import Plan, SharpnessAware
from .sam import Ascent, sam_plan, taken_ascent

Operator = Literal["official", "elementwise", "filter", "layer"]
_OPERATORS = ("official", "elementwise", "filter", "layer")


def adaptive_metric(
    weights: list[Tensor],  # W
    is_weight: list[bool],
    w: list[float],  # α^{-2}
    eta: float = 0.0,  # η
) -> list[Tensor]:
    """M = w T_{αW}², with T_{αW} = |αW| + η for a weight and 1 for anything else.

    Args:
        weights: All parameters.
        is_weight: Which count as weights; for the element-wise operator all of them, with η = 0.
        w: The square of 1/α, per parameter.
        eta: η.

    Returns:
        One tensor per parameter, shaped as it.
    """
    with torch.no_grad():
        metric = list(torch._foreach_abs(weights))
        torch._foreach_mul_(metric, [x**-0.5 for x in w])
        adapted = [m for m, counts in zip(metric, is_weight, strict=True) if counts]
        if eta and adapted:
            torch._foreach_add_(adapted, eta)
        for m, counts in zip(metric, is_weight, strict=True):
            if not counts:
                m.fill_(1.0)
        torch._foreach_mul_(metric, metric)
        torch._foreach_mul_(metric, w)
        return metric


def tensor_norms(parameters: list[Tensor]) -> list[Tensor]:
    """‖W_p‖ of every parameter, as numbers on its device.

    Args:
        parameters: Sharded ones, too.

    Returns:
        Tensors without dimensions.
    """
    with torch.no_grad():
        return [whole(torch.linalg.vector_norm(p.detach())) for p in parameters]


def filter_norms(parameters: list[Tensor]) -> list[Tensor]:
    """‖f‖ of every filter, a slice along the first dimension of a weight; of a vector |W|.

    Args:
        parameters: Sharded ones along the first dimension, too.

    Returns:
        Of each parameter (this rank's part of it) a tensor that broadcasts to it.

    Raises:
        UnsupportedError: If a parameter is sharded along another dimension.
    """
    norms = []
    for p in parameters:
        placements = getattr(p, "placements", ()) if is_sharded([p]) else ()
        if not all(s.is_replicate() or s.is_shard(0) for s in placements):
            raise UnsupportedError(
                f"a parameter of shape {tuple(p.shape)} is sharded along another dimension than its filters "
                f"({placements}); use operator='elementwise' or 'layer'"
            )
        norms.append(adaptive.metric(local(p).detach(), "filter"))
    return norms


def grouped_metric(parameters: list[Tensor], operator: Operator) -> list[Tensor]:
    """M = w T_{αW}² = T_W², with T one number per filter or per tensor: α falls out of it.

    Args:
        parameters: W.
        operator: ``"filter"`` or ``"layer"``.

    Returns:
        One tensor per parameter, expanded to this rank's part of it.
    """
    norms = filter_norms(parameters) if operator == "filter" else tensor_norms(parameters)
    return [n.square().expand(local(p).shape) for n, p in zip(norms, parameters, strict=True)]


class ASAM(SharpnessAware):
    r"""Adaptive SAM, :math:`\min_W \max_{\|T_W^{-1} ε\| ≤ ρ} L(W + ε)`.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        operator: ``"official"``, ``"elementwise"``, ``"filter"`` or ``"layer"``; say which in a comparison.
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
        if operator not in _OPERATORS:
            raise ValueError(f"operator must be 'official', 'elementwise', 'filter' or 'layer', got {operator!r}")
        if eta < 0:
            raise ValueError(f"eta must be >= 0, got {eta}")
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.operator, self.eta, self.ascent = operator, eta, taken_ascent(self, ascent)

    def plan(self) -> Plan:
        """See the base class."""
        return sam_plan(self, lambda: self.metric(), self.ascent)  # (a method would hold the optimizer)

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
        if self.operator in ("filter", "layer"):
            return grouped_metric(self.parameters(), self.operator)
        official = self.operator == "official"
        is_weight = [not official or "weight" in name.rpartition(".")[2] for name in self.names()]
        weights = [local(p).detach() for p in self.parameters()]
        return adaptive_metric(weights, is_weight, self.scales("weights"), self.eta if official else 0.0)
