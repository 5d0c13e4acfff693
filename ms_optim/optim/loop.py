r"""Loop: the gradient pass of an unmodified training loop, ``loss.backward(); optimizer.step()``.

An optimizer that needs one pass can take it around whatever forward and backward passes a loop makes between two steps:
it begins in a pre-hook of the first training forward, where the weights are perturbed, and ends in ``step()``, before
the descent.  In between nothing else may see perturbed weights, so it is interrupted by a forward pass in evaluation
mode or without gradients, and by ``state_dict()``; the gradient is there by then, and the step goes on from it.

The hook holds the optimizer by a weak reference and answers only for the optimizer's own model: copies of the model, as
for an average of the weights, carry a hook that does nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import OptimizerError

if TYPE_CHECKING:
    from .engine import SharpnessAware
    from .gradient_pass import GradientPass


class Loop:
    """The pass that is under way in an ordinary loop, if one is.

    Args:
        optimizer: Whose passes it takes; ``None`` for a hook that does nothing.
    """

    def __init__(self, optimizer: SharpnessAware | None = None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._passes: Iterator[GradientPass] | None = None
        self._open: GradientPass | None = None
        if optimizer is not None and optimizer.model is not None:
            optimizer.model.register_forward_pre_hook(self.before_forward, prepend=True, with_kwargs=True)
            optimizer.model.register_state_dict_pre_hook(self.before_state_dict)

    def __reduce__(self) -> tuple[type[Loop], tuple[()]]:
        """Of a copied or saved model, a hook that does nothing."""
        return Loop, ()

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass, or keep the batch of one that has begun, or get out of the way."""
        optimizer = self._of(module)
        if optimizer is None or optimizer.busy or torch.compiler.is_compiling():
            return
        if self._open is None and (optimizer.inside_a_pass or optimizer.ready):
            return  # explicit passes, or a closure; or those are done and only the descent is to come
        if not (module.training and torch.is_grad_enabled()):
            self.interrupt()
            return
        first = self._open is None
        if first:
            self._passes = optimizer.loop_passes()
            self._open = next(self._passes)
            self._open.__enter__()
        try:
            optimizer.before_forward(args, kwargs, first)
        except BaseException as error:
            open_, self._open, self._passes = self._open, None, None
            assert open_ is not None
            open_.__exit__(type(error), error, error.__traceback__)
            raise

    def before_state_dict(self, module: nn.Module, *_: Any) -> None:
        """Whoever saves the model saves the weights."""
        if self._of(module) is not None:
            self.interrupt()

    @property
    def attached(self) -> bool:
        """Whether there is an optimizer whose passes it takes."""
        return self._optimizer is not None

    @property
    def begun(self) -> bool:
        """Whether a step has something to finish."""
        return self._passes is not None

    def interrupt(self) -> None:
        """Restore the weights; what the plan does after the pass is left to :meth:`finish`."""
        open_, self._open = self._open, None
        if open_ is not None:
            open_.__exit__(None, None, None)

    def drop(self) -> None:
        """Restore the weights, and leave it at that."""
        self.interrupt()
        self._passes = None

    def finish(self) -> None:
        """End the pass and run the plan to its end.

        Raises:
            OptimizerError: If the plan asks for another pass.
        """
        self.interrupt()
        passes, self._passes = self._passes, None
        if passes is not None and next(passes, None) is not None:
            raise OptimizerError(
                "this step needs another gradient pass, which an unmodified loop does not make; call step(closure), or "
                "run `for gradient_pass in optimizer.passes(): with gradient_pass: loss.backward()`"
            )

    def _of(self, module: nn.Module) -> SharpnessAware | None:
        """The optimizer, if it is alive and the module is its model."""
        optimizer = None if self._optimizer is None else self._optimizer()
        return optimizer if optimizer is not None and optimizer.model is module else None
