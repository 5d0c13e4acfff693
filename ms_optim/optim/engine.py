r"""The engine: perturb, gradient, restore, descend, written once for every optimizer of the package.

An optimizer is a *plan*: a generator that yields where each gradient pass is to be taken (``None`` for the weights
themselves; in a ``Probe``, if that gradient only shows the way to the next pass), finds the pass's gradient in
``.grad`` when it goes on, and may add to it before it ends.  Two lines are SAM::

    yield Probe()
    yield ascent(gradients, metric, rho)

Everything else happens here and around here:

* a pass restores the weights, and every buffer of the model in all passes but one, so that BatchNorm's statistics move
  once a step; all passes draw the same random numbers; after an exception everything is as before the step
  (:mod:`~ms_optim.optim.gradient_pass`, :mod:`~ms_optim.optim.randomness`);
* the weights are taken to their representative now and then, in a forward pre-hook on the incoming batch, before the
  first forward of a step, so never between a forward and its backward (:mod:`~ms_optim.optim.representative`);
* the model is watched, found if it was not given (:mod:`~ms_optim.optim.watcher`, :mod:`~ms_optim.optim.binding`);
* passes are driven by a closure, explicitly, or by a loop that knows nothing of them (:mod:`~ms_optim.optim.loop`,
  :mod:`~ms_optim.optim.loss_loop`), on one process or several (:mod:`~ms_optim.optim.distributed`);
* the base optimizer shares its parameter groups and state with us (:mod:`~ms_optim.optim.wrapper`,
  :mod:`~ms_optim.optim.checkpoint`).

Source: the passes form generalises IVON's context manager.
"""

from __future__ import annotations

import sys
import weakref
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..balancing.rebalance import Granularity
from ..batch import Batch
from ..curvature.parallel import unwrapped
from ..errors import OptimizerError, UnsupportedError
from ..symmetry import Group
from . import checkpoint
from .binding import Binding
from .closure import is_a_scalers, loss_by_loop, loss_by_passes, require_unscaled
from .copies import Copies
from .diagnostics import Observer, StepDiagnostics
from .distributed import GroupChoice, Ranks, mixed_seed
from .gradient_pass import GradientPass, Probe, Request, Snapshot, Turn
from .gradients import Version, copied, slices, weighted_sum
from .loop import Loop
from .loss_loop import LossLoop, require_no_other
from .representative import Representative
from .requirements import (
    Buffers,
    MicroBatch,
    Rebalance,
    require_granularity,
    require_known_base,
    require_model,
    require_one_gradient,
    require_one_step_for_all,
    require_outside_closures,
    require_own_parameters,
    require_range,
    require_whole_batches,
)
from .schedule import Schedule, Watch
from .watcher import Watcher

Plan = Generator[Request | Probe, None, None]


