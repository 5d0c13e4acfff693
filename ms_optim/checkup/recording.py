"""Recording: the events of a step, through hooks and through what every loop calls.

    forward     hooks on the model, last before its forward and first after it
    backward    ``torch.autograd.backward``, which ``loss.backward()`` calls
    scaler      the methods of ``torch.amp.GradScaler``
    descent     the hooks on all optimizers; inside, learning rates are 0, so that a step has nothing to do but restore
    refresh     the hook of our own optimizers, which says that W is elsewhere now

Nothing is changed that the step could see; under autocast see :mod:`~ms_optim.checkup.staleness`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from ..curvature.parallel import unwrapped
from ..errors import LostStateWarning, NoEffectWarning
from ..optim.distributed import is_sharded, local
from ..optim.loop import exporting
from ..optim.randomness import Streams
from .keeping import Kept
from .observation import Backward, Descent, Forward, Look, Observation, ScalerStep, Unscaling, same_streams
from .staleness import outputs_of, staleness

_OWN_WARNINGS = (NoEffectWarning, LostStateWarning)


class Recorder:
    """Records one step.

    Args:
        model: The module whose forward passes are seen.
        seen: Where they are recorded.
        kept: What is to be put back; scalers and optimizers that show themselves are added.
    """

    def __init__(self, model: nn.Module, seen: Observation, kept: Kept) -> None:
        self.model, self.seen, self.kept = model, seen, kept
        self._home = [local(p).detach().clone() for p in seen.parameters]  # W
        self._gradient: list[Tensor | None] = []  # the last at W
        self._forwards: list[Forward | None] = []  # those under way
        self._descents: list[tuple[Descent, int, list[tuple[dict[str, Any], Any]]]] = []
        self._compiled = unwrapped(model) is not model  # which casts weights anew in every pass
        self._wrapper: nn.Module | None = None
        self._scale = 1.0  # of the loss that was scaled last, until it was descended along
        self._scaled: dict[int, tuple[Tensor, float]] = {}

    def run(self, step: Callable[[], Any]) -> None:
        """Run a step, and record it.

        Args:
            step: The step.
        """
        seen, ours = self.seen, self.seen.ours
        with self._watching(), warnings.catch_warnings(record=True) as caught:
            for category in _OWN_WARNINGS:
                warnings.simplefilter("always", category)
            warnings.filterwarnings("always", "the gradient norm is not finite")
            if ours is not None:
                ours.observer.active = True
            try:
                step()
            except Exception as error:  # noqa: BLE001 - whatever a step raises is a finding
                seen.error = error
            seen.after = self._weights()
            seen.buffers_after = self._buffers()
            self._finish()
        for warning in caught:
            if isinstance(warning.message, _OWN_WARNINGS):
                seen.said.append(str(warning.message))
            elif "the gradient norm is not finite" not in str(warning.message):
                warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)

    def _finish(self) -> None:
        """Ask our own optimizer, and take it out of a step that was not ended."""
        seen, ours = self.seen, self.seen.ours
        if ours is None:
            return
        seen.group = ours.group
        if ours.group is not None and ours.model is not None:
            named = dict(ours.model.named_parameters())
            seen.movable = {id(named[name]) for name in ours.group.moving if name in named}
        found = ours.diagnostics
        if found is not None and seen.error is None:
            seen.losses, seen.cosine = (found.loss, found.perturbed_loss), found.cosine
        try:
            ours.drop()
        except Exception as error:  # noqa: BLE001 - it is put back in any case
            seen.error = seen.error or error

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """The hooks, for a while."""
        scaler = torch.amp.GradScaler
        with ExitStack() as stack:
            how = {"with_kwargs": True, "prepend": True, "always_call": True}
            handles = [self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)]
            handles += [self.model.register_forward_hook(self.after_forward, **how)]
            handles += [register_optimizer_step_pre_hook(self.before_descent)]
            handles += [register_optimizer_step_post_hook(self.after_descent)]
            if self.seen.ours is not None:
                handles.append(self.seen.ours.register_rescale_hook(lambda group, t: self.settle()))
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(replaced(torch.autograd, "backward", self._backward))
            stack.enter_context(replaced(scaler, "scale", self._scaling))
            stack.enter_context(replaced(scaler, "unscale_", self._unscaling))
            stack.enter_context(replaced(scaler, "step", self._scaler_step))
            stack.callback(self._end_descents)
            yield

    def settle(self) -> None:
        """W is where the weights are now."""
        with torch.no_grad():
            torch._foreach_copy_(self._home, [local(p) for p in self.seen.parameters])

    def _weights(self) -> Look:
        """Where the weights are, seen from W."""
        return Look.at([*self.seen.parameters], self._home)

    def _gradients(self) -> list[Tensor | None]:
        """``.grad`` of each parameter."""
        return [p.grad for p in self.seen.parameters]

    def _buffers(self) -> list[Tensor]:
        """Copies."""
        return [buffer.detach().clone() for buffer in self.model.buffers()]

    # Forward passes.

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins."""
        if not exporting():
            self._before_forward(args, kwargs)

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward pass ends."""
        if not exporting():
            self._after_forward(args, kwargs, output)

    @_disable_dynamo
    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: what it is to compute with."""
        if self.seen.ours is not None and self.seen.ours.busy:
            self._forwards.append(None)
            return
        if not torch.is_grad_enabled():
            self.seen.unseen += 1
            self._forwards.append(None)
            return
        active = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
        self._wrapper = active if active is not None else self._wrapper
        kind = self._device_type()
        self._forwards.append(
            Forward(
                training=self.model.training,
                inputs=[leaf.detach().clone() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)],
                stream=Streams.now(self.seen.parameters),
                buffers=self._buffers(),
                synchronised=None if active is None else bool(active.require_backward_grad_sync),
                autocast=torch.is_autocast_enabled(kind) and torch.is_autocast_cache_enabled(),
            )
        )

    @_disable_dynamo
    def _after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward pass ends: what it has computed.  The weights are looked at now: others' hooks move them before."""
        forward = self._forwards.pop() if self._forwards else None
        if forward is None or output is None:  # it is not counted, or it has failed
            return
        earlier = [one.look for one in self.seen.forwards]
        forward.look = self._weights()
        forward.buffers_after = self._buffers()
        forward.outputs = outputs_of(output)
        now = Streams.now(self.seen.parameters)
        forward.draws = not same_streams(now, forward.stream)
        self.seen.events.append(forward)
        moved = any(look != forward.look for look in earlier)
        if forward.autocast and moved and not (self._compiled or is_sharded(self.seen.parameters)):
            forward.stale = staleness(self.model, forward, self.seen.parameters, args, kwargs)

    def _device_type(self) -> str:
        """Of the parameters."""
        return self.seen.parameters[0].device.type

    # Backward passes and scales.

    def _backward(self, original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """``torch.autograd.backward``."""
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        scale = next((self._scaled[id(root)][1] for root in roots if id(root) in self._scaled), self._scale)
        scalar = all(isinstance(root, Tensor) and root.numel() == 1 for root in roots)
        event = Backward(
            loss=sum(float(root.detach()) for root in roots) / scale if scalar else math.nan,
            scale=scale,
            synchronised=None if self._wrapper is None else bool(self._wrapper.require_backward_grad_sync),
            before=Look.at(self._gradients()).norm,
        )
        result = original(tensors, *args, **kwargs)
        self._scale = 1.0
        found = self._gradients()
        event.look = Look.at(found)
        self.seen.events.append(event)
        passes = self.seen.passes
        if passes and not passes[-1].perturbed:
            self._gradient = [None if g is None else local(g).detach().to_dense().clone() for g in found]
        elif self._gradient:
            event.cosine = _cosine(self._gradient, found)
        return result

    def _scaling(self, original: Callable[..., Any], scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        """``scaler.scale``."""
        self.kept.add(scaler)
        found = original(scaler, outputs)
        if scaler.is_enabled():
            self._scale = scaler.get_scale()
            self._scaled |= {id(leaf): (leaf, self._scale) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)}
        return found

    def _unscaling(self, original: Callable[..., Any], scaler: torch.amp.GradScaler, optimizer: Optimizer) -> Any:
        """``scaler.unscale_``."""
        event = Unscaling(Look.at(self._gradients()).norm)
        result = original(scaler, optimizer)
        if scaler.is_enabled() and self._concerns(optimizer):
            self.seen.events.append(event)
        return result

    def _scaler_step(
        self, original: Callable[..., Any], scaler: torch.amp.GradScaler, optimizer: Optimizer, *args: Any, **named: Any
    ) -> Any:
        """``scaler.step``."""
        self.kept.add(scaler)
        if scaler.is_enabled() and self._concerns(optimizer):
            self.seen.events.append(ScalerStep(scaler.get_scale()))
        return original(scaler, optimizer, *args, **named)

    # Descents.

    def _concerns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer moves parameters that are looked at."""
        own = {id(p) for p in self.seen.parameters}
        return any(id(p) in own for entry in optimizer.param_groups for p in entry["params"])

    def before_descent(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer steps."""
        self.kept.add(optimizer)
        if not self._concerns(optimizer):
            return
        if self._descents:
            self._descents[-1][0].innermost = False
        own = {id(p) for entry in optimizer.param_groups for p in entry["params"]}
        rates = [(entry, entry["lr"]) for entry in optimizer.param_groups if "lr" in entry]
        named = zip(self.seen.names, self.seen.parameters, strict=True)
        event = Descent(
            optimizer=optimizer,
            weights=self._weights(),
            gradients=Look.at(self._gradients()),
            missing=[name for name, p in named if p.grad is None and p.requires_grad and id(p) in own],
            fused=getattr(optimizer, "grad_scale", None) is not None,
            has_rate=len(rates) == len(optimizer.param_groups),
        )
        self.seen.stepped |= optimizer is self.seen.optimizer
        for entry, rate in rates:
            entry["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        self.seen.events.append(event)
        self._descents.append((event, len(self.seen.events), rates))

    def after_descent(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """It has."""
        if any(event.optimizer is optimizer for event, _, _ in self._descents):
            while self._descents[-1][0].optimizer is not optimizer:  # an inner one has failed
                self._end_descent()
            self._end_descent()

    def _end_descent(self) -> None:
        """The learning rates are what they were."""
        event, start, rates = self._descents.pop()
        event.drives = any(isinstance(later, Forward) for later in self.seen.events[start:])
        if event.drives:
            event.gradients_after = Look.at(self._gradients())
        for entry, rate in rates:
            entry["lr"] = rate

    def _end_descents(self) -> None:
        """All of them."""
        while self._descents:
            self._end_descent()


@contextmanager
def replaced(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Call ``wrapper(original, …)`` in the place of a function, for a while.

    Args:
        owner: The module or class that has it.
        name: Its name there.
        wrapper: What is called.

    Yields:
        Nothing.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _cosine(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """Of two gradients."""
    inner = square_a = square_b = 0.0
    for x, y in zip(a, b, strict=True):
        u = None if x is None else x.double()
        v = None if y is None else local(y).detach().to_dense().double()
        square_a += 0.0 if u is None else float(u.square().sum())
        square_b += 0.0 if v is None else float(v.square().sum())
        inner += 0.0 if u is None or v is None else float((u * v).sum())
    product = square_a * square_b
    return inner / math.sqrt(product) if 0 < product < math.inf else math.nan
