"""Watcher: what an optimizer sees of its model: which it is, when it is called, with what, and in whose pass.

A refresh runs on the incoming batch, before the first forward of a step, so never between a forward and its backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..balancing import Balance, NeuronBalance
from ..batch import Batch
from ..errors import LostGradientsWarning, NoEffectWarning, OptimizerError
from .binding import Binding
from .distributed import Ranks, inside_wrapper
from .gradient_pass import GradientPass, Snapshot
from .gradients import Gradients, Version, held, versions
from .loop import Loop
from .loss_loop import LossLoop
from .representative import RescaleHook
from .requirements import MicroBatch
from .schedule import Schedule
from .wrapper import Wrapper


class Watcher(Wrapper):
    """An optimizer that sees its model's forward passes; abstract.

    Attributes:
        ranks: The ranks that train the model together.
        schedule: The steps with a part of our own.
        m: How much of the batch shares a perturbation.
        loop: The pass of an unmodified loop.
        loss_loop: The passes of one around a module that returns the loss.
        loss_module: That module.
        batches: The inputs of the first pass, if the plan wants them.
        kept_next: Gradients that are kept once the step is taken.
        last_loss: The loss of the pass that was last, if somebody said it.
        scaler: That of the present step, if it was named.
        probe_scale: What the loss of an attached module's first pass was multiplied by.
        beginnings: The states to which a closure that is called once can go back: before it, and before each time
            through the plan that was begun in it; empty outside of one.
        outside: The gradients as the first training forward outside of all passes found them since the last step.
        zeroed: Whether the gradients were zeroed.
    """

    #: Whether what is descended along is made of several passes' gradients, which only explicit passes tell apart.
    combines_passes: bool = False
    #: Whether what it is made of has to be that of all ranks, lest their weights part.
    is_of_all_ranks: bool = False

    ranks: Ranks
    schedule: Schedule
    m: MicroBatch
    steps: int
    loop: Loop
    loss_loop: LossLoop
    loss_module: nn.Module | None
    batches: list[Batch]
    keeps_batches: bool
    kept_next: Gradients | None
    last_loss: Any
    scaler: torch.amp.GradScaler | None
    probe_scale: float
    beginnings: list[Snapshot]
    outside: list[Version]
    zeroed: bool
    _takes_loops: bool
    _binding: Binding | None
    _pass: GradientPass | None
    _ready: bool
    _measuring: bool

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; a step that a loop has begun without them begins again. See the base class."""
        if self._constructed:
            self.loop.leave()
        super().add_param_group(param_group)

    def held_gradients(self) -> Gradients:
        """:meth:`gradients` to be kept over the next pass: copies where a wrapper may own their memory."""
        return held(self.gradients()) if self.ranks.group is not None else self.gradients()

    def set_gradients(self, grads: Gradients) -> None:
        """Make ``.grad`` of each parameter what is to be descended along."""
        for p, grad in zip(self.parameters(), grads, strict=True):
            p.grad = grad

    @property
    def loss_scale(self) -> float:
        """What the gradients of the pass that is just over are multiplied by."""
        if self.loss_loop.begun:
            return self.probe_scale
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def keep_next(self, grads: Gradients) -> None:
        """Keep gradients for the steps to come, once this one is taken."""
        self.kept_next = grads

    def loss_found(self) -> float:
        """The loss of the pass that is just over, the mean over the ranks that share perturbations.

        Raises:
            OptimizerError: If nobody said it.
        """
        loss = self.last_loss
        if loss is None:
            raise OptimizerError(
                f"{type(self).__name__} weighs gradients by the losses of their passes, and this pass's is not known; "
                "set it inside the pass, gradient_pass.loss = loss.detach(), or use step(closure)"
            )
        value = torch.as_tensor(loss, dtype=torch.float64, device=self.device).detach().reshape(())
        if self.ranks.group is not None and self.m != "local":
            value = value.clone()
            self.ranks.average_([value])
        return float(value)

    @property
    def refresh_due(self) -> bool:
        """Whether the next forward pass of a step begins with a refresh."""
        return self.rebalance is not None and self.representative.due <= 0

    @property
    def active(self) -> bool:
        """Whether the next step has a part of our own, and is not one of the base optimizer alone."""
        return self.schedule.active(self.steps)

    @property
    def needs_inputs(self) -> bool:
        """Whether this step needs to see the model's inputs."""
        return self.refresh_due or self.keeps_batches

    @property
    def passes_are_fixed(self) -> bool:
        """Whether a step has to make all its passes, since others rely on their number."""
        return self.loss_loop.begun or (self.m == "local" and self.ranks.group is not None)

    def keeps_local(self, gradient_pass: GradientPass) -> bool:
        """Whether the gradients of a pass are not to be averaged over ranks by a wrapper.

        Args:
            gradient_pass: The pass.

        Returns:
            Whether they are this rank's own.
        """
        if self.ranks.group is None:
            return False
        own = self.m == "local" or self.loss_loop.begun
        return isinstance(self.m, int) or (own and not gradient_pass.descends)

    def refresh(self, inputs: Any) -> Balance | NeuronBalance | None:
        """Find the representative now: discover (once), trace, solve, and with ``"move"`` or ``"rows"`` rescale.

        Disturbs neither modes, BatchNorm's statistics (beyond their covariant rescaling), nor the random streams.

        Args:
            inputs: A batch, as in :func:`ms_optim.hessian_trace`.

        Returns:
            The balance, also kept as ``optimizer.balance``; ``None`` if the model has no symmetry to use.

        Raises:
            OptimizerError: If the optimizer has no model, or a gradient pass is open, whose weights may be perturbed.
        """
        if self.model is None:
            raise OptimizerError("refresh needs the network's graph; pass the model when building the optimizer")
        self.interrupt()
        self.ranks.look_again()
        if self._pass is not None or self.beginnings:
            raise OptimizerError(
                "refresh was called inside a gradient pass or a closure, where the weights may be perturbed and are "
                "put back afterwards; call it before passes() or step(closure)"
            )
        return self._refresh(Batch.of(inputs, self.model), None)

    def _refresh(self, batch: Batch, before: Snapshot | None) -> Balance | NeuronBalance | None:
        """The same, in full precision, with the state to go back to if it fails."""
        assert self.model is not None
        with torch.autocast(self.device.type, enabled=False):
            return self.representative.refresh(self.model, batch, before)

    def register_rescale_hook(self, hook: RescaleHook) -> RemovableHandle:
        """Have ``hook(group, t)`` called whenever the weights were rescaled by ``group.rescale_(model, t)``.

        For what has to move along, such as an average of the weights: ``lambda group, t: group.rescale_(average.module,
        t, clamp=True)``.  If the step that contains the rescaling fails and is undone, it is called with −t.  Hooks are
        not copied with the optimizer and not in its ``state_dict``.

        Args:
            hook: The function.

        Returns:
            A handle with ``remove()``.
        """
        return self.representative.register_hook(hook)

    @property
    def why_nothing_began(self) -> str:
        """Why a forward pass has not begun a step, if that is known: a sentence, or nothing."""
        if not self.loop.evaluated:
            return ""
        return (
            f" ({type(self.model).__name__} was called in evaluation mode, in which a loop begins no step: call "
            "model.train() before it, and then .eval() of the layers that are to stay so)"
        )

    @property
    def looks_for_its_model(self) -> bool:
        """Whether the module that owns the parameters has not been called yet."""
        return self._binding is not None and self.model is None

    def stop_looking(self, nothing_done: bool = False, quietly: bool = False) -> None:
        """A pass or a step is done, and no module with all the parameters was called in training.

        Args:
            nothing_done: Whether the step had no passes, which an unmodified loop makes with the model only.
            quietly: Whether that is known already.
        """
        if self._binding is None:
            return
        self._binding.close()
        self._binding = None
        if self.model is None and not quietly and (self.rebalance is not None or nothing_done):
            lost = "balanced" if self.rebalance is not None else "perturbed in an unmodified loop"
            warnings.warn(
                f"no module that owns all the parameters of {type(self).__name__} was called in training in the first "
                f"step, so nothing is {lost}; pass the model: model=...",
                NoEffectWarning,
                stacklevel=3,
            )
            self.representative.rebalance = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model's forward passes inside are our own, and none of the loop's."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False

    @property
    def busy(self) -> bool:
        """Whether the model is being measured by the optimizer itself."""
        return self._measuring

    @property
    def ready(self) -> bool:
        """Whether all passes of a step are done, and its descent is not."""
        return self._ready

    @property
    def inside_a_pass(self) -> bool:
        """Whether a gradient pass is open."""
        return self._pass is not None

    @property
    def inside_an_explicit_pass(self) -> bool:
        """Whether one is that no loop has opened."""
        return self._pass is not None and not (self.loop.open or self.loss_loop.open)

    def opened(self, gradient_pass: GradientPass) -> None:
        """A pass begins."""
        self._pass = gradient_pass
        if self.beginnings and self.beginnings[-1] is not gradient_pass.before:
            self.beginnings.append(gradient_pass.before)

    def closed(self, gradient_pass: GradientPass) -> None:
        """It ends."""
        self._pass = None

    def interrupt(self) -> None:
        """Restore the weights that a loop has perturbed."""
        self.loss_loop.interrupt()
        self.loop.interrupt()

    def drop(self) -> None:
        """The same, and forget the step that the loop has begun."""
        self.loss_loop.drop()
        self.loop.drop()

    @property
    def loop_of_closures(self) -> Loop | None:
        """What makes the passes of a closure inside it, so that it is called once; ``None``: it is called in each."""
        if self.loss_loop.attached:
            return self.loss_loop
        return self.loop if self._takes_loops and self.loop.begun else None

    def begin_closure(self) -> None:
        """A closure is about to be called once.

        Raises:
            OptimizerError: If an explicit pass is open.
        """
        if self.inside_an_explicit_pass:
            raise OptimizerError("step(closure) was called inside a gradient pass; leave the pass first")
        self.loss_loop.interrupt()  # of a forward pass without its backward
        self._ready = False

    def pass_over(self) -> None:
        """The next step has nothing to descend along."""
        self._ready = True

    def require_passes(self) -> None:
        """Refuse a descent without passes.

        Raises:
            OptimizerError: If there were none.
        """
        if self._ready or (self._takes_loops and self.model is None):
            return
        ways = (
            ", or optimizer.attach(module) once, to a module whose training forward returns the loss, or build it with "
            "ascent='momentum' or 'previous', which need one pass only"
        )
        raise OptimizerError(
            f"{type(self).__name__}.step() has no gradient passes to finish: call step(closure), or run `for "
            "gradient_pass in optimizer.passes(): with gradient_pass: loss.backward()` before step()"
            + ("" if self._takes_loops else ways)
            + self.why_nothing_began
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See :meth:`torch.optim.Optimizer.zero_grad`."""
        self.zeroed = True
        super().zero_grad(set_to_none)

    def warn_of_lost_gradients(self) -> None:
        """Say that gradients were taken before the passes of a closure that did not zero them."""
        warnings.warn(
            f"gradients were taken since the last step of {type(self).__name__} outside of its passes, and are not "
            "part of the step: step(closure) calls the closure once per pass, each of which begins without gradients; "
            "where batches share a step, optimizer.attach(module) to a module whose training forward returns the "
            "loss, run all of them inside each pass of passes(), or build the optimizer with ascent='momentum' or "
            "'previous', which need one pass only; where they are not to count, call optimizer.zero_grad() in the "
            "closure",
            LostGradientsWarning,
            stacklevel=4,
        )

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], may_refresh: bool = True) -> None:
        """What the first pass does before the model's forward: refresh if due, keep the batch.

        Args:
            args: The model's arguments.
            kwargs: Those that are named.
            may_refresh: Not if a forward of the same step came before.

        Raises:
            OptimizerError: If a wrapper is about to average gradients that were to stay local.
        """
        present = self._pass
        if not torch.is_grad_enabled() or self._measuring:
            return
        if present is None and not (self.outside or self.loss_loop.attached):
            self.outside = versions(self.gradients())
        if present is None or not present.first:
            return
        averages = inside_wrapper() and not self.loss_loop.begun
        if averages and self.keeps_local(present) and not self.ranks.wrappers():
            raise OptimizerError(
                f"m={self.m!r} keeps gradients on their rank, and DistributedDataParallel is about to average them; "
                "build the optimizer with the wrapped model, so that it can tell the wrapper"
            )
        batch = Batch(args, kwargs)
        if self.keeps_batches:
            self.batches.append(batch)
        if self.refresh_due and may_refresh and present.refreshes:
            with self.measuring():
                self._refresh(batch, present.before)
        if present.waits:
            present.waits = False
            present.perturb()
