r"""Compat: the interface of the widespread two-step SAM (``davda54/sam``), on our engine.

    from ms_optim.compat import SAM                                   # in the place of `from sam import SAM`

    loss_fn(model(x), y).backward(); optimizer.first_step(zero_grad=True)       # W → W + ε
    loss_fn(model(x), y).backward(); optimizer.second_step(zero_grad=True)      # back to W, and the base's step

Scripts and checkpoints go on as they are, with the same update,

    ε_p = ρ_p M_p g_p / √(Σ_q ⟨g_q, M_q g_q⟩) ,    M = 1, or W² where ``adaptive``,

and what is known to be wrong in the original is right here.  Behaviour differs where that shows:

* ``state_dict`` holds the base optimizer's state (momentum, Adam's moments), so that a resumed run is the uninterrupted
  one, and no copy of the weights.  Checkpoints of the original load, with a warning of what they lack.
* Copies and pickles keep their base optimizer.
* ``step(closure)`` runs the closure for the first gradient as well, if none was taken since the last step; a gradient
  left over from the step before is not mistaken for one.  It returns the closure's loss: that of the first pass, or, if
  the first gradient was there before, of the second.
* An exception in the closure, or in a forward pass, leaves weights, buffers and random streams as before the step.
  After one in a backward pass the weights are themselves again with ``state_dict()`` or a copy, or with the next
  ``first_step()``, which refuses the gradient taken at the perturbed weights.
* A first gradient that is not finite perturbs nothing, and a warning says so; a zero one perturbs nothing.
* A parameter without a gradient in one of the two passes, or in any, is left to the base optimizer's rules; all are
  restored by copying, in place: their storage stays the same, and nothing drifts.
* With ρ = 0 the step is the base optimizer's, bit for bit, its buffers too: BatchNorm's statistics move once a step, in
  the first pass, for all kinds of normalisers.  (``disable_running_stats`` and ``enable_running_stats`` of the original
  can go.)  Both passes draw the same random numbers, hence the same dropout masks.  For all this the model has to be
  known: it is given, or found at its first forward pass in training.
* Step hooks and schedulers see a step: ``second_step()`` is ``step()``.  It may be called as such, and so by a
  ``GradScaler``: ``scaler.step(optimizer)`` in the place of ``second_step()``, and no unscaling before that, since ε
  does not depend on the scale.
* ``maximize=True`` turns the ascent around as well.
* Each pass may be several backward passes; inside an autocast block, and under data parallelism, the second pass is at
  W + ε as elsewhere.
* ``first_step()`` twice, or ``second_step()`` without it, is an error; so is ``step()`` without a closure and without
  passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from .errors import OptimizerError
from .optim import SharpnessAware
from .optim.closure import called_by_a_scaler
from .optim.engine import Plan
from .optim.gradient_pass import Probe
from .optim.gradients import Version, versions, written_since
from .optim.loop import Loop
from .optim.sam import ascent

__all__ = ["SAM", "TwoStepSAM"]


class TwoStep(Loop):
    """The passes of a loop that says itself where the first ends and the second begins.

    The first begins with the model's first training forward, or, if nobody saw that, at its end.  Whatever runs between
    the two marks is part of the second pass, so no forward pass interrupts it.

    Args:
        optimizer: Whose passes it takes.
        module: The optimizer's model, if it is known.
        earlier: A loop that may have begun, from before it was.
    """

    goes_on = False  # the second pass repeats the random numbers of the first, so that is one forward pass

    def __init__(
        self,
        optimizer: SharpnessAware | None = None,
        module: nn.Module | None = None,
        earlier: TwoStep | None = None,
    ) -> None:
        super().__init__(optimizer, module, takes=True)
        self._second: Iterator[Any] | None = None  # the passes that have come to the second
        self._before: list[Version] = []
        if earlier is not None:
            self._passes, self._open, self._second = earlier._passes, earlier._open, earlier._second

    def __reduce__(self) -> tuple[type[Loop], tuple[()]]:
        """Of a copied or saved model, hooks that do nothing."""
        return TwoStep, ()

    @property
    def in_second(self) -> bool:
        """Whether the second pass has begun, and the step is not over."""
        return self._passes is not None and self._passes is self._second

    @_disable_dynamo
    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin the first pass."""
        if not (module.training and torch.is_grad_enabled()):
            return
        passes = self._passes
        super().before_forward(module, args, kwargs)
        optimizer = self.of(module)
        if optimizer is not None and self._passes is not passes:
            self._before = versions(optimizer.gradients())

    def has_gradient(self, optimizer: SharpnessAware) -> bool:
        """Whether a gradient was taken in the first pass.

        Args:
            optimizer: Whose.

        Returns:
            Whether one is there that was not, or was another, as the pass began.
        """
        return self.begun and written_since(self._before, optimizer.gradients())

    def advance(self, optimizer: SharpnessAware) -> None:
        """From the first pass to the second, by the gradient that is there.

        Args:
            optimizer: Whose passes they are.

        Raises:
            OptimizerError: If the second was not ended.
        """
        if self.in_second and self.open:
            self.drop()
            raise OptimizerError(
                "first_step() was called twice without second_step(), so that the gradient is that of the perturbed "
                "weights (after an exception that was caught, perhaps); the weights have been restored: zero the "
                "gradients and run forward and backward again"
            )
        if self._passes is None or self.in_second:  # nobody saw the forward pass
            self._passes = optimizer.loop_passes()
            self._open = next(self._passes).__enter__()
        self._before = []
        try:
            self.interrupt()
            self._open = next(self._passes).__enter__()
        except BaseException as error:
            self.fail(error)
            raise
        self._second = self._passes


