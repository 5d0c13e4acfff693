r"""Gradients at random points: Trace-SAM, and noise that grows with the weights.

    TraceSAM              the gradient at W + ρ v,    v ~ N(0, M), M = w = α*^{-2} or 1
    RandomPerturbation    the gradient at W + z,      z_p ~ N(0, σ² ‖W_p‖² / d_p), or filter by filter

One pass a step; in expectation L + (ρ²/2) Tr(H M) to second order: a regulariser of the trace, whose gradient is
sampled.  ``scale="layer"`` and ``"filter"`` spread the noise over a tensor, or a filter, of d entries so that
E ‖z‖² = σ² ‖W‖²: the relative size is what is fixed, and rescaling the network scales the noise along.

Source: Trace-SAM: Tahmasebi et al., arXiv 2406.03682 (the published code's sampler is N(0, I), not the unit sphere
that the text has: so is this); filter by filter: Bisla et al., arXiv 2201.08025 (LPF-SGD).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..asam import filter_norms, tensor_norms
from ..distributed import local
from ..engine import Plan, SharpnessAware
from ..noise import deviations, noise


class TraceSAM(SharpnessAware):
    r"""The gradient at :math:`W + ρ v`, v standard normal; one pass, in unmodified loops, too.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the standard deviation of the noise; 0 is the base optimizer.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none),
            ``seed``, and the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2406.03682, Trace-SAM, and the authors' code (ρ = 0.01).
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.01,  # ρ
        **options: Any,
    ) -> None:
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.take_loops()

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.setting("rho")
        if not any(rho):
            yield None
        else:
            # A function: after a refresh that is due in this pass, w is another.
            yield lambda: noise(self, deviations([r * r for r in rho], self.scales("weights")))


class RandomPerturbation(SharpnessAware):
    r"""The gradient at :math:`W + z`, the noise as large as the weights of each layer or filter; one pass.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        rho: σ ≥ 0, the size of the noise relative to the weights; 0 is the base optimizer.
        scale: ``"layer"``: one standard deviation per tensor; ``"filter"``: one per output of a weight.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none),
            ``seed``, and the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number or the scale is out of range.

    Source: after Bisla et al., arXiv 2201.08025.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.1,  # σ
        scale: Literal["layer", "filter"] = "layer",
        **options: Any,
    ) -> None:
        if scale not in ("layer", "filter"):
            raise ValueError(f"scale must be 'layer' or 'filter', got {scale!r}")
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.scale = scale
        self.take_loops()

    def plan(self) -> Plan:
        """See the base class."""
        rho = self.setting("rho")
        if not any(rho):
            yield None
        else:
            yield lambda: noise(self, self._deviations(rho))

    def _deviations(self, rho: list[float]) -> list[Tensor]:
        """σ ‖W‖ / √d, per tensor or filter."""
        parameters = self.parameters()
        if self.scale == "layer":
            norms, sizes = tensor_norms(parameters), [p.numel() for p in parameters]
        else:
            norms = filter_norms(parameters)
            sizes = [local(p).numel() // max(1, n.numel()) for p, n in zip(parameters, norms, strict=True)]
        return [r * n / max(1, size) ** 0.5 for r, n, size in zip(rho, norms, sizes, strict=True)]
