"""A gradient pass: the weights are perturbed inside a context and are themselves again outside it, whatever happens.

Saved values are *copied back*, in place: adding ε and subtracting it again drifts (relative 3e-3 in bfloat16 over 200
steps), and rebinding a parameter's storage breaks everything that holds its address.

Autocast keeps low-precision copies of the weights for as long as its outermost context lives, and does not see that
they were changed in place: inside one, a perturbation would have no effect at all.  So that cache is cleared whenever
the weights change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import OptimizerError, OverwrittenWarning
from ..symmetry import LogScales, multiply_
from .copies import Buffers, Copies, Slot, set_buffers, to_the_end
from .distributed import local, reshard
from .perturbation import DeviceNorm, Perturbation, Scaled, add_scaled
from .randomness import Streams

if TYPE_CHECKING:
    from .engine import SharpnessAware


Request = Perturbation | Callable[[], Perturbation]


@dataclass(frozen=True)
class Probe:
    """The request for a pass whose gradient only shows the way to the next: it is not descended along.

    Attributes:
        perturbation: Where the gradient is taken.
    """

    perturbation: Request = None


class Snapshot:
    """What a step may change before its end, as it was before the step.

    Buffers, the random streams, the generator and the refresh schedule are kept always; weights and the base
    optimizer's state only when a refresh is about to rescale them, since perturbations are undone by the pass itself.

    Args:
        optimizer: The optimizer whose step begins.
        alone: Whether it stands beside that of a step, and must not use its memory.
    """

    def __init__(self, optimizer: SharpnessAware, alone: bool = False) -> None:
        self.optimizer = optimizer
        self.stream = optimizer.generator.get_state()
        self.streams: Streams | None = None  # as the first pass begins: a loop may draw before
        representative = optimizer.representative
        self.schedule = (representative.due, representative.balance, representative.log_scale)
        self.moved, self.moves = optimizer.moved, len(optimizer.moved)
        self._buffers = Buffers(Copies() if alone else optimizer.buffers_before)
        # A closure that calls an attached module several times may have to be undone as a whole.
        self._weights = Copies() if alone or optimizer.beginnings else optimizer.backup
        self._others = Copies()
        self.rescalings: list[Mapping[str, LogScales]] = []  # of the weights since they were kept, by name
        self._names: list[str] = []
        self._versions: list[int] = []
        self.keeps_weights = False
        self.keep_buffers()

    def keep_weights(self) -> None:
        """Keep the weights and the tensors of the base optimizer's state as well."""
        optimizer = self.optimizer
        weights = optimizer.parameters()
        states = optimizer.base.state.values()
        kept = [tensor for tensor in optimizer.kept if tensor is not None and not tensor.is_sparse]
        grads = [p.grad for p in weights if p.grad is not None and not p.grad.is_sparse]
        state = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        self._weights.take(weights)
        self.note_versions()
        self._others.take(state + kept + grads)
        self._names = list(optimizer.names())
        self.rescalings, self.keeps_weights = [], True

    def note_versions(self, but: Collection[int] = ()) -> None:
        """The weights are what was kept, rescaled: know when somebody else writes to them.

        Args:
            but: The positions of those that are not: somebody has written to them.
        """
        self._versions = [-1 if i in but else w._version for i, w in enumerate(self._weights.tensors)]

    def serves(self, taken: Sequence[int]) -> bool:
        """Whether what was kept before a refresh can give weights back as they are now.

        Args:
            taken: Their positions among the optimizer's parameters.

        Returns:
            Whether it was kept, and nobody has written to them since they were rescaled.
        """
        weights = self._weights.tensors
        return self.keeps_weights and all(
            i < len(weights) and weights[i]._version == self._versions[i] for i in taken
        )

    def put_back_weights(self, taken: Sequence[int], foreign: Collection[int] = ()) -> None:
        """Make weights again what they were before they were perturbed, after the refresh of this step.

        They were kept before that refresh, and a second copy would be as large as the model: the refresh multiplies
        them by numbers, and the same product of the same numbers has the same bits.

        Args:
            taken: Their positions among the optimizer's parameters, for which this :meth:`serves`.
            foreign: The positions of those that are somebody else's now.
        """
        weights, wanted = self._weights.tensors, set(taken)
        self._weights.put_back([i for i in range(len(weights)) if i not in wanted])
        with torch.no_grad():
            for log_scale in self.rescalings:
                for i in taken:
                    if log_scale.get(self._names[i]):
                        multiply_(weights[i], log_scale[self._names[i]])
        self.note_versions(foreign)

    def restore(self) -> None:
        """Put everything back, to the end even if interrupted."""
        to_the_end(self._restore)

    def _restore(self) -> None:
        """Put everything back."""
        optimizer = self.optimizer
        self._buffers.put_back()
        if self.keeps_weights:
            self._weights.put_back()
            self._others.put_back()
        torch.clear_autocast_cache()
        if self.streams is not None:
            self.streams.restore()
        optimizer.generator.set_state(self.stream)
        representative = optimizer.representative
        representative.due, representative.balance, representative.log_scale = self.schedule
        while len(self.moved) > self.moves:
            group, t = self.moved.pop()
            representative.announce(group, -t)

    def keep_buffers(self) -> None:
        """Keep the buffers of the model, and of the module around it that returns the loss."""
        self._buffers.take([self.optimizer.model, self.optimizer.loss_module])


