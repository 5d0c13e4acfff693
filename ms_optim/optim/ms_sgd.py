r"""MSRegularizedSGD: SGD on L + λ · MS, the loss and the smallest Hessian trace among all equivalent networks.

By the envelope theorem the minimiser need not be differentiated: with w_p = α_p*^{-2} from the last refresh,

    ∇MS = Σ_p w_p ∇c_p + 2 Σ_p n_p W_p ,

where n_p keeps the gradient tangential for weights that a normaliser makes scale-free (and, for κ > 0, is weight decay
in balanced coordinates); see :class:`ms_optim.Balance`.  Between refreshes w is constant, and Σ_p w_p c_p ≥ MS.

    gradient="trace"   ∇c_p by double backward through the trace of the pass's own batches with one signed column,
                       whose dependence on the probabilities is part of it.  A forward of its own, a backpropagation to
                       the layers' outputs and a backward through both: on small networks a step takes 3 to 7 times as
                       long as SGD's, more than SAM's.  Needs no graph from the training loss: it is added to ``.grad``
                       when the pass is over, before any clipping (in an unmodified loop, in ``step()``, after it).
    gradient="noise"   the gradient at W + z, z ~ N(0, 2 λ w_p): one pass, and a random number per weight, which on a
                       CPU and small batches can cost as much as the pass.  This is smoothed loss in the
                       balanced metric, not MS: at the kinks of ReLU noise sees curvature of its own order, on a trained
                       MLP about three times the trace.
    gradient="antithetic"   the mean of the gradients at W + z and W − z: the same expectation at two passes, without
                       the noise that is odd in z, which is most of it.

Source: arXiv 2106.12612, Thm 1, for MS; the gradient is derived above.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature.parallel import own_generator
from ..curvature.weighted import weighted_trace
from ..errors import NonFiniteWarning, OptimizerError
from .distributed import as_shard_of, gathered
from .engine import Plan, SharpnessAware
from .gradients import plus
from .noise import deviations, noise
from .requirements import Rebalance, automatic

Gradient = Literal["trace", "noise", "antithetic"]


class MSRegularizedSGD(SharpnessAware):
    r"""SGD on :math:`L + λ \min_α \sum_p c_p / α_p^2`.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        lr: The learning rate.
        momentum: As in ``torch.optim.SGD``.
        strength: λ ≥ 0, in units of loss per trace; 0 is SGD (at the representative).
        gradient: ``"trace"``, ``"noise"`` or ``"antithetic"``.
        rebalance: ``"rows"``, ``"move"``, ``"metric"``, or ``None``: the plain trace, w = 1; ``"auto"``: ``"rows"``,
            and with single hidden units ``"move"``.
        **options: ``model``, ``refresh_every``, ``columns``, ``gauge``, ``granularity``, ``group``, ``seed``, ``every``
            (see :class:`SharpnessAware`), and arguments of ``torch.optim.SGD``, such as ``weight_decay``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: arXiv 2106.12612, Thm 1.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        strength: float = 1e-3,  # λ
        gradient: Gradient = "trace",
        rebalance: Rebalance | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        if gradient not in ("trace", "noise", "antithetic"):
            raise ValueError(f"gradient must be 'trace', 'noise' or 'antithetic', got {gradient!r}")
        settings = {"strength": strength}
        super().__init__(
            model_or_params,
            torch.optim.SGD,
            settings,
            rebalance=automatic(rebalance, options),
            lr=lr,
            momentum=momentum,
            **options,
        )
        self.gradient = gradient
        self.keeps_batches, self.combines_passes = gradient == "trace", gradient == "antithetic"
        if gradient != "antithetic":
            self.take_loops()

    def plan(self) -> Plan:
        """See the base class."""
        strength = self.setting("strength")
        if not any(strength):
            yield None
        elif self.gradient == "noise":
            # A function: after a refresh that is due in this pass, w and the weights are others.
            yield lambda: self.noise(strength)
        elif self.gradient == "antithetic":
            drawn: list[list[Tensor | None]] = []

            def draw() -> list[Tensor | None]:
                drawn.append(self.noise(strength))
                return drawn[0]

            yield draw
            there = self.held_gradients()
            # (A loss of no module, in the first step: noise waits for a model that could be called, in vain.)
            yield [None if z is None else -z for z in drawn.pop()] if drawn else None
            self.average_with(there)
        else:
            yield None
            self.add_penalty(strength)

    @property
    def adds_to_gradient(self) -> bool:
        """The gradient of the trace."""
        return self.gradient == "trace" and any(self.setting("strength"))

    def noise(self, strength: list[float]) -> list[Tensor | None]:
        """z ~ N(0, 2 λ w_p) for every trainable parameter, from the optimizer's own generator.

        Args:
            strength: λ per parameter.

        Returns:
            z, per parameter; ``None`` where a parameter is frozen.
        """
        return noise(self, deviations([2.0 * s for s in strength], self.scales("weights")))

    def average_with(self, other: list[Tensor | None]) -> None:
        """Make ``.grad`` the mean of itself and other gradients, 0 where one is absent.

        Args:
            other: Per parameter.
        """
        with torch.no_grad():
            for p, g in zip(self.parameters(), other, strict=True):
                total = plus(p.grad, g)
                p.grad = None if total is None else total * 0.5

    def add_penalty(self, strength: list[float]) -> None:
        """Add λ (Σ_p w_p ∇c_p + 2 Σ_p n_p W_p), on the batches of the pass, to ``.grad``, in full precision.

        Args:
            strength: λ per parameter; times the loss scale, if there is one.
        """
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            strength = [scale * s for s in strength]
        with self.measuring(), torch.autocast(self.parameters()[0].device.type, enabled=False):
            self._add_penalty(strength)

    def _add_penalty(self, strength: list[float]) -> None:
        """The same, for a strength that is scaled as the gradient is."""
        if self.model is None:
            raise OptimizerError(
                "gradient='trace' differentiates the network's trace, and no module that owns all the parameters was "
                "called in training; pass the model as the first argument, or gradient='noise' with rebalance=None"
            )
        names, parameters = self.names(), self.parameters()
        trace_weights = zip(names, strength, self.scales("trace_weights"), strict=True)
        weights = {name: s * w for name, s, w in trace_weights}
        wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
        penalty: list[Tensor | None] = [None] * len(parameters)
        group = self.ranks.group
        generator = self.generator if group is None else own_generator(self.generator, group)
        finite = True
        with gathered(self.model) as whole:
            sources = [whole.get(names[i], parameters[i]) for i in wanted]
            for batch in self.batches:
                value = weighted_trace(self.model, batch, weights, generator) / len(self.batches)
                finite = finite and bool(torch.isfinite(value))
                if finite and value.requires_grad:
                    found = torch.autograd.grad(value, sources, allow_unused=True)
                    for i, grad in zip(wanted, found, strict=True):
                        penalty[i] = plus(penalty[i], grad)
            if group is not None:
                finite = not self.ranks.largest([0.0 if finite else 1.0], self.device)[0]
                for i, source in zip(wanted, sources, strict=True):  # which took part may differ from rank to rank
                    penalty[i] = torch.zeros_like(source) if penalty[i] is None else penalty[i]
                self.ranks.average_(penalty)
        if not finite:
            message = "the trace is not finite; this step goes on without its gradient"
            warnings.warn(message, NonFiniteWarning, stacklevel=2)
            return
        signs = self.signs()
        pulls = [2.0 * s * n for s, n in zip(strength, self.pulls(), strict=True)]
        with torch.no_grad():
            for i in wanted:
                p, added = parameters[i], penalty[i]
                if p.grad is None and (added is None or group is not None):
                    continue  # took no part in this step; torch's weight decay leaves such a parameter alone, too
                added = None if added is None else as_shard_of(added, p)
                pulled = isinstance(pulls[i], Tensor) or pulls[i] != 0.0
                total = plus(added, p.detach() * pulls[i] if pulled else None)
                if total is not None:
                    total = total if signs[i] > 0 else -total  # with `maximize` the base descends along −.grad
                    p.grad = total if p.grad is None else plus(p.grad, total)
