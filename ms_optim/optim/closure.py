r"""Closure: a step by torch's convention, ``step(closure)``, and who makes the passes of it.

Usually the closure is called once per pass.  Where a loop makes passes by itself, inside the forward passes that it
sees, the closure is called once, and what it runs is a part of that loop:

* a module is attached (:mod:`~ms_optim.optim.loss_loop`): its forward makes all passes but the last;
* an optimizer of one pass has a step that earlier training forwards have begun (:mod:`~ms_optim.optim.loop`), as those
  of the batches that share it: the closure brings the last of them.

So do frameworks drive optimizers (Lightning's automatic optimization): of the batches that share a step all but the
last come without the optimizer, and the gradient is clipped at the end of the closure, once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OptimizerError
from .copies import to_the_end
from .gradient_pass import Snapshot
from .gradients import written_since
from .loop import Loop
from .randomness import Streams

if TYPE_CHECKING:
    from .engine import SharpnessAware


def loss_by_passes(optimizer: SharpnessAware, closure: Callable[..., Any], samples: int | None) -> Any:
    """Call a closure once per pass.

    Args:
        optimizer: Whose passes they are.
        closure: Runs forward and backward, returns the loss.
        samples: The size of the batch, where the closure takes a slice of it.

    Returns:
        The loss of the first pass, over all samples.
    """
    earlier = written_since(optimizer.outside, optimizer.gradients())  # other gradients, from before the call
    loss, optimizer.zeroed = None, False
    for gradient_pass in optimizer.passes(samples=samples):
        with gradient_pass, torch.enable_grad():
            value = closure() if samples is None else closure(gradient_pass.samples)
            gradient_pass.loss = value.detach() if isinstance(value, Tensor) else value
            if earlier and gradient_pass.first and not optimizer.zeroed:
                optimizer.warn_of_lost_gradients()
        if gradient_pass.first:
            weight = gradient_pass.turn.weight
            part = value if weight == 1.0 or value is None else gradient_pass.loss * weight
            loss = part if loss is None else loss + part
    return loss


def loss_by_loop(optimizer: SharpnessAware, loop: Loop, closure: Callable[..., Any]) -> Any:
    """Call a closure once, with a loop that makes the passes inside, and finish them.

    Args:
        optimizer: Whose passes they are.
        loop: What sees the forward passes.
        closure: Runs forward and backward, returns the loss.

    Returns:
        What the closure returned.

    Raises:
        OptimizerError: If it found no passes, or not all. After this and any other exception everything but the
            gradients is as before the call; where a step that earlier forwards had begun was open, as before those.
    """
    optimizer.begin_closure()
    held = loop.held
    if held is None:
        before = Snapshot(optimizer, alone=True)
        before.streams = Streams.now(optimizer.parameters())
    else:
        before = held.before
    optimizer.beginnings = [before]
    try:
        with torch.enable_grad():
            value = closure()
        if value is None and all(grad is None for grad in optimizer.gradients()):
            loop.drop()  # a batch that was passed over: no loss, no gradients
            optimizer.pass_over()
        else:
            _require_passes(optimizer, loop)
            loop.finish()
            optimizer.require_passes()
    except BaseException as error:
        to_the_end(functools.partial(_undo, optimizer, loop, error))
        raise
    finally:
        optimizer.beginnings = []
    return value


def _undo(optimizer: SharpnessAware, loop: Loop, error: BaseException) -> None:
    """Put everything back that a closure has changed, the last first."""
    loop.fail(error)
    for beginning in reversed(optimizer.beginnings):
        beginning.restore()


def _require_passes(optimizer: SharpnessAware, loop: Loop) -> None:
    """Refuse a closure without the forward pass of the attached module, or with one that no backward pass followed."""
    name = type(optimizer.loss_module).__name__
    if loop is optimizer.loss_loop and loop.open:
        raise OptimizerError(
            f"step(closure) found a forward pass of the attached {name} that no backward pass followed; call the "
            "module once per backward pass, and run loss.backward() of the loss that it returned inside the closure"
        )
    if not loop.begun:
        raise OptimizerError(
            f"step(closure) found no passes: {type(optimizer).__name__} is attached to a {name}, whose training "
            "forward makes them, and the closure did not call that module in training mode with gradients; call it "
            "there (not a module inside it, and not a copy), or build an optimizer without attach(), which calls its "
            "closures once per pass"
        )


def require_unscaled(closure: Callable[..., Any] | None) -> None:
    """Refuse a closure that a GradScaler calls.

    Args:
        closure: The closure, if there is one.

    Raises:
        OptimizerError: If it is called by a scaler.
    """
    if closure is not None and called_by_a_scaler():
        raise OptimizerError(
            "a closure was passed through GradScaler.step, which calls it after unscaling, so that its gradients "
            "would be descended along still multiplied by the loss scale; run `for gradient_pass in "
            "optimizer.passes(scaler=scaler): with gradient_pass: scaler.scale(loss).backward()`, and then "
            "scaler.step(optimizer)"
        )


def called_by_a_scaler() -> bool:
    """Whether a GradScaler is a few calls up: hooks, profilers and schedulers are in between."""
    frame: FrameType | None = sys._getframe()
    for _ in range(12):
        if frame is None:
            return False
        if is_a_scalers(frame):
            return True
        frame = frame.f_back
    return False


def is_a_scalers(frame: FrameType) -> bool:
    """Whether a call is one of torch's gradient scalers.

    Args:
        frame: The call.
    """
    return bool(frame.f_globals.get("__name__", "").endswith("grad_scaler"))