class TwoStepSAM(SharpnessAware):
    r"""SAM in two steps, with the arguments of ``davda54/sam``; see the module's docstring for what differs.

    Args:
        params: Parameters, or groups, in which ``rho`` and ``adaptive`` may differ (or the model).
        base_optimizer: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in two passes.
        adaptive: Whether the ball grows with each weight, M = W²: :class:`ms_optim.ASAM` with
            ``operator="elementwise"``. (The authors' own ASAM differs, and its best ρ about fourfold.)
        model: The model. ``None``: the outermost module that owns all parameters, once it is called in training.
        **kwargs: The base optimizer's arguments, such as ``lr``.

    Raises:
        OptimizerError: If ``base_optimizer`` is an instance, or a parameter is not the model's.
        ValueError: If ρ is negative.

    Source: Foret et al., arXiv 2010.01412, Algorithm 1; the interface is that of github.com/davda54/sam.
    """

    loop: TwoStep

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,  # ρ
        adaptive: bool = False,
        *,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # Bound here, so that no argument of the base optimizer is taken for one of the engine's.
        bound = kwargs and not isinstance(base_optimizer, Optimizer)
        base = functools.partial(base_optimizer, **kwargs) if bound else base_optimizer
        super().__init__(params, base, {"rho": rho, "adaptive": adaptive}, model=model)
        self._mark_passes()

    def _mark_passes(self, earlier: TwoStep | None = None) -> None:
        """Let the caller say where passes begin and end."""
        self.loop.detach()
        self.loop = TwoStep(self, self.model, earlier)

    def bind(self, model: nn.Module) -> None:
        """See the base class."""
        earlier = self.loop
        super().bind(model)
        self._mark_passes(earlier)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See the base class."""
        super().__setstate__(state)
        self._mark_passes()

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer that descends; it shares its groups and state with this one."""
        return self.base

    def plan(self) -> Plan:
        """See the base class. There are always two passes: the caller makes them."""
        yield Probe()
        rho = self.radii()
        yield ascent(self.gradients(), self.metric(), rho, quiet=self.expects_overflow) if any(rho) else None

    def metric(self) -> list[Any]:
        """M: W² where ``adaptive``, else 1.

        Returns:
            One tensor or number per parameter.
        """
        with torch.no_grad():
            pairs = zip(self.parameters(), self.setting("adaptive"), strict=True)
            return [p.detach().square() if adaptive else 1.0 for p, adaptive in pairs]

    def first_step(self, zero_grad: bool = False) -> None:
        """Go to W + ε, by the gradient that is in ``.grad``.

        Args:
            zero_grad: Whether to zero the gradients.

        Raises:
            OptimizerError: If it is called twice.
        """
        self.loop.advance(self)
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to W, and take the base optimizer's step by the gradient that is in ``.grad``.

        Args:
            zero_grad: Whether to zero the gradients.

        Raises:
            OptimizerError: If :meth:`first_step` was not called.
        """
        if not self.loop.in_second:
            self.drop()
            raise OptimizerError(
                "second_step() was called without first_step(), so there is no gradient of perturbed weights; call "
                "first_step() between the two backward passes"
            )
        self.interrupt()  # before hooks of the step look at the weights
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[..., Any] | None = None, samples: int | None = None) -> Any:
        """One step: both passes, or, where the first gradient is there, the second; or the descent alone.

        Args:
            closure: Runs forward and backward, and returns the loss.
            samples: See the base class.

        Returns:
            The loss of the first pass that the closure made.

        Raises:
            OptimizerError: If there is neither a closure nor a second pass to finish.
        """
        if closure is None or called_by_a_scaler() or not self.loop.has_gradient(self):
            return super().step(closure, samples)
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException as error:
            self.loop.fail(error)
            raise
        super().step()
        return loss


SAM = TwoStepSAM
