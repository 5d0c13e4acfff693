"""A gradient pass: the weights are perturbed inside a context and are themselves again outside it, whatever happens.

Saved values are *copied back*, in place: adding ε and subtracting it again drifts (relative 3e-3 in bfloat16 over 200
steps), and rebinding a parameter's storage breaks everything that holds its address.

Autocast keeps low-precision copies of the weights for as long as its outermost context lives, and does not see that
they were changed in place: inside one, a perturbation would have no effect at all.  So that cache is cleared whenever
the weights change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import OptimizerError, OverwrittenWarning
from .copies import Buffers, Copies, Slot, set_buffers, to_the_end
from .distributed import local, reshard
from .randomness import Streams

if TYPE_CHECKING:
    from .engine import SharpnessAware


_PORTION_BYTES = 2**26


@dataclass(frozen=True)
class Scaled:
    """ε_p = f_p d_p, unmultiplied: the products would be a temporary as large as the model.

    Attributes:
        directions: d, entry by entry, of this rank's part; ``None`` where a parameter is not perturbed.
        factors: f, one number per entry.
    """

    directions: list[Tensor | None]
    factors: list[float]


Perturbation = Scaled | list[Tensor | None] | None
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
        self.moves = len(optimizer.moved)
        self._buffers = Buffers(Copies() if alone else optimizer.buffers_before)
        self._weights = Copies()
        self.keep_buffers()

    def keep_weights(self) -> None:
        """Keep the weights and the tensors of the base optimizer's state as well."""
        optimizer = self.optimizer
        weights: list[Tensor] = [] if optimizer.model is None else list(optimizer.model.parameters())
        states = optimizer.base.state.values()
        kept = [tensor for tensor in optimizer.kept if tensor is not None and not tensor.is_sparse]
        grads = [p.grad for p in weights if p.grad is not None and not p.grad.is_sparse]
        state = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        self._weights.take(weights + state + kept + grads)

    def restore(self) -> None:
        """Put everything back, to the end even if interrupted."""
        to_the_end(self._restore)

    def _restore(self) -> None:
        """Put everything back."""
        optimizer = self.optimizer
        self._buffers.put_back()
        self._weights.put_back()
        torch.clear_autocast_cache()
        if self.streams is not None:
            self.streams.restore()
        optimizer.generator.set_state(self.stream)
        representative = optimizer.representative
        representative.due, representative.balance, representative.log_scale = self.schedule
        while len(optimizer.moved) > self.moves:
            group, t = optimizer.moved.pop()
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
        self._perturbed: list[tuple[Tensor, int]] = []  # what was, and its version afterwards
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
        optimizer.observer.perturbed(perturbation)
        pairs = zip(optimizer.parameters(), perturbation.directions, perturbation.factors, strict=True)
        taken = [(local(p), d, f) for p, d, f in pairs if d is not None]
        if taken:
            self._backup.take([p for p, _, _ in taken])
            self._perturbed = [(p, -1) for p, _, _ in taken]
            add_scaled(*(list(column) for column in zip(*taken, strict=True)))
            self._perturbed = [(p, p._version) for p, _, _ in taken]
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

    def _put_weights_back(self, model: nn.Module | None) -> list[int]:
        """Restore the weights, all but those that are returned: others have written to them."""
        if not self._perturbed:
            return []
        foreign = [] if self.turn.zeroes else self._written_by_others(model)
        self._backup.put_back(foreign)
        self._weights_changed(model)
        self._perturbed = []
        return foreign

    def _written_by_others(self, model: nn.Module | None) -> list[int]:
        """Which weights somebody has written to while a loop's pass was open: those are theirs, and are left alone."""
        written = [i for i, (p, version) in enumerate(self._perturbed) if version >= 0 and p._version != version]
        if not written:
            return []
        if model is not None and any(vars(m).get("max_norm") is not None for m in model.modules()):
            return []  # an embedding with a largest norm writes to its weight in every forward pass
        return written

    def _warn_of(self, foreign: list[int]) -> None:
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
        if self.refreshes and optimizer.refresh_due and optimizer.looks_for_its_model:
            optimizer.stop_looking()
        elif self.refreshes and optimizer.refresh_due:
            self.before.restore()
            raise OptimizerError(
                f"{type(optimizer.model).__name__} was not called inside the gradient pass, so a refresh that is due "
                "could not run; build the optimizer with the module that your loop calls, or call "
                "optimizer.refresh(inputs) before the step"
            )


def add_scaled(tensors: list[Tensor], directions: list[Tensor], factors: list[float]) -> None:
    """tensor += factor · direction, entry by entry.

    Args:
        tensors: Changed in place.
        directions: Of the same shapes; sparse ones, too.
        factors: Numbers.
    """
    with torch.no_grad():
        if len(set(factors)) == 1 and not any(d.is_sparse for d in directions):
            torch._foreach_add_(tensors, directions, alpha=factors[0])
            return
        if not tensors[0].is_cuda or any(d.is_sparse for d in directions):
            for tensor, direction, factor in zip(tensors, directions, factors, strict=True):
                tensor.add_(direction, alpha=factor)
            return
        # On a GPU one kernel for many tensors beats one for each; their products are a temporary, so in portions.
        for some in _portions(directions):
            torch._foreach_add_(tensors[some], torch._foreach_mul(directions[some], factors[some]))


def _portions(tensors: list[Tensor]) -> Iterator[slice]:
    """Slices of about equal size in bytes."""
    start = size = 0
    for end, tensor in enumerate(tensors, 1):
        size += tensor.numel() * tensor.element_size()
        if size >= _PORTION_BYTES or end == len(tensors):
            yield slice(start, end)
            start, size = end, 0
