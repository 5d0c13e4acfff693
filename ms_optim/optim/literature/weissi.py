r"""WEISSI: weight decay that does not depend on the scaling, for the product of layer norms and for sparsity.

    L + λ₁ Σ_l log ‖W_l‖_F + λ₂ Σ_l ‖ W_l / ‖W_l‖_F ‖_1

over all weights (parameters of two dimensions or more).  The first sum is the logarithm of the product of norms, which
rescalings between layers leave alone; the second sees directions only.  Their gradient,

    λ₁ W / ‖W‖² + λ₂ ( sign(W) / ‖W‖ − ‖W‖_1 W / ‖W‖³ ) ,

is added to that of the loss when the pass is over: one pass, and no graph.

Source: Liu et al., arXiv 2008.02965 (abstract and reviews; values of λ were not published).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..asam import tensor_norms
from ..distributed import local, whole
from ..engine import Plan, SharpnessAware
from ..gradients import plus


def weissi_penalty(weights: Iterable[Tensor], strength: float, sparsity: float) -> Tensor:
    """λ₁ Σ log ‖W‖_F + λ₂ Σ ‖W / ‖W‖_F‖_1, differentiable, over the tensors of two dimensions or more.

    Args:
        weights: Parameters; vectors are left out, and so is what is zero.
        strength: λ₁.
        sparsity: λ₂.

    Returns:
        One number.
    """
    total = torch.zeros(())
    for weight in weights:
        norm = torch.linalg.vector_norm(weight)
        if weight.dim() >= 2 and float(norm.detach()) > 0:
            total = total + strength * norm.log() + sparsity * weight.abs().sum() / norm
    return total


class WEISSI(SharpnessAware):
    r"""The base optimizer on :math:`L + λ_1 \sum \log\|W_l\| + λ_2 \sum \|W_l / \|W_l\|\|_1`; one pass.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        strength: λ₁ ≥ 0.
        sparsity: λ₂ ≥ 0.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2008.02965.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        strength: float = 1e-4,  # λ₁
        sparsity: float = 0.0,  # λ₂
        **options: Any,
    ) -> None:
        super().__init__(model_or_params, base, {"strength": strength, "sparsity": sparsity}, **options)
        self.take_loops()

    @property
    def adds_to_gradient(self) -> bool:
        """The gradient of the penalty."""
        return any(self.setting("strength")) or any(self.setting("sparsity"))

    def plan(self) -> Plan:
        """See the base class."""
        strength, sparsity = self.setting("strength"), self.setting("sparsity")
        yield None
        if any(strength) or any(sparsity):
            self.add_penalty(strength, sparsity)

    def add_penalty(self, strength: list[float], sparsity: list[float]) -> None:
        """Add the penalty's gradient to ``.grad``, times the loss scale if there is one.

        Args:
            strength: λ₁, per parameter.
            sparsity: λ₂, per parameter.
        """
        factor = 1.0 if self.scaler is None else self.scaler.get_scale()
        parameters = self.parameters()
        norms = tensor_norms(parameters)
        with torch.no_grad():
            for p, norm, a, b, sign in zip(parameters, norms, strength, sparsity, self.signs(), strict=True):
                if p.dim() < 2 or p.grad is None or not (a or b):
                    continue
                safe = torch.where(norm > 0, norm, torch.inf)  # what is zero has no direction: its part is 0
                part = local(p)
                added = a * part / safe**2
                if b:
                    size = whole(p.detach().abs().sum())
                    added = added + b * (part.sign() / safe - size * part / safe**3)
                added = added * (factor * sign)
                if p.grad.is_sparse:
                    p.grad = plus(p.grad, added)
                else:
                    local(p.grad).add_(added)
