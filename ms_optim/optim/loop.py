r"""Loop: what an optimizer sees of its model's forward passes, and the passes of an unmodified training loop.

Inside an explicit pass the model's first forward brings the batch for a refresh.  Outside of one there is only
``loss.backward(); optimizer.step()``, around which an optimizer that needs one pass can take it: it begins in a
pre-hook of the first training forward, where the weights are perturbed, and ends in ``step()``, before the descent.  In
between nothing else may see perturbed weights, so it is interrupted by a forward pass in evaluation mode or without
gradients, and by ``state_dict()``; the gradient is there by then, and the step goes on from it: to its end, or, in a
window of accumulation, to the next micro-batch at the same perturbed weights.

The hooks hold the optimizer, and so do the passes, by a weak reference: one that is dropped in the middle of a step is
gone at once, and its perturbation with it.  They answer only for the optimizer's own model: copies of the model, as for
an average of the weights, carry hooks that do nothing.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from ..errors import OptimizerError

if TYPE_CHECKING:
    from .engine import SharpnessAware
    from .gradient_pass import GradientPass


def exporting() -> bool:
    """Whether a graph is being recorded: it is to be the model's own, whatever is hooked to it."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)  # since torch 2.7
    return bool(getattr(torch.compiler, "_is_compiling_flag", False) if flag is None else flag)


