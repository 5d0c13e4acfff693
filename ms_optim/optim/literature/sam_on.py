r"""SAM-ON: SAM whose perturbation is in the normalisation layers only.

    ε_p = ρ M_p g_p / √(Σ_{q ∈ N} ⟨g_q, M_q g_q⟩)  for p in N, else 0 ;   N = {γ, β of normalisers}

with M = 1 ("sam") or M = T_W², T = |W| ("elementwise"); the radius has to be much larger than SAM's.  A normaliser is
found by what it is, not by its name: see :func:`is_normalizer`.

Source: Mueller et al., arXiv 2306.04226 (there by names that hold "norm" or "bn"; η = 0 here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ...errors import OptimizerError
from ..asam import adaptive_metric
from ..distributed import local
from ..engine import Plan, SharpnessAware
from ..gradient_pass import Probe
from ..perturbation import Perturbation
from ..sam import Metric, ascent, second_pass

_KINDS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_normalizer(module: nn.Module) -> bool:
    """Whether a module is a normaliser: one of torch's, or one with an ε and a gain of one dimension.

    Args:
        module: The module.

    Returns:
        Whether it is.
    """
    if isinstance(module, _KINDS):
        return True
    own = dict(module.named_parameters(recurse=False))
    has_epsilon = any(isinstance(vars(module).get(key), float) for key in ("eps", "epsilon", "variance_epsilon"))
    return has_epsilon and "weight" in own and all(p.dim() == 1 for p in own.values())


class SAMON(SharpnessAware):
    r"""SAM in the parameters of normalisation layers only; two passes.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        operator: ``"sam"``, or ``"elementwise"``: the ball grows with the entries, as in ASAM.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's, or, in a step, there is no model or no normaliser in it.
        ValueError: If a number or the operator is out of range.

    Source: arXiv 2306.04226.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 1.0,  # ρ
        operator: Literal["sam", "elementwise"] = "sam",
        **options: Any,
    ) -> None:
        if operator not in ("sam", "elementwise"):
            raise ValueError(f"operator must be 'sam' or 'elementwise', got {operator!r}")
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.operator = operator

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.radii()
        if not any(rho):
            yield None
            return
        yield Probe()
        inside = self._inside()
        grads = [g if i else None for g, i in zip(self.gradients(), inside, strict=True)]
        found: list[Perturbation] = [ascent(grads, self._metric(), rho, self.expects_overflow)]
        del grads
        yield from second_pass(self, found)

    def _inside(self) -> list[bool]:
        """Which parameters are a normaliser's."""
        if self.model is None:
            raise OptimizerError(
                "SAMON perturbs normalisation layers, and no module that owns all the parameters was called in "
                "training; pass the model as the first argument"
            )
        modules = (module for module in self.model.modules() if is_normalizer(module))
        own = {id(p) for module in modules for p in module.parameters(recurse=False)}
        inside = [id(p) in own for p in self.parameters()]
        if not any(inside):
            raise OptimizerError(
                f"{type(self.model).__name__} has no normalisation layer with parameters of this optimizer, so SAMON "
                "has nothing to perturb; use SAM"
            )
        return inside

    def _metric(self) -> Metric:
        """M, per parameter."""
        weights = self.scales("weights")
        if self.operator == "sam":
            return weights
        tensors = [local(p).detach() for p in self.parameters()]
        return adaptive_metric(tensors, [True] * len(tensors), weights)
