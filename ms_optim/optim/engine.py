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
* passes are driven by a closure, explicitly, or by a loop that knows nothing of them (:mod:`~ms_optim.optim.loop`,
  :mod:`~ms_optim.optim.loss_loop`), on one process or several (:mod:`~ms_optim.optim.distributed`);
* the base optimizer shares its parameter groups and state with us, hence schedulers, ``add_param_group`` and
  checkpoints see one thing (:mod:`~ms_optim.optim.checkpoint`).

Source: the passes form generalises IVON's context manager.
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..balancing import Balance
from ..batch import Batch
from ..curvature.parallel import unwrapped
from ..errors import NoEffectWarning, OptimizerError, UnsupportedError
from ..symmetry import ScaleGroup
from . import checkpoint
from .binding import Binding
from .diagnostics import Observer, StepDiagnostics
from .distributed import GroupChoice, Ranks, inside_wrapper, is_sharded, mixed_seed
from .gradient_pass import GradientPass, Probe, Request, Snapshot, Turn
from .gradients import copied, slices, weighted_sum
from .loop import Loop
from .loss_loop import LossLoop
from .representative import Representative, RescaleHook
from .requirements import (
    Buffers,
    MicroBatch,
    Rebalance,
    require_known_base,
    require_model,
    require_nonnegative,
    require_own_parameters,
    require_range,
    require_real_parameters,
)
from .schedule import Schedule, Watch

Plan = Generator[Request | Probe, None, None]


