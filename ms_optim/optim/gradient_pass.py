"""A gradient pass: the weights are perturbed inside a context and are themselves again outside it, whatever happens.

Saved values are *copied back*, in place: adding ε and subtracting it again drifts (relative 3e-3 in bfloat16 over 200
steps), and rebinding a parameter's storage breaks everything that holds its address.

Autocast keeps low-precision copies of the weights for as long as its outermost context lives, and does not see that
they were changed in place: inside one, a perturbation would have no effect at all.  So that cache is cleared whenever
the weights change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import OptimizerError
from .randomness import Streams

if TYPE_CHECKING:
    from .engine import SharpnessAware


@dataclass(frozen=True)
class Scaled:
    """ε_p = f_p d_p, unmultiplied: the products would be a temporary as large as the model.

    Attributes:
        directions: d, entry by entry; ``None`` where a parameter is not perturbed.
        factors: f, one number per entry.
    """

    directions: list[Tensor | None]
    factors: list[float]


Perturbation = Scaled | list[Tensor | None] | None


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
        self.schedule = (optimizer._due, optimizer.balance)
        self.copies: list[tuple[Tensor, Tensor]] = []
        if optimizer.model is not None:
            self._keep(list(optimizer.model.buffers()))

    def keep_weights(self) -> None:
        """Keep the weights and the tensors of the base optimizer's state as well."""
        optimizer = self.optimizer
        weights: list[Tensor] = [] if optimizer.model is None else list(optimizer.model.parameters())
        states = optimizer.base.state.values()
        self._keep(weights + [value for state in states for value in state.values() if isinstance(value, Tensor)])

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for tensor, copy in self.copies:
                tensor.copy_(copy)
        torch.clear_autocast_cache()
        self.streams.restore()
        self.optimizer.generator.set_state(self.stream)
        self.optimizer._due, self.optimizer.balance = self.schedule

    def _keep(self, tensors: list[Tensor]) -> None:
        """Add copies of the tensors."""
        self.copies += [(tensor, tensor.detach().clone()) for tensor in tensors]


class GradientPass:
    """One gradient pass, as a context.

    Args:
        optimizer: Whose pass it is.
        perturbation: Added to the parameters, entry by entry; ``None`` for none. A function is called for it at the
            last moment: where a refresh is due, after that refresh.
        before: The state before the step, to go back to after an exception.
        first: Whether buffers keep what this pass does to them, and a refresh may run.
        hooked: Whether the model's forward passes are seen already, and gradients are not ours to zero.
    """

    def __init__(
        self,
        optimizer: SharpnessAware,
        perturbation: Perturbation | Callable[[], Perturbation],
        before: Snapshot,
        first: bool,
        hooked: bool = False,
    ) -> None:
        self.optimizer, self.perturbation, self.before, self.first = optimizer, perturbation, before, first
        self.hooked = hooked
        self.done = False
        self._weights: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._after: Streams | None = None  # where the first pass left the random streams
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> GradientPass:
        """Zero the gradients, keep the buffers, perturb.

        Returns:
            This pass.

        Raises:
            OptimizerError: If it was entered before, or another pass is open.
        """
        optimizer = self.optimizer
        if self.done or optimizer._pass is not None:
            raise OptimizerError("a gradient pass is entered once, and one at a time; take the next from passes()")
        optimizer._pass = self
        try:
            self._begin()
        except BaseException as error:  # out of memory, say: an open pass and a hook must not outlive it
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        """Zero the gradients, keep the buffers, perturb."""
        optimizer = self.optimizer
        for p in () if self.hooked else optimizer.parameters():
            p.grad = None
        if self.first:
            self.before.streams = Streams.now(optimizer.parameters())  # a loop may draw before it enters the pass
        else:
            self._after = Streams.now(optimizer.parameters())
            self.before.streams.restore()
        if optimizer.model is not None and self.first:
            # Registered for this pass only: a hook that stayed would travel along when the model is copied or saved.
            if not self.hooked:
                self._hook = optimizer.model.register_forward_pre_hook(
                    lambda module, args, kwargs: optimizer.before_forward(args, kwargs), prepend=True, with_kwargs=True
                )
        elif optimizer.model is not None:
            self._buffers = [(buffer, buffer.detach().clone()) for buffer in optimizer.model.buffers()]
        if not (callable(self.perturbation) and self.first and optimizer.refresh_due):
            self.perturb()

    def perturb(self) -> None:
        """Add the perturbation, once, keeping what was there."""
        perturbation = self.perturbation() if callable(self.perturbation) else self.perturbation
        self.perturbation = None
        if perturbation is None:
            return
        if not isinstance(perturbation, Scaled):
            perturbation = Scaled(perturbation, [1.0] * len(perturbation))
        parameters = self.optimizer.parameters()
        pairs = zip(parameters, perturbation.directions, perturbation.factors, strict=True)
        taken = [(p, d, f) for p, d, f in pairs if d is not None]
        if taken:
            self._weights = [p for p, _, _ in taken]
            self._saved = _saved_copies(self._weights, self.optimizer._backup)
            with torch.no_grad():
                if len({f for _, _, f in taken}) == 1:
                    torch._foreach_add_(self._weights, [d for _, d, _ in taken], alpha=taken[0][2])
                else:
                    for p, d, f in taken:
                        p.add_(d, alpha=f)
            torch.clear_autocast_cache()

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
        optimizer._pass = None
        self.done = True
        if self._hook is not None:
            self._hook.remove()
        with torch.no_grad():
            if self._weights:
                torch._foreach_copy_(self._weights, self._saved)
                torch.clear_autocast_cache()
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
        if self._after is not None:
            self._after.restore()
        if kind is not None:
            self.before.restore()
        elif self.first and optimizer.refresh_due:
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
