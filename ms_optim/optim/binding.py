"""Binding: an optimizer that was given parameters alone finds the module that they belong to.

Libraries build optimizers from parameters, not from models.  Then the model is the outermost module that owns all the
parameters, and it shows itself when it is called for the first time in training: a hook on all modules looks for it
until the first step is done.  (Only such a hook sees modules that are not built yet.  Torch's ``OptimizedModule`` warns
wherever there is one; to silence that would silence it for the hooks of others, too.)

Where that module is of a kind that is known to return the loss, as a timm task does, the optimizer is attached to it,
and takes the model inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.module import register_module_forward_pre_hook

from ..curvature.parallel import unwrapped
from ..errors import OptimizerError
from .loop import exporting

if TYPE_CHECKING:
    from .engine import SharpnessAware

#: Kind of module whose training forward returns the loss -> what gives an optimizer the model inside it.
LOSS_MODULES: dict[type[nn.Module], Callable[[SharpnessAware, nn.Module], nn.Module]] = {}


class Binding:
    """The search for an optimizer's model.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: SharpnessAware) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._hook = register_module_forward_pre_hook(self._before_forward)
        weakref.finalize(optimizer, self._hook.remove)

    def close(self) -> None:
        """Stop looking."""
        self._hook.remove()

    @_disable_dynamo
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take the module, if it owns all parameters and is called in training."""
        optimizer = self._optimizer()
        if optimizer is None or exporting() or not (module.training and torch.is_grad_enabled()):
            return
        owned = {id(p) for p in module.parameters()}
        parameters = optimizer.parameters()
        if not parameters or not all(id(p) in owned for p in parameters):
            return
        self.close()
        inside = next((LOSS_MODULES[kind] for kind in type(unwrapped(module)).__mro__ if kind in LOSS_MODULES), None)
        optimizer.bind(module if inside is None else inside(optimizer, unwrapped(module)))
        if inside is not None:
            optimizer.attach(module)
        if not args and (inside is not None or optimizer.needs_inputs):
            raise OptimizerError(
                f"{type(optimizer).__name__} has just found its model, {type(module).__name__}, which was called with "
                "keyword arguments only, and those cannot be seen in the call in which it is found; run this step "
                "again (they are seen from now on), or pass the model when building the optimizer"
            )
        (optimizer.loop if inside is None else optimizer.loss_loop).before_forward(module, args, {})