class SharpnessAware(Optimizer):
    """Base class of all optimizers here; subclasses are final and define :meth:`plan` only.

    Args:
        model_or_params: The model, or parameters or parameter groups, with ``model=`` beside them or without.
        base: The class of the optimizer that descends, for instance ``torch.optim.SGD``.
        settings: Our own entries of every parameter group (``rho``, ``strength``), each ≥ 0.
        model: The model the parameters belong to, in ``DistributedDataParallel`` or ``torch.compile`` or not. ``None``:
            the outermost module that owns all parameters, as soon as it is called in training.
        rebalance: ``"move"``: rescale the weights to the representative at each refresh; ``"metric"``: leave them and
            use w_p = α_p^{-2} only; ``None``: neither.
        refresh_every: Steps between refreshes.
        columns: Exact columns per sample in a refresh's traces; ``None`` is exact.
        gauge: κ ∈ [0, 1], which representative: 0 trace, ½ trace × norm², 1 norm.
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
        process_group: The ranks that train this model; ``"auto"``: those of ``DistributedDataParallel``, or all of the
            default group; ``None``: this process alone.
        diagnose: Keep what each step saw in ``optimizer.diagnostics``. It costs a copy of the gradients, and waiting.
        **options: The base optimizer's keyword arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        UnsupportedError: If the model is in ``DataParallel``, a parameter is complex, the base optimizer calls the
            closure itself (LBFGS), or ``"move"`` cannot rescale its state.
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
        group: ScaleGroup | None = None,
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
        require_range(settings, rebalance, refresh_every, columns, gauge, buffers, m)
        self.schedule = Schedule(every, start, end, total_steps)
        self.model = None if model is None else unwrapped(model)
        self.ranks = Ranks([] if model is None else [model], process_group)
        self.buffers, self.m, self.seed = buffers, m, seed
        self.representative = Representative(self, rebalance, refresh_every, columns, gauge, group)
        self.observer = Observer(self, diagnose)
        self.steps = 0
        self._settings = dict(settings)
        self._ready = False  # all passes of a step are done
        self._measuring = False
        self._pass: GradientPass | None = None
        self._names: list[str] = []
        self.backup: list[Tensor] = []
        self.moved: list[tuple[ScaleGroup, Tensor]] = []  # the rescalings of this step
        self.kept: list[Tensor | None] = []  # the gradients of the step before, if the plan wants them
        self.keeps_gradients = False
        self.keeps_batches = False  # whether the plan wants the inputs of the first pass
        self.batches: list[Batch] = []
        self.scaler: torch.amp.GradScaler | None = None  # that of the present step, if it was named
        self.expects_overflow = False
        self._stepped_by_scaler = False
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

    def _watch_end(self) -> None:
        """Say when the run is over before the window opened."""
        self._watch = Watch(type(self).__name__, self.schedule)
        weakref.finalize(self, self._watch.end)

    def bind(self, model: nn.Module) -> None:
        """Take a model that was found for the parameters.

        Args:
            model: The module, wrapped or not.
        """
        self.model, self.ranks = unwrapped(model), Ranks([*self.ranks.modules, model], self.ranks.choice)
        self._share()
        self.loop = Loop(self, self.model, self._takes_loops)
        if self._pass is not None:
            self._pass.before.keep_buffers(self.model)
            self._pass.keep_buffers(self.model)

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
            OptimizerError: If it does not own the optimizer's parameters.
        """
        require_own_parameters(self.parameters(), module)
        if not self._takes_loops:
            self.loss_loop.detach()
            self.loss_module = module
            self.loss_loop = LossLoop(self, module)
            self.ranks = Ranks([*self.ranks.modules, module], self.ranks.choice)
        return module

    @abstractmethod
    def plan(self) -> Plan:
        """Yield the perturbation of each pass; see the module's docstring."""

    @property
    def rebalance(self) -> Rebalance:
        """``"move"``, ``"metric"`` or ``None``."""
        return self.representative.rebalance

    @property
    def group(self) -> ScaleGroup | None:
        """The scale group; ``None`` before it is discovered."""
        return self.representative.group

    @property
    def balance(self) -> Balance | None:
        """What the last refresh found."""
        return self.representative.balance

    @property
    def diagnostics(self) -> StepDiagnostics | None:
        """What the last step saw, with ``diagnose=True``."""
        return self.observer.found

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
    def device(self) -> torch.device:
        """Of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks."""
        return is_sharded(self.parameters())

    def parameters(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [p for entry in self.param_groups for p in entry["params"]]

    def names(self) -> list[str]:
        """Their names in the model (group and position, without a model)."""
        return self._names

    def setting(self, key: str) -> list[float]:
        """A group setting (``rho``, ``strength``), per parameter.

        Args:
            key: Its name.

        Returns:
            One number per parameter.

        Raises:
            ValueError: If a schedule has made it negative.
        """
        for entry in self.param_groups:
            require_nonnegative(key, entry[key])
        return [float(entry[key]) for entry in self.param_groups for _ in entry["params"]]

    def scales(self, which: Literal["log_scale", "weights", "trace_weights", "pulls"]) -> list[float]:
        """A field of the balance, per parameter; what an unbalanced optimizer has where there is none.

        Args:
            which: The field.

        Returns:
            One number per parameter.
        """
        neutral = 1.0 if which in ("weights", "trace_weights") else 0.0
        if self.balance is None:
            return [neutral] * len(self.parameters())
        values: dict[str, float] = getattr(self.balance, which)
        return [values.get(name, neutral) for name in self._names]

    def signs(self) -> list[float]:
        """−1 for parameters along whose gradient the base optimizer ascends (``maximize``), else 1."""
        return [-1.0 if entry.get("maximize", False) else 1.0 for entry in self.param_groups for _ in entry["params"]]

    def momentum(self) -> list[Tensor | None]:
        """The base optimizer's running average of gradients, per parameter; ``None`` where there is none yet."""
        states = [self.base.state.get(p, {}) for p in self.parameters()]
        return [state.get("momentum_buffer", state.get("exp_avg")) for state in states]

    def previous_gradients(self) -> list[Tensor | None]:
        """The gradients that the step before descended along, per parameter; ``None`` where there was none."""
        return self.kept + [None] * (len(self.parameters()) - len(self.kept))

    def gradients(self) -> list[Tensor | None]:
        """``.grad`` of each parameter: what the last pass found."""
        return [p.grad for p in self.parameters()]

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
        self.scaler, self.expects_overflow = None, False
        return self._passes([(slice(None), 1.0)], refreshes, zeroes=False)

    def _passes(
        self, parts: list[tuple[slice, float]], refreshes: bool = True, zeroes: bool = True
    ) -> Iterator[GradientPass]:
        """See :meth:`passes`."""
        if self.sharded and self.m != "global":
            raise UnsupportedError(
                f"m={self.m!r} asks for perturbations of its own for some samples, but the parameters are sharded over "
                "ranks, and their gradients are always summed over all; use m='global', or DistributedDataParallel"
            )
        self._ready = self._stepped_by_scaler = False
        self.batches, self.moved = [], []
        if self.ranks.group is not None:  # equal on all ranks, whatever was drawn for batches of different sizes
            self.generator.manual_seed(mixed_seed(self.seed, self.steps))
        before = Snapshot(self)
        self.observer.begin()
        total: list[Tensor | None] = []
        for index, (samples, weight) in enumerate(parts):
            turn = Turn(before, samples, weight, refreshes and index == 0, zeroes)
            yield from self._turn(turn)
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
        plan, first = self.plan() if self.active else _plain(), True
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
            first = False
        try:
            turn.finish()
        except BaseException:
            turn.before.restore()
            raise

    def step(self, closure: Callable[..., Any] | None = None, samples: int | None = None) -> Any:
        """One step: all passes through the closure, or, after :meth:`passes`, the descent alone.

        Args:
            closure: Zeroes the gradients, runs forward and backward, returns the loss. Called once per pass; with
                ``samples``, with the slice of the batch that it is to take.
            samples: The size of the batch, where ``m`` is a number.

        Returns:
            The loss of the first pass (before any ascent), or ``None`` without a closure.

        Raises:
            OptimizerError: If there is neither a closure nor finished passes, nor a pass begun by a training forward.
        """
        loss = None
        if closure is None:
            for loop in (self.loss_loop, self.loop):
                if loop.begun:
                    loop.finish()
        if closure is not None and self._stepped_by_scaler:
            self._stepped_by_scaler = False
            raise OptimizerError(
                "a closure was passed through GradScaler.step, which calls it after unscaling, so that its gradients "
                "would be descended along still multiplied by the loss scale; run `for gradient_pass in "
                "optimizer.passes(scaler=scaler): with gradient_pass: scaler.scale(loss).backward()`, and then "
                "scaler.step(optimizer)"
            )
        if closure is not None:
            for gradient_pass in self.passes(samples=samples):
                with gradient_pass, torch.enable_grad():
                    value = closure() if samples is None else closure(gradient_pass.samples)
                    gradient_pass.loss = value.detach() if isinstance(value, Tensor) else value
                if gradient_pass.first:
                    weight = gradient_pass.turn.weight
                    part = value if weight == 1.0 else gradient_pass.loss * weight
                    loss = part if loss is None else loss + part
        elif not self._ready and not (self._takes_loops and self.model is None):
            raise OptimizerError(
                f"{type(self).__name__}.step() has no gradient passes to finish: call step(closure), or run "
                "`for gradient_pass in optimizer.passes(): with gradient_pass: loss.backward()` before step()"
                + (
                    ", or optimizer.attach(module) once, to a module whose training forward returns the loss"
                    if not self._takes_loops
                    else ""
                )
            )
        if self._binding is not None:
            self.stop_looking()
        if self.keeps_gradients and self.schedule.active(self.steps + 1):
            self.kept = copied(self.gradients(), self.kept)
        self.base.step()
        self._ready = False
        self.steps += 1
        self._watch.steps = self.steps
        self.representative.due -= 1
        return loss

    def refresh(self, inputs: Any) -> Balance | None:
        """Find the representative now: discover (once), trace, solve, and with ``"move"`` rescale.

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
        if self._pass is not None:
            raise OptimizerError(
                "refresh was called inside a gradient pass, where the weights may be perturbed and are put back "
                "afterwards; call it before passes()"
            )
        return self._refresh(Batch.of(inputs, self.model), None)

    def _refresh(self, batch: Batch, before: Snapshot | None) -> Balance | None:
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

    def rescale_kept(self, log_scale: dict[str, float]) -> None:
        """Move the gradients that are kept along with the weights: by e^{-a}.

        Args:
            log_scale: a, by parameter name.
        """
        with torch.no_grad():
            for name, grad in zip(self._names, self.kept, strict=False):
                if grad is not None and log_scale.get(name):
                    grad.mul_(math.exp(-log_scale[name]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see :meth:`torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: As in torch; ``rho`` or ``strength`` may be given.

        Raises:
            OptimizerError: If a parameter is not the model's.
        """
        if not self._constructed:
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        # A generator can be read once; torch reads it after us. (A set stays one: torch refuses it.)
        params = given if isinstance(given, (Tensor, set)) else list(given)
        param_group = {**self._settings, **param_group, "params": params}
        self._check_group(param_group)
        self.base.add_param_group(param_group)
        self._share()

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
        nothing = {"loop": None, "loss_loop": None, "_binding": None, "_watch": None, "scaler": None}
        return {**kept, **nothing, "backup": [], "moved": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy looks at the model that was copied with it."""
        super().__setstate__(state)
        self._watch_end()
        self._watch.steps = self.steps
        self.loop = Loop() if self.model is None else Loop(self, self.model, self._takes_loops)
        self.loss_loop = LossLoop() if self.loss_module is None else LossLoop(self, self.loss_module)
        if self.model is None and self.steps == 0:
            self._binding = Binding(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks for before it unscales and calls :meth:`step`: the only moment at which we see it."""
        self._stepped_by_scaler = True
        self.interrupt()  # the scaler may skip the step that would do so
        if self.scaler is None and self.active and self.adds_to_gradient:
            raise OptimizerError(
                f"{type(self).__name__} adds to a gradient that GradScaler is about to divide by the loss scale, and "
                "did not know the scale; name the scaler: optimizer.passes(scaler=scaler)"
            )
        return False

    @property
    def adds_to_gradient(self) -> bool:
        """Whether the plan adds something of its own to the gradient of the loss."""
        return False

    def _share(self) -> None:
        """One list of groups and one state for both optimizers: torch replaces them on loading."""
        self.param_groups, self.state = self.base.param_groups, self.base.state
        if self.model is None:
            sizes = enumerate(len(entry["params"]) for entry in self.param_groups)
            self._names = [f"{g}.{i}" for g, size in sizes for i in range(size)]
        else:
            known = {id(p): name for name, p in self.model.named_parameters()}
            self._names = [known.get(id(p), "") for p in self.parameters()]

    def signature(self) -> list[list[list[str]]]:
        """Per group, the name and shape of each parameter."""
        names = iter(self._names)
        return [[[next(names), str(tuple(p.shape))] for p in entry["params"]] for entry in self.param_groups]

    def _check_group(self, entry: dict[str, Any]) -> None:
        """Refuse settings out of range, complex parameters and parameters that are not the model's."""
        for key in self._settings:
            require_nonnegative(key, entry[key])
        given = entry["params"]
        require_real_parameters([given] if isinstance(given, Tensor) else given, self.model)

    @property
    def looks_for_its_model(self) -> bool:
        """Whether the module that owns the parameters has not been called yet."""
        return self._binding is not None and self.model is None

    def stop_looking(self) -> None:
        """A pass or a step is done, and no module with all the parameters was called in training."""
        assert self._binding is not None
        self._binding.close()
        self._binding = None
        if self.model is None and (self.rebalance is not None or self._takes_loops):
            warnings.warn(
                f"no module that owns all the parameters of {type(self).__name__} was called in training in the first "
                "step, so nothing is balanced or perturbed in an unmodified loop; pass the model: model=...",
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
        if not torch.is_grad_enabled() or present is None or not present.first or self._measuring:
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
                present.before.keep_weights()
                self._refresh(batch, present.before)
        if present.waits:
            present.waits = False
            present.perturb()


def _plain() -> Plan:
    """The plan of a step of the base optimizer."""
    yield None