class Loop:
    """The pass that is under way in an ordinary loop, if one is.

    Args:
        optimizer: Whose passes it takes; ``None`` for hooks that do nothing.
        module: The module whose forward passes it sees.
        takes: Whether it takes the passes of a loop, or only shows batches to explicit passes.
    """

    goes_on = True  # after an interruption a training forward pass belongs to the same step

    def __init__(
        self, optimizer: SharpnessAware | None = None, module: nn.Module | None = None, takes: bool = False
    ) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._module = None if module is None else weakref.ref(module)
        self.takes = takes
        self._passes: Iterator[GradientPass] | None = None
        self._open: GradientPass | None = None
        self._left: GradientPass | None = None  # interrupted, and the step not over
        self._running = False  # a forward pass that belongs to the step is under way, or was interrupted
        self.evaluated = False  # the last forward pass with gradients was one in evaluation mode
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        if optimizer is not None and module is not None:
            self._supersede(optimizer, module)
            self._handles = [
                module.register_forward_pre_hook(self.before_forward, prepend=True, with_kwargs=True),
                module.register_state_dict_pre_hook(self.before_state_dict),
                module.register_load_state_dict_pre_hook(self.before_state_dict),
            ]
        if module is not None and takes:
            hook = module.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True)
            self._handles.append(hook)
        if optimizer is not None:
            weakref.finalize(optimizer, self._abandon).atexit = False

    def _supersede(self, optimizer: SharpnessAware, module: nn.Module) -> None:
        """Take the place of another optimizer of the same parameters, as of one that was built before and dropped.

        Both would perturb, and the one that takes no more steps would never restore.
        """
        if not self.takes:
            return
        for other, theirs in takers(module):
            if theirs is not optimizer and share_parameters(optimizer, theirs):
                other.detach()

    def __reduce__(self) -> tuple[type[Loop], tuple[()]]:
        """Of a copied or saved model, hooks that do nothing."""
        return Loop, ()

    # (Not compiled with a compiled module, which calls it.)
    @_disable_dynamo
    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass, or keep the batch of one that has begun, or get out of the way."""
        optimizer = self.of(module)
        if optimizer is None or optimizer.busy or exporting():
            return
        if optimizer.inside_an_explicit_pass:
            optimizer.before_forward(args, kwargs)
            return
        if torch.is_grad_enabled():
            self.evaluated = not module.training
        if not (module.training and torch.is_grad_enabled()):
            optimizer.interrupt()
            return
        if not self.takes:
            optimizer.before_forward(args, kwargs)  # of a loop around the module that returns the loss
            return
        if self._open is None and optimizer.ready:
            return  # explicit passes are done, and only the descent is to come
        self._mend()
        left, self._left = self._left, None
        first = self._open is None and left is None
        try:
            if first:
                self._passes = optimizer.loop_passes()
                self._open = next(self._passes).__enter__()
            elif left is not None:
                self._open = left.reopen()
            optimizer.before_forward(args, kwargs, first)
        except BaseException as error:
            self.fail(error)
            raise
        self._running = True

    @_disable_dynamo
    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put everything back where the forward pass has failed: hooks that are always called then get no output."""
        if self._running and self.of(module) is not None and not exporting():
            self._running = False
            if output is None:
                self.fail(RuntimeError("the forward pass failed"))
        return None

    def _mend(self) -> None:
        """Put everything back after a KeyboardInterrupt in a forward pass, of which no hook is told."""
        if self._running and not self._on_the_stack():
            self.fail(KeyboardInterrupt())

    def _on_the_stack(self) -> bool:
        """Whether the module's forward pass is still under way."""
        module = None if self._module is None else self._module()
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
                return True
        return False

    def before_state_dict(self, module: nn.Module, *_: Any) -> None:
        """Whoever saves the model saves the weights, and whoever loads it overwrites them."""
        optimizer = self.of(module)
        if optimizer is not None:
            optimizer.interrupt()

    @property
    def attached(self) -> bool:
        """Whether it sees the forward passes of a module; not where another has taken its place."""
        module = None if self._module is None else self._module()
        return module is not None and any(handle.id in module._forward_pre_hooks for handle in self._handles)

    @property
    def held(self) -> GradientPass | None:
        """The pass that is open, or was interrupted and goes on."""
        return self._left if self._open is None else self._open

    @property
    def open(self) -> bool:
        """Whether the weights may be perturbed."""
        return self._open is not None

    def detach(self) -> None:
        """Leave the module."""
        self.drop()
        self._remove()

    def _remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self._handles:
            handle.remove()

    def _abandon(self) -> None:
        """The optimizer is gone: put back what it has perturbed; the hooks are of no use without it."""
        self._remove()
        open_, self._open, self._left, self._passes = self._open, None, None, None
        if open_ is not None:
            open_.abandon(None if self._module is None else self._module())

    @property
    def begun(self) -> bool:
        """Whether a step has something to finish."""
        return self._passes is not None

    def interrupt(self) -> None:
        """Restore the weights; what the plan does after the pass is left to :meth:`finish`."""
        self._mend()
        left = self._open
        self._restore()
        if left is not None and self.goes_on:
            self._left = left

    def leave(self) -> None:
        """The same at the end of a step, which may be skipped: a training forward pass then begins another."""
        self.interrupt()
        self._left = None

    def _restore(self) -> None:
        """Leave the pass that is open."""
        open_, self._open = self._open, None
        if open_ is not None:
            open_.__exit__(None, None, None)

    def fail(self, error: BaseException) -> None:
        """Put everything back after an exception."""
        open_, self._open, self._left, self._passes, self._running = self._open, None, None, None, False
        if open_ is not None:
            open_.__exit__(type(error), error, error.__traceback__)

    def drop(self) -> None:
        """Restore the weights, and leave it at that."""
        self.interrupt()
        self._left = self._passes = None

    def finish(self) -> None:
        """End the pass and run the plan to its end.

        Raises:
            OptimizerError: If the plan asks for another pass.
        """
        try:
            self.interrupt()
        except BaseException:
            self._left = self._passes = None
            raise
        self._left = None
        passes, self._passes = self._passes, None
        if passes is not None and next(passes, None) is not None:
            raise OptimizerError(
                "this step needs another gradient pass, which an unmodified loop does not make; call step(closure), "
                "run `for gradient_pass in optimizer.passes(): with gradient_pass: loss.backward()`, or "
                "optimizer.attach(module) to a module whose forward returns the loss"
            )

    def of(self, module: nn.Module) -> SharpnessAware | None:
        """The optimizer, if it is alive and the module is the one whose forward passes it is to see.

        Args:
            module: The module that was called.

        Returns:
            The optimizer or ``None``.
        """
        if self._optimizer is None or self._module is None or self._module() is not module:
            return None
        return self._optimizer()


def takers(module: nn.Module) -> list[tuple[Loop, SharpnessAware]]:
    """What takes passes in the forward passes of a module.

    Args:
        module: The module.

    Returns:
        Loops, each with its optimizer, which is alive.
    """
    found = []
    for hook in list(module._forward_pre_hooks.values()):
        loop = getattr(hook, "__self__", None)
        optimizer = loop.of(module) if isinstance(loop, Loop) and loop.takes else None
        if isinstance(loop, Loop) and optimizer is not None:
            found.append((loop, optimizer))
    return found


def share_parameters(a: SharpnessAware, b: SharpnessAware) -> bool:
    """Whether a parameter is both optimizers'."""
    own = {id(p) for p in a.parameters()}
    return any(id(p) in own for p in b.parameters())