class Turn:
    """One time through an optimizer's plan: of its passes, what they share.

    Args:
        before: The state before the step, to go back to after an exception.
        samples: Which samples of the batch its passes are about.
        weight: Their share of all.
        refreshes: Whether its first pass may begin with a refresh.
        zeroes: Whether gradients are the optimizer's to zero.

    Attributes:
        streams: Where the random streams stood as its first pass began.
        buffers: What the last pass made of the buffers, where that is to be kept in the end.
    """

    def __init__(
        self,
        before: Snapshot,
        samples: slice,
        weight: float,
        refreshes: bool,
        zeroes: bool,
    ) -> None:
        self.before, self.samples, self.weight = before, samples, weight
        self.refreshes, self.zeroes = refreshes, zeroes
        self.streams: Streams | None = None
        self.buffers: list[Slot] = []

    def finish(self) -> None:
        """Leave the buffers as they are to be left."""
        set_buffers(self.buffers)
        self.buffers = []


class GradientPass:
    """One gradient pass, as a context.

    Args:
        optimizer: Whose pass it is.
        request: What is added to the parameters, entry by entry; ``None`` for nothing. A function is called for it at
            the last moment: where a refresh is due, after that refresh.
        turn: The time through the plan that it belongs to.
        first: Whether it is the first of the turn.

    Attributes:
        descends: Whether its gradient is descended along; else it only shows the way to the next pass.
        loss: The loss found in it, for the diagnostics of a step; set it inside, if you want them.
        samples: Which samples of the batch to take: all, but with ``m`` a number.
    """

    def __init__(self, optimizer: SharpnessAware, request: Request | Probe, turn: Turn, first: bool) -> None:
        self.optimizer, self.turn, self.first = optimizer, turn, first
        self.descends = not isinstance(request, Probe)
        self.perturbation: Request = request.perturbation if isinstance(request, Probe) else request
        self.samples = turn.samples
        self.loss: Any = None
        self.done = False
        self.refreshes = first and turn.refreshes and optimizer.refresh_due
        self.waits = False
        # What was, its position among the optimizer's parameters, and its version afterwards.
        self._perturbed: list[tuple[Tensor, int, int]] = []
        self._shares = False  # whether the copy that an exception would need is that of this pass, too
        self._foreign: set[int] | None = None  # those of them that somebody else wrote to in the meantime
        self._norm: DeviceNorm | None = None
        # Known when the optimizer is gone:
        self._backup, self._kind, self._sharded = optimizer.backup, optimizer.__class__.__name__, optimizer.sharded
        self._buffers = Buffers(optimizer.buffers_between)
        self._after: Streams | None = None  # where the first pass left the random streams
        self._again: tuple[Callable[[], Perturbation], Tensor] | None = None  # what gave ε, and the generator before
        self._open = ExitStack()

    @property
    def before(self) -> Snapshot:
        """The state before the step."""
        return self.turn.before

    def __enter__(self) -> GradientPass:
        """Zero the gradients, keep the buffers, perturb.

        Returns:
            This pass.

        Raises:
            OptimizerError: If it was entered before, or another pass is open.
        """
        optimizer = self.optimizer
        if self.done or optimizer.inside_a_pass:
            raise OptimizerError("a gradient pass is entered once, and one at a time; take the next from passes()")
        optimizer.opened(self)
        try:
            self._begin()
        except BaseException as error:  # out of memory, say: an open pass and a hook must not outlive it
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        """Zero the gradients, keep the buffers, perturb."""
        optimizer, turn = self.optimizer, self.turn
        if turn.zeroes:
            for p in optimizer.parameters():
                p.grad = None
        now = Streams.now(optimizer.parameters())
        if turn.streams is None:
            turn.streams = now  # a loop may draw before it enters the pass
            turn.before.streams = turn.before.streams or now
        else:
            self._after = now
            turn.streams.restore()
        self._keep()
        # What a refresh will move, or a model that is still looked for, is waited for.
        self.waits = callable(self.perturbation) and self.first and (self.refreshes or optimizer.looks_for_its_model)
        if not self.waits:
            self.perturb()

    def reopen(self) -> GradientPass:
        """Enter a loop's only pass once more, at the same perturbed weights: it was interrupted, and the step goes on.

        ε is found again from what it was found from, as noise is from the generator: kept, it is as large as the model.

        Returns:
            This pass.
        """
        optimizer = self.optimizer
        self.done = False
        optimizer.opened(self)
        try:
            self._keep()
            self.turn.finish()  # buffers to where the pass has left them
            if self._again is not None:
                self.perturbation, stream = self._again
                now = optimizer.generator.get_state()
                optimizer.generator.set_state(stream)
                self.perturb()
                optimizer.generator.set_state(now)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _keep(self) -> None:
        """Keep the buffers, and gradients on this rank if they are not to be averaged."""
        if self.optimizer.keeps_local(self):
            self._open.enter_context(self.optimizer.ranks.unsynchronised())
        self.keep_buffers()

    def keep_buffers(self) -> None:
        """Keep the buffers, if they are not to keep what this pass does to them."""
        if not self.first or self.optimizer.buffers == "last":
            self._buffers.take([self.optimizer.model, self.optimizer.loss_module])

    def perturb(self) -> None:
        """Add the perturbation, once, keeping what was there."""
        perturbation = self.perturbation
        if callable(perturbation):
            if not self.turn.zeroes:
                self._again = (perturbation, self.optimizer.generator.get_state())
            perturbation = perturbation()
        self.perturbation = None
        if perturbation is None:
            return
        if not isinstance(perturbation, Scaled):
            perturbation = Scaled(perturbation, [1.0] * len(perturbation))
        optimizer = self.optimizer
        self._norm = perturbation.norm
        optimizer.observer.perturbed(perturbation)
        pairs = zip(optimizer.parameters(), perturbation.directions, perturbation.factors, strict=True)
        taken = [(i, local(p), d, f) for i, (p, d, f) in enumerate(pairs) if d is not None]
        if taken:
            positions, weights, directions, factors = (list(column) for column in zip(*taken, strict=True))
            # (What was kept for an exception has the present weights, but for the rescaling.)
            self._shares = self.before.serves(positions)
            if not self._shares:
                if self.before.keeps_weights:
                    self._backup = Copies()
                self._backup.take(weights)
            self._foreign = None
            self._perturbed = [(p, i, -1) for i, p in zip(positions, weights, strict=True)]
            add_scaled(weights, directions, factors, perturbation.scale)
            self._perturbed = [(p, i, p._version) for p, i, _ in self._perturbed]
            self._weights_changed(optimizer.model)

    def _put_back(self, failed: bool) -> None:
        """Restore the weights, and the buffers if they are not to keep this pass's changes; all, if it has failed."""
        optimizer = self.optimizer
        foreign = self._put_weights_back(optimizer.model)
        if optimizer.buffers == "last" and not failed:
            self.turn.buffers = self._buffers.present()
        self._buffers.put_back()
        if self._after is not None:
            self._after.restore()
        if failed:
            self.before.restore()
        self._warn_of(foreign)

    def abandon(self, module: nn.Module | None) -> None:
        """Restore the weights and the buffers of a loop's pass whose optimizer is gone.

        Args:
            module: The module that has the weights, if it is still there.
        """
        if self.done:
            return
        self.done = True
        self._open.close()
        foreign = self._put_weights_back(module)
        self._buffers.put_back()
        self._warn_of(foreign)

    def _put_weights_back(self, model: nn.Module | None) -> set[int]:
        """Restore the weights, all but those that are returned: others have written to them."""
        if not self._perturbed:
            return set()
        if self._foreign is None:  # once: where putting back was interrupted, it was we who wrote
            self._foreign = set() if self.turn.zeroes else self._written_by_others(model)
        if self._shares:
            places = [(position, i in self._foreign) for i, (_, position, _) in enumerate(self._perturbed)]
            foreign = [position for position, theirs in places if theirs]
            self.before.put_back_weights([position for position, theirs in places if not theirs], foreign)
        else:
            self._backup.put_back(self._foreign)
        self._weights_changed(model)
        self._perturbed = []
        return self._foreign

    def _written_by_others(self, model: nn.Module | None) -> set[int]:
        """Which weights somebody has written to while a loop's pass was open: those are theirs, and are left alone."""
        written = {i for i, (p, _, version) in enumerate(self._perturbed) if version >= 0 and p._version != version}
        if not written:
            return set()
        if model is not None and any(vars(m).get("max_norm") is not None for m in model.modules()):
            return set()  # an embedding with a largest norm writes to its weight in every forward pass
        return written

    def _warn_of(self, foreign: set[int]) -> None:
        """Say that weights were left alone, once all others are restored: the warning may be an error."""
        if foreign:
            warnings.warn(
                f"{len(foreign)} weights were written to between a training forward pass and the step of {self._kind}, "
                "which had perturbed them, so they were left as they are; is another optimizer training them? then "
                "drop this one first (del optimizer), or step it",
                OverwrittenWarning,
                stacklevel=3,
            )

    def _weights_changed(self, model: nn.Module | None) -> None:
        """Drop what was made of the weights as they were."""
        torch.clear_autocast_cache()
        if self._sharded and model is not None:
            reshard(model)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the weights, and the buffers if they are not to keep this pass's changes.

        Args:
            kind: The exception's type, if one is leaving.
            error: The exception.
            trace: Its traceback.

        Raises:
            OptimizerError: If a refresh was due and the model was never called.
        """
        optimizer = self.optimizer
        optimizer.closed(self)
        self.done = True
        self._open.close()
        try:
            self._put_back(kind is not None)
        except BaseException:  # interrupted: once more, to the end
            self._put_back(failed=True)
            raise
        if kind is not None:
            return
        if self._norm is not None:
            try:
                self._norm.check()
            except BaseException:  # a warning that is an error
                self.before.restore()
                raise
        if self.refreshes and optimizer.refresh_due and optimizer.looks_for_its_model:
            optimizer.stop_looking()
        elif self.refreshes and optimizer.refresh_due:
            self.before.restore()
            raise OptimizerError(
                f"{type(optimizer.model).__name__} was not called inside the gradient pass, so a refresh that is due "
                "could not run; build the optimizer with the module that your loop calls, or call "
                "optimizer.refresh(inputs) before the step"
            )