class SharpnessAware(Watcher):
    """Base class of all optimizers here; subclasses are final and define :meth:`plan` only.

    Args:
        model_or_params: The model, or parameters or parameter groups, with ``model=`` beside them or without.
        base: The class of the optimizer that descends, for instance ``torch.optim.SGD``.
        settings: Our own entries of every parameter group (``rho``, ``strength``), each ≥ 0.
        model: The model the parameters belong to, in ``DistributedDataParallel`` or ``torch.compile`` or not. ``None``:
            the outermost module that owns all parameters, as soon as it is called in training.
        rebalance: ``"move"``: rescale the weights to the representative at each refresh; ``"metric"``: leave them and
            use w_p = α_p^{-2} only; ``"rows"``: rescale them to where the rows of all layers have one size, as at the
            usual initialisations, and use the w_p that lead to the representative from there; ``None``: neither.
        refresh_every: Steps between refreshes.
        columns: Exact columns per sample in a refresh's traces; ``None`` is exact.
        gauge: κ ∈ [0, 1], which representative: 0 trace, ½ trace × norm², 1 norm.
        granularity: What ``"move"`` rescales: ``"layer"``, whole tensors, or ``"neuron"``, every hidden unit (channel)
            on its own, by the diagonal of the Hessian.
        group: The scale group; discovered on the first batch if ``None``. Of a sharded model, discover it before
            sharding.
        seed: Of the generator for signs and noise.
        every: k: our own part is taken in every k-th step; the others are the base optimizer's, at its cost.
        start: The first step with our own part, counted in steps from 0.
        end: The first step after the last with it; ``None``: there is none.
        total_steps: The length of the run, if it is known: a ``start`` beyond it is refused.
        buffers: The pass whose changes to buffers (BatchNorm's statistics) are kept: ``"first"``, at the weights
            themselves, or ``"last"``, where the gradient is taken.
        m: How much of the batch shares a perturbation. ``"global"``: all that a pass sees, on all ranks; ``"local"``:
            what it sees on this rank; a number: as many samples, for which passes are asked for one after another
            (``passes(samples=len(x))``).
        process_group: The ranks that train this model; ``"auto"``: those of ``DistributedDataParallel`` or of FSDP2's
            mesh, or all of the default group; ``None``: this process alone (each rank trains its own model).
        diagnose: Keep what each step saw in ``optimizer.diagnostics``. It costs a copy of the gradients, and waiting.
        **options: The base optimizer's keyword arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        UnsupportedError: If the model is in ``DataParallel``, a parameter is complex, the base optimizer calls the
            closure itself (LBFGS), or ``"move"`` or ``"rows"`` cannot rescale its state.
        ValueError: If a number is out of its range, or the window of steps never opens.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer],
        settings: dict[str, float],
        *,
        model: nn.Module | None = None,
        rebalance: Rebalance = None,
        refresh_every: int = 100,
        columns: int | None = 2,
        gauge: float = 0.0,
        granularity: Granularity = "layer",
        group: Group | None = None,
        seed: int = 0,
        every: int = 1,  # k
        start: int = 0,
        end: int | None = None,
        total_steps: int | None = None,
        buffers: Buffers = "first",
        m: MicroBatch = "global",
        process_group: GroupChoice = "auto",
        diagnose: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(model_or_params, nn.Module):
            if model is not None and model is not model_or_params:
                raise OptimizerError("two models were given; pass the model once, as the first argument")
            model, params = model_or_params, list(model_or_params.parameters())
        else:
            params = list(model_or_params)
        require_model(model)
        if isinstance(base, Optimizer):
            raise OptimizerError(
                f"base is an instance of {type(base).__name__}; pass the class, torch.optim.{type(base).__name__}, and "
                "its arguments (lr=...) beside it"
            )
        if not callable(base):
            raise OptimizerError(f"base is {base!r}; pass a class of optimizers, such as torch.optim.SGD")
        require_range(settings, rebalance, refresh_every, columns, gauge, buffers, m)
        require_granularity(granularity, rebalance, gauge, group)
        self.schedule = Schedule(every, start, end, total_steps)
        self.model = None if model is None else unwrapped(model)
        self.ranks = Ranks([] if model is None else [model], process_group)
        self.buffers, self.m, self.seed = buffers, m, seed
        self.representative = Representative(
            self, rebalance, refresh_every, columns, gauge, granularity, group
        )
        self.observer = Observer(self, diagnose)
        self.steps = 0
        self._settings = dict(settings)
        self._ready = False  # all passes of a step are done
        self._measuring = False
        self._pass: GradientPass | None = None
        self._names: list[str] = []
        self.backup, self.buffers_before, self.buffers_between = Copies(), Copies(), Copies()
        self.moved: list[tuple[Group, Tensor]] = []  # the rescalings of this step
        self.beginnings: list[Snapshot] = []  # what a closure that is called once can go back to
        self.outside: list[Version] = []  # the gradients as a training forward outside of all passes found them
        self.zeroed = False
        self.kept: list[Tensor | None] = []  # the gradients of the step before, if the plan wants them
        self.kept_next: list[Tensor | None] | None = None
        self.keeps_gradients = False
        self.keeps_batches = False  # whether the plan wants the inputs of the first pass
        self.batches: list[Batch] = []
        self.last_loss: Any = None
        self.scaler: torch.amp.GradScaler | None = None  # that of the present step, if it was named
        self.expects_overflow = False
        self.probe_scale = 1.0
        self._takes_loops = False
        self.loop = Loop()  # which does nothing
        self.loss_loop = LossLoop()
        self.loss_module: nn.Module | None = None
        self._binding: Binding | None = None
        self._constructed = False
        super().__init__(params, dict(settings))
        self.base = base(self.param_groups, **options)
        require_known_base(self.base, rebalance)
        # OneCycleLR and its like look here for the momentum that they drive.
        self.defaults = {**self.base.defaults, **settings}
        self._share()
        self._constructed = True
        for entry in self.param_groups:
            self._check_group(entry)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._watch_end()
        if self.model is None:
            self._binding = Binding(self)
        else:
            self.loop = Loop(self, self.model)

    def bind(self, model: nn.Module) -> None:
        """Take a model that was found for the parameters.

        Args:
            model: The module, wrapped or not.
        """
        require_model(model)
        self.model, self.ranks = unwrapped(model), Ranks([*self.ranks.modules, model], self.ranks.choice)
        self._share()
        self.loop = Loop(self, self.model, self._takes_loops)
        if self._pass is not None:
            self._pass.before.keep_buffers()
            self._pass.keep_buffers()

    def take_loops(self) -> None:
        """Take the passes of unmodified loops; for plans of one pass, at the end of their constructor."""
        self._takes_loops = True
        if self.model is not None:
            self.loop.detach()
            self.loop = Loop(self, self.model, takes=True)

    def attach(self, module: nn.Module) -> nn.Module:
        """Take all passes of an unmodified loop around a module whose training forward returns the loss.

        From now on ``loss = module(...); loss.backward(); optimizer.step()`` is a whole step: see
        :mod:`ms_optim.optim.loss_loop`.  For an optimizer of one pass nothing has to be attached.

        Args:
            module: A module that holds the optimizer's model (or that model), returning the loss, ``(loss, ...)``,
                ``{"loss": loss, ...}`` or an object with ``.loss``.

        Returns:
            The module.

        Raises:
            OptimizerError: If it does not own the optimizer's parameters, or another optimizer, of other parameters, is
                attached to it.
            UnsupportedError: If what it descends along is made of several passes' gradients.
        """
        require_model(module)
        require_own_parameters(self.parameters(), module)
        require_whole_batches(self.m)
        require_one_gradient(type(self).__name__, self.combines_passes)
        if not self._takes_loops:
            require_no_other(self, module)
            self.loss_loop.detach()
            self.loss_module = module
            self.loss_loop = LossLoop(self, module)
            self.ranks = Ranks([*self.ranks.modules, module], self.ranks.choice)
        return module

    @abstractmethod
    def plan(self) -> Plan:
        """Yield where each pass is taken; in a loop ``self`` is a weak proxy (``lambda: self.f()``, not ``self.f``)."""

    @property
    def diagnostics(self) -> StepDiagnostics | None:
        """What the last step saw, with ``diagnose=True``."""
        return self.observer.found

    def passes(
        self, scaler: torch.amp.GradScaler | None = None, samples: int | None = None
    ) -> Iterator[GradientPass]:
        """The gradient passes of one step, each a context in which to run forward and backward.

        Gradients of this optimizer's parameters start from zero in each; several backward passes inside one add up
        (and in parameters that are not this optimizer's, so do those of all passes).  After the loop :meth:`step`
        descends along what the last pass left in ``.grad`` (clip it before).

        In mixed precision autocast goes around the forward pass, inside the pass or around all of them.  With a
        ``GradScaler``, ``scaler.scale(loss).backward()`` takes the place of ``loss.backward()`` and
        ``scaler.step(optimizer)`` that of ``optimizer.step()``; the perturbation does not depend on the scale, and
        after an overflow in any pass the scaler skips the step.

        With ``m`` a number there is a turn of passes for every m samples: take ``x[gradient_pass.samples]``.  Their
        gradients are averaged, over the samples and, with several ranks, over those.

        Args:
            scaler: The scaler that the losses are scaled with, if one is.  What an optimizer adds to the gradient is
                scaled like it, and an overflow is not warned of.
            samples: The size of the batch, where ``m`` is a number.

        Yields:
            One context per pass.

        Raises:
            OptimizerError: If the previous pass was not left, the model was not called where a refresh was due, or
                ``samples`` is missing.
        """
        self.drop()
        if self._pass is not None:
            raise OptimizerError("passes() was called inside a gradient pass; leave the pass first")
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.expects_overflow = self.scaler is not None
        yield from self._passes(slices(samples, self.m))

    def loop_passes(self, refreshes: bool = True) -> Iterator[GradientPass]:
        """:meth:`passes` of a loop whose gradients are its own business.

        Args:
            refreshes: Whether it may begin with a refresh.

        Returns:
            One context per pass.
        """
        require_whole_batches(self.m)
        self.scaler, self.expects_overflow = None, False
        # A hook holds what is returned, and must not keep alive an optimizer that is dropped; but a method taken
        # from a proxy is bound to the optimizer itself.
        return SharpnessAware._passes(weakref.proxy(self), [(slice(None), 1.0)], refreshes, zeroes=False)

    def _passes(
        self, parts: list[tuple[slice, float]], refreshes: bool = True, zeroes: bool = True
    ) -> Iterator[GradientPass]:
        """See :meth:`passes`."""
        if self.sharded and self.m != "global":
            raise UnsupportedError(
                f"m={self.m!r} asks for perturbations of its own for some samples, but the parameters are sharded over "
                "ranks, and their gradients are always summed over all; use m='global', or DistributedDataParallel"
            )
        self._ready = False
        self.batches, self.moved, self.outside, self.kept_next = [], [], [], None
        self.ranks.look_again()
        require_one_step_for_all(self)
        if self.ranks.group is not None:  # equal on all ranks, whatever was drawn for batches of different sizes
            self.generator.manual_seed(mixed_seed(self.seed, self.steps))
        before = Snapshot(self)
        self.observer.begin()
        total: list[Tensor | None] = []
        for index, (samples, weight) in enumerate(parts):
            turn = Turn(before, samples, weight, refreshes and index == 0, zeroes)
            yield from SharpnessAware._turn(self, turn)
            self.batches = []
            if len(parts) > 1:
                total = weighted_sum(total, self.gradients(), weight)
        for p, grad in zip(self.parameters(), total, strict=False):
            p.grad = grad
        if isinstance(self.m, int) and zeroes:
            self.ranks.average_(self.gradients())
        self.observer.finish()
        self._ready = True

    def _turn(self, turn: Turn) -> Iterator[GradientPass]:
        """Once through the plan."""
        plan, first = self.__class__.plan(self) if self.active else _plain(), True
        while True:
            try:
                request = next(plan)
            except StopIteration:
                break
            except BaseException:
                turn.before.restore()
                raise
            gradient_pass = GradientPass(self, request, turn, first)
            del request  # it holds the gradients of the pass before, whose memory this pass can use
            yield gradient_pass
            if not gradient_pass.done:
                raise OptimizerError("a gradient pass was not entered; use `with gradient_pass:` around each backward")
            self.observer.after(gradient_pass)
            self.last_loss = gradient_pass.loss
            first = False
        try:
            turn.finish()
        except BaseException:
            turn.before.restore()
            raise

    def step(self, closure: Callable[..., Any] | None = None, samples: int | None = None) -> Any:
        """One step: all passes through the closure, or, after :meth:`passes`, the descent alone.

        The closure is called once per pass, each of which begins without gradients.  Only where a loop makes the passes
        inside it (a module is attached, or of an optimizer of one pass training forwards have begun a step) is it
        called once, and gradients are its own business: as in torch they add to what is there unless it zeroes them.
        Then a closure that returns no loss and leaves no gradients is a batch passed over.  After an exception in it
        everything but the gradients is as before the call, or as before the forwards that began the open step.

        Args:
            closure: Zeroes the gradients, runs forward and backward, returns the loss; with ``samples``, called with
                the slice of the batch that it is to take, once per pass.
            samples: The size of the batch, where ``m`` is a number.

        Returns:
            The loss of the first pass (before any ascent), or ``None`` without a closure.

        Raises:
            OptimizerError: If there is neither a closure nor finished passes, nor a pass begun by a training forward,
                or the closure does not call the module that is attached.
        """
        loss = None
        require_unscaled(closure)
        require_outside_closures(self)
        loop = self.loop_of_closures if samples is None else None
        if closure is None:
            for begun in (self.loss_loop, self.loop):
                if begun.begun:
                    begun.finish()
            self.require_passes()
        elif loop is None:
            loss = loss_by_passes(self, closure, samples)
        else:
            loss = loss_by_loop(self, loop, closure)
        if self._binding is not None:
            self.stop_looking(nothing_done=not self._ready)
        if self.keeps_gradients and self.schedule.active(self.steps + 1):
            self.kept = copied(self.gradients(), self.kept)
        if self.kept_next is not None:
            self.kept, self.kept_next = self.kept_next, None
        self.descend()
        self._ready, self.outside = False, []
        self.steps += 1
        self._watch.steps = self.steps
        self.representative.due -= 1
        return loss

    def descend(self) -> None:
        """The base optimizer's step, along ``.grad``."""
        self.base.step()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups as torch writes them, and our own under ``"ms_optim"``.

        Returns:
            Plain containers, numbers and tensors only: loads with ``weights_only=True``.
        """
        return checkpoint.written(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` wrote; all of it is checked before any of it is taken.

        ``rebalance``, ``gauge`` and ``refresh_every`` stay those of this optimizer: where it goes to another
        representative than the one that was saved, the next step begins with a refresh. The random stream is not taken
        from another kind of device.

        What the widespread two-step SAM (``davda54/sam``) wrote is taken, too: its groups; it holds no state of the
        base optimizer, which starts anew, and that is said.

        Args:
            state_dict: The state.

        Raises:
            StateError: If it is another optimizer's or another model's.
        """
        self.drop()
        checkpoint.read(self, state_dict)
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what torch leaves out, too: hooks, and the ``step`` that a scheduler has wrapped."""
        self.interrupt()
        if self._pass is not None:
            raise OptimizerError("an optimizer was copied inside a gradient pass; leave the pass first")
        kept = {k: v for k, v in vars(self).items() if k != "step" and not k.startswith("_optimizer_")}
        nothing = dict.fromkeys(["loop", "loss_loop", "_binding", "_watch", "scaler"])
        return {**kept, **nothing, "moved": [], "beginnings": [], "outside": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy looks at the model that was copied with it."""
        super().__setstate__(state)
        self.representative.belongs_to(self)
        self.observer.belongs_to(self)
        self._watch_end()
        self._watch.steps = self.steps
        self.loop = Loop() if self.model is None else Loop(self, self.model, self._takes_loops)
        self.loss_loop = LossLoop() if self.loss_module is None else LossLoop(self, self.loss_module)
        if self.model is None and self.steps == 0:
            self._binding = Binding(self)

    def _watch_end(self) -> None:
        """Say when the run is over before the window opened."""
        self._watch = Watch(type(self).__name__, self.schedule)
        weakref.finalize(self, self._watch.end)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks for before it unscales and calls :meth:`step`: the only moment at which we see it."""
        self.interrupt()  # the scaler may skip the step that would do so
        if not is_a_scalers(sys._getframe(1)):
            return False  # others ask, too, to know whether gradients are unscaled for them
        self.loop.leave()
        if self.scaler is None and self.active and self.adds_to_gradient and not self.loop.begun:
            raise OptimizerError(
                f"{type(self).__name__} adds to a gradient that GradScaler is about to divide by the loss scale, and "
                "did not know the scale; name the scaler: optimizer.passes(scaler=scaler)"
            )
        return False

    @property
    def adds_to_gradient(self) -> bool:
        """Whether the plan adds something of its own to the gradient of the loss."""
        return False


def _plain() -> Plan:
    """The plan of a step of the base optimizer."""
    yield None
