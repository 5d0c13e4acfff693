"""A gradient pass: the weights are perturbed inside a context and are themselves again outside it, whatever happens.

Saved values are *copied back*, in place: adding ε and subtracting it again drifts (relative 3e-3 in bfloat16 over 200
steps), and rebinding a parameter's storage breaks everything that holds its address.

Autocast keeps low-precision copies of the weights for as long as its outermost context lives, and does not see that
they were changed in place: inside one, a perturbation would have no effect at all.  So that cache is cleared whenever
the weights change.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import OptimizerError
from .distributed import local, reshard
from .randomness import Streams

if TYPE_CHECKING:
    from .engine import SharpnessAware


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
    """

    def __init__(self, optimizer: SharpnessAware) -> None:
        self.optimizer = optimizer
        self.stream = optimizer.generator.get_state()
        self.streams = Streams.now(optimizer.parameters())
        representative = optimizer.representative
        self.schedule = (representative.due, representative.balance, representative.log_scale)
        self.moves = len(optimizer.moved)
        self.copies: list[tuple[Tensor, Tensor]] = []
        if optimizer.model is not None:
            self.keep_buffers(optimizer.model)

    def keep_weights(self) -> None:
        """Keep the weights and the tensors of the base optimizer's state as well."""
        optimizer = self.optimizer
        weights: list[Tensor] = [] if optimizer.model is None else list(optimizer.model.parameters())
        states = optimizer.base.state.values()
        kept = [tensor for tensor in optimizer.kept if tensor is not None]
        grads = [p.grad for p in weights if p.grad is not None]
        state = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        self._keep(weights + state + kept + grads)

    def restore(self) -> None:
        """Put everything back, to the end even if interrupted."""
        try:
            self._restore()
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        """Put everything back."""
        optimizer = self.optimizer
        with torch.no_grad():
            for tensor, copy in self.copies:
                tensor.copy_(copy)
        torch.clear_autocast_cache()
        self.streams.restore()
        optimizer.generator.set_state(self.stream)
        representative = optimizer.representative
        representative.due, representative.balance, representative.log_scale = self.schedule
        while len(optimizer.moved) > self.moves:
            group, t = optimizer.moved.pop()
            representative.announce(group, -t)

    def keep_buffers(self, model: nn.Module) -> None:
        """Keep the buffers of a model that was not known before."""
        self._keep(list(model.buffers()))

    def _keep(self, tensors: list[Tensor]) -> None:
        """Add copies of the tensors."""
        self.copies += [(tensor, tensor.detach().clone()) for tensor in tensors]


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
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def finish(self) -> None:
        """Leave the buffers as they are to be left."""
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
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
        self._weights: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._after: Streams | None = None  # where the first pass left the random streams
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
            if turn.refreshes:
                turn.before.streams = now
        else:
            self._after = now
            turn.streams.restore()
        if optimizer.keeps_local(self):
            self._open.enter_context(optimizer.ranks.unsynchronised())
        if optimizer.model is not None:
            self.keep_buffers(optimizer.model)
        # What a refresh will move, or a model that is still looked for, is waited for.
        self.waits = callable(self.perturbation) and self.first and (self.refreshes or optimizer.looks_for_its_model)
        if not self.waits:
            self.perturb()

    def keep_buffers(self, model: nn.Module) -> None:
        """Keep the buffers, if they are not to keep what this pass does to them."""
        if not self.first or self.optimizer.buffers == "last":
            self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def perturb(self) -> None:
        """Add the perturbation, once, keeping what was there."""
        perturbation = self.perturbation() if callable(self.perturbation) else self.perturbation
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
            weights = [p for p, _, _ in taken]
            self._saved = _saved_copies(weights, optimizer.backup)
            self._weights = weights  # last: from here on there is something to put back
            with torch.no_grad():
                if len({f for _, _, f in taken}) == 1 and not any(d.is_sparse for _, d, _ in taken):
                    torch._foreach_add_(weights, [d for _, d, _ in taken], alpha=taken[0][2])
                else:
                    for p, d, f in taken:
                        p.add_(d, alpha=f)
            self._weights_changed()

    def _put_back(self, failed: bool) -> None:
        """Restore the weights, and the buffers if they are not to keep this pass's changes; all, if it has failed."""
        with torch.no_grad():
            if self._weights:
                torch._foreach_copy_(self._weights, self._saved)
                self._weights_changed()
            if self.optimizer.buffers == "last" and not failed:
                self.turn.buffers = [(buffer, buffer.detach().clone()) for buffer, _ in self._buffers]
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
        if self._after is not None:
            self._after.restore()
        if failed:
            self.before.restore()

    def _weights_changed(self) -> None:
        """Drop what was made of the weights as they were."""
        torch.clear_autocast_cache()
        if self.optimizer.sharded and self.optimizer.model is not None:
            reshard(self.optimizer.model)

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


def _saved_copies(weights: list[Tensor], backup: list[Tensor]) -> list[Tensor]:
    """Copies of the weights, in tensors that live as long as the optimizer: allocating them anew costs more."""
    fits = len(backup) == len(weights) and all(
        b.shape == w.shape and b.dtype == w.dtype and b.device == w.device for b, w in zip(backup, weights, strict=True)
    )
    with torch.no_grad():
        if not fits:
            backup[:] = [torch.empty_like(w) for w in weights]
        torch._foreach_copy_(backup, weights)
    return backup

