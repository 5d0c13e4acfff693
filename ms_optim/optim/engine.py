r"""The engine: perturb, gradient, restore, descend, written once for every optimizer of the package.

An optimizer is a *plan*: a generator that yields the perturbation of each gradient pass (``None`` for the weights
themselves), finds that pass's gradient in ``.grad`` when it goes on, and may add to it before it ends.  Two lines are
SAM::

    yield None
    yield ascent(gradients, metric, rho)

Everything else happens here:

* a pass restores the weights, and every buffer of the model in all passes but the first, so that BatchNorm's statistics
  move once a step; all passes draw the same random numbers; after an exception everything is as before the step (see
  :mod:`ms_optim.optim.gradient_pass`, :mod:`ms_optim.optim.randomness`);
* a *refresh* finds the representative of the weights under the model's scale symmetries: discover (once), trace, solve,
  and with ``rebalance="move"`` rescale the weights and the base optimizer's state.  It runs in a forward pre-hook on
  the incoming batch, before the first forward of a step, so never between a forward and its backward;
* the base optimizer shares its parameter groups and state with us, hence schedulers, ``add_param_group`` and
  checkpoints see one thing.

Source: the passes form generalises IVON's context manager; the refresh is arXiv 2106.12612, Thm 1, per batch.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..balancing import Balance, balance
from ..batch import Batch
from ..curvature import hessian_trace
from ..errors import NoEffectWarning, OptimizerError, UnsupportedError
from ..symmetry import ScaleGroup, scale_symmetries
from . import checkpoint
from .gradient_pass import GradientPass, Perturbation, Snapshot
from .loop import Loop
from .requirements import (
    Rebalance,
    require_known_base,
    require_nonnegative,
    require_plain_model,
    require_range,
)

Plan = Generator[Perturbation | Callable[[], Perturbation], None, None]

# A normaliser's ε stands still while its input is rescaled, so the traces of a badly scaled network are those of a
# slightly different function. Measured again at the representative they are right: the first refresh is repeated, and
# each round takes the difference between equivalent starts from 1e-2 to 1e-6 to rounding.
_FIRST_ROUNDS = 4


class SharpnessAware(Optimizer):
    """Base class of all optimizers here; subclasses are final and define :meth:`plan` only.

    Args:
        model_or_params: The model, or parameters or parameter groups with ``model=`` beside them.
        base: The class of the optimizer that descends, for instance ``torch.optim.SGD``.
        settings: Our own entries of every parameter group (``rho``, ``strength``), each ≥ 0.
        model: The model the parameters belong to.
        rebalance: ``"move"``: rescale the weights to the representative at each refresh; ``"metric"``: leave them and
            use w_p = α_p^{-2} only; ``None``: neither.
        refresh_every: Steps between refreshes.
        columns: Exact columns per sample in a refresh's traces; ``None`` is exact.
        gauge: κ ∈ [0, 1], which representative: 0 trace, ½ trace × norm², 1 norm.
        group: The scale group; discovered on the first batch if ``None``.
        seed: Of the generator for signs and noise.
        every: k: our own part is taken in every k-th step, beginning with the first; the others are the base
            optimizer's, at its cost.
        **options: The base optimizer's keyword arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's, or a model is needed and missing.
        UnsupportedError: If the model is wrapped for data parallelism or compilation, ``maximize`` is set, the base
            optimizer calls the closure itself (LBFGS), or ``"move"`` cannot rescale its state.
        ValueError: If a number is out of its range.
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
        **options: Any,
    ) -> None:
        if isinstance(model_or_params, nn.Module):
            if model is not None and model is not model_or_params:
                raise OptimizerError("two models were given; pass the model once, as the first argument")
            model, params = model_or_params, list(model_or_params.parameters())
        else:
            params = list(model_or_params)
        require_plain_model(model)
        if isinstance(base, Optimizer):
            raise OptimizerError(
                f"base is an instance of {type(base).__name__}; pass the class, torch.optim.{type(base).__name__}, and "
                "its arguments (lr=...) beside it"
            )
        require_range(settings, rebalance, refresh_every, columns, gauge, every)
        if rebalance is not None and model is None:
            raise OptimizerError(
                f"rebalance={rebalance!r} needs the network's graph; pass the model as the first argument, or model= "
                "beside the parameters"
            )
        self.model = model
        self.rebalance, self.refresh_every, self.columns, self.gauge = rebalance, refresh_every, columns, gauge
        self.every = every
        self.group = group
        self.balance: Balance | None = None
        self.steps = 0
        self._settings = dict(settings)
        self._due = 0  # steps until the next refresh
        self._ready = False  # all passes of a step are done
        self._measuring = False
        self._pass: GradientPass | None = None
        self._names: list[str] = []
        self._subgroups: dict[frozenset[str], ScaleGroup] = {}
        self._backup: list[Tensor] = []
        self.keeps_batches = False  # whether the plan wants the inputs of the first pass
        self.batches: list[Batch] = []
        self.scaler: torch.amp.GradScaler | None = None  # that of the present step, if it was named
        self._stepped_by_scaler = False
        self._loop = Loop()  # which does nothing, until attach()
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
        self.generator = torch.Generator(self.parameters()[0].device).manual_seed(seed)

    def attach(self) -> None:
        """Take the passes of unmodified loops; for plans of one pass, at the end of their constructor."""
        if self.model is not None:
            self._loop = Loop(self)

    @abstractmethod
    def plan(self) -> Plan:
        """Yield the perturbation of each pass; see the module's docstring."""

    @property
    def refresh_due(self) -> bool:
        """Whether the next forward pass of a step begins with a refresh."""
        return self.rebalance is not None and self._due <= 0

    @property
    def active(self) -> bool:
        """Whether the next step has a part of our own, and is not one of the base optimizer alone."""
        return self.steps % self.every == 0

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

    def momentum(self) -> list[Tensor | None]:
        """The base optimizer's running average of gradients, per parameter; ``None`` where there is none yet."""
        states = [self.base.state.get(p, {}) for p in self.parameters()]
        return [state.get("momentum_buffer", state.get("exp_avg")) for state in states]

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the last pass, per parameter.

        Returns:
            ``.grad`` of each parameter.

        Raises:
            UnsupportedError: If one is sparse.
        """
        grads = [p.grad for p in self.parameters()]
        for name, grad in zip(self._names, grads, strict=True):
            if grad is not None and grad.is_sparse:
                raise UnsupportedError(
                    f"the gradient of {name} is sparse, which is not supported yet; build the layer with sparse=False"
                )
        return grads

    def passes(self, scaler: torch.amp.GradScaler | None = None) -> Iterator[GradientPass]:
        """The gradient passes of one step, each a context in which to run forward and backward.

        Gradients of this optimizer's parameters start from zero in each; several backward passes inside one add up
        (and in parameters that are not this optimizer's, so do those of all passes).  After the loop :meth:`step`
        descends along what the last pass left in ``.grad`` (clip it before).

        In mixed precision autocast goes around the forward pass, inside the pass or around all of them.  With a
        ``GradScaler``, ``scaler.scale(loss).backward()`` takes the place of ``loss.backward()`` and
        ``scaler.step(optimizer)`` that of ``optimizer.step()``; the perturbation does not depend on the scale, and
        after an overflow in any pass the scaler skips the step.

        Args:
            scaler: The scaler that the losses are scaled with, if one is.  What an optimizer adds to the gradient is
                scaled like it, and an overflow is not warned of.

        Yields:
            One context per pass.

        Raises:
            OptimizerError: If the previous pass was not left, or the model was not called where a refresh was due.
        """
        self._loop.drop()
        if self._pass is not None:
            raise OptimizerError("passes() was called inside a gradient pass; leave the pass first")
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        yield from self._passes(hooked=False)

    def loop_passes(self) -> Iterator[GradientPass]:
        """:meth:`passes` of a loop whose forward passes are hooked and whose gradients are its own business."""
        self.scaler = None
        return self._passes(hooked=True)

    def _passes(self, hooked: bool) -> Iterator[GradientPass]:
        """See :meth:`passes`."""
        self._ready = self._stepped_by_scaler = False
        self.batches = []
        before = Snapshot(self)
        plan, first = self.plan() if self.active else _plain(), True
        while True:
            try:
                perturbation = next(plan)
            except StopIteration:
                break
            except BaseException:
                before.restore()
                raise
            gradient_pass = GradientPass(self, perturbation, before, first, hooked)
            del perturbation  # it holds the gradients of the pass before, whose memory this pass can use
            yield gradient_pass
            if not gradient_pass.done:
                raise OptimizerError("a gradient pass was not entered; use `with gradient_pass:` around each backward")
            first = False
        self.batches = []
        self._ready = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: all passes through the closure, or, after :meth:`passes`, the descent alone.

        Args:
            closure: Zeroes the gradients, runs forward and backward, returns the loss. Called once per pass.

        Returns:
            The loss of the first pass (before any ascent), or ``None`` without a closure.

        Raises:
            OptimizerError: If there is neither a closure nor finished passes, nor a pass begun by a training forward.
        """
        loss = None
        if closure is None and self._loop.begun:
            self._loop.finish()
        if closure is not None and self._stepped_by_scaler:
            self._stepped_by_scaler = False
            raise OptimizerError(
                "a closure was passed through GradScaler.step, which calls it after unscaling, so that its gradients "
                "would be descended along still multiplied by the loss scale; run `for gradient_pass in "
                "optimizer.passes(scaler=scaler): with gradient_pass: scaler.scale(loss).backward()`, and then "
                "scaler.step(optimizer)"
            )
        if closure is not None:
            for index, gradient_pass in enumerate(self.passes()):
                with gradient_pass, torch.enable_grad():
                    value = closure()
                loss = value if index == 0 else loss
        elif not self._ready:
            raise OptimizerError(
                f"{type(self).__name__}.step() has no gradient passes to finish: call step(closure), or run "
                "`for gradient_pass in optimizer.passes(): with gradient_pass: loss.backward()` before step()"
            )
        self.base.step()
        self._ready = False
        self.steps += 1
        self._due -= 1
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
        if self._pass is not None and not self._measuring:
            raise OptimizerError(
                "refresh was called inside a gradient pass, where the weights may be perturbed and are put back "
                "afterwards; call it before passes()"
            )
        batch = Batch.of(inputs, self.model)
        with torch.autocast(self.parameters()[0].device.type, enabled=False):
            return self._refresh(batch)

    def _refresh(self, batch: Batch) -> Balance | None:
        """The same, of a batch and in full precision."""
        assert self.model is not None
        if self.group is None:
            self.group = scale_symmetries(self.model, batch)
        group = self._subgroup(self.group)
        if len(group) == 0:
            self._due, self.balance = self.refresh_every, None
            return None
        before = Snapshot(self)
        normalised = bool(group.statistics) or group.inexact_normalizers > 0
        repeat = self.rebalance == "move" and self.balance is None and normalised
        if repeat:
            before.keep_weights()
        try:
            found = self._move_to_representative(batch, group)
            for _ in range(_FIRST_ROUNDS - 1 if repeat else 0):
                self.generator.set_state(before.stream)  # other signs would lead somewhere else each time
                weights = [p.detach().clone() for p in self.parameters()]
                found = self._move_to_representative(batch, group)
                if all(torch.equal(w, p) for w, p in zip(weights, self.parameters(), strict=True)):
                    break
        except BaseException:
            before.restore()
            raise
        torch.clear_autocast_cache()  # of the weights as they were
        self._due, self.balance = self.refresh_every, found
        return found

    def _move_to_representative(self, batch: Batch, group: ScaleGroup) -> Balance:
        """Trace, solve, and with ``"move"`` rescale."""
        assert self.model is not None
        traces = hessian_trace(self.model, batch, self.columns, statistics="training", generator=self.generator)
        found = balance(self.model, traces, group, self.gauge)
        if self.rebalance == "move":
            t = group.bound(self.model, found.t)
            found = found if torch.equal(t, found.t) else found.at(t)
            group.rescale_(self.model, t, self.base)
            found = found.moved()
        return found

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
        self._loop.drop()
        checkpoint.read(self, state_dict)
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what torch leaves out, too: hooks, and the ``step`` that a scheduler has wrapped."""
        self._loop.interrupt()
        if self._pass is not None:
            raise OptimizerError("an optimizer was copied inside a gradient pass; leave the pass first")
        kept = {k: v for k, v in vars(self).items() if k != "step" and not k.startswith("_optimizer_")}
        return {**kept, "_backup": [], "scaler": None, "_loop": self._loop.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy hooks the model that was copied with it."""
        super().__setstate__(state)
        hooked, self._loop = state["_loop"], Loop()
        if hooked:
            self.attach()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks for before it unscales and calls :meth:`step`: the only moment at which we see it."""
        self._stepped_by_scaler = True
        self._loop.interrupt()  # the scaler may skip the step that would do so
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
        if entry.get("maximize", False):
            raise UnsupportedError("maximize=True is not supported yet; negate the loss instead")
        known = None if self.model is None else {id(p) for p in self.model.parameters()}
        given = entry["params"]
        for i, item in enumerate([given] if isinstance(given, Tensor) else given):
            p = item[1] if isinstance(item, tuple) else item  # torch takes (name, parameter), too
            if isinstance(p, Tensor) and p.is_complex():
                raise UnsupportedError(
                    f"parameter {i} of the group, of shape {tuple(p.shape)}, is complex ({p.dtype}), which is not "
                    "supported yet; keep its real and imaginary parts (torch.view_as_real) as the parameter"
                )
            if known is not None and id(p) not in known:
                raise OptimizerError(
                    f"parameter {i} of the group, of shape {tuple(p.shape)}, is not one of "
                    f"{type(self.model).__name__}'s; pass the model's own parameters, or the model that owns them"
                )

    def _subgroup(self, group: ScaleGroup) -> ScaleGroup:
        """The part of the group that moves only parameters this optimizer may move: trainable and its own."""
        assert self.model is not None
        own = {id(p) for p in self.parameters()}
        fixed = frozenset(n for n, p in self.model.named_parameters() if id(p) not in own or not p.requires_grad)
        if fixed not in self._subgroups:
            self._subgroups[fixed] = group.fixing(fixed)
            if len(group) and not len(self._subgroups[fixed]):
                warnings.warn(
                    f"every scale symmetry of {type(self.model).__name__} moves a frozen parameter or one that this "
                    "optimizer does not have, so balancing changes nothing; unfreeze it, or pass all parameters",
                    NoEffectWarning,
                    stacklevel=2,
                )
        return self._subgroups[fixed]

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

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], may_refresh: bool = True) -> None:
        """What the first pass does before the model's forward: refresh if due, keep the batch.

        Args:
            args: The model's arguments.
            kwargs: Those that are named.
            may_refresh: Not if a forward of the same step came before.
        """
        if not torch.is_grad_enabled() or self._pass is None or self._measuring:
            return
        batch = Batch(args, kwargs)
        if self.keeps_batches:
            self.batches.append(batch)
        if self.refresh_due and may_refresh:
            with self.measuring():
                self._pass.before.keep_weights()
                self.refresh(batch)
            self._pass.perturb()


def _plain() -> Plan:
    """The plan of a step of the base optimizer."""
    yield None
