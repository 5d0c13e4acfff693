r"""LossLoop: SAM in an unmodified loop, around a module whose forward returns the loss.

    loss = module(x, y); loss.backward(); optimizer.step()

Where the forward pass of a module ends in the loss (a timm task, a Hugging Face model, a module of three lines), the
first of SAM's passes can be made inside it: a forward pre-hook runs the module, takes the gradient of its loss, and
perturbs the weights; the forward pass that was asked for then runs at W + ε, and the end of its backward pass restores
them.  The loss that is returned has the value of the first pass and the gradient of the second::

    L(W) + (L(W + ε) − stop_gradient(L(W + ε)))

Every forward pass has a perturbation of its own, so that with accumulation there is one per micro-batch, and with data
parallelism one per rank (``m="local"``) or one for all (``"global"``, whose first gradients are averaged here).  The
first gradient is taken by ``torch.autograd.grad``: ``.grad`` and the reducer of ``DistributedDataParallel`` never see
it.

Weights are restored at the end of the backward pass, and, where there was none, by whatever comes next: a forward pass,
``state_dict()``, ``step()``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..errors import OptimizerError
from .loop import Loop, exporting, share_parameters, takers

if TYPE_CHECKING:
    from .engine import SharpnessAware
    from .gradient_pass import GradientPass

# In half precision gradients underflow without a scale; any power of two will do for a direction.
_LARGEST_SCALE = 2.0**16


class LossLoop(Loop):
    """The passes of an ordinary loop around a module whose training forward returns the loss.

    Args:
        optimizer: Whose passes it takes; ``None`` for hooks that do nothing.
        module: The module: one that holds the optimizer's model, or that model.
    """

    def __init__(self, optimizer: SharpnessAware | None = None, module: nn.Module | None = None) -> None:
        self._inside = False  # a forward pass of our own is under way
        self._clean: Tensor | None = None  # the loss of the first pass
        self._scale = _LARGEST_SCALE
        self._precision: tuple[tuple[bool, torch.dtype], bool] | None = None  # autocast around, and float16 inside
        super().__init__(optimizer, module, takes=True)

    def __reduce__(self) -> tuple[type[Loop], tuple[()]]:
        """Of a copied or saved module, hooks that do nothing."""
        return LossLoop, ()

    @_disable_dynamo
    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make all passes but the last, and perturb for that one."""
        optimizer = self.of(module)
        if optimizer is None or optimizer.busy or self._inside or exporting() or optimizer.inside_an_explicit_pass:
            return
        optimizer.interrupt()
        if not (module.training and torch.is_grad_enabled()) or (optimizer.ready and self._passes is None):
            return
        try:
            self._begin(optimizer, module, args, kwargs)
            self._running = True
        except BaseException as error:
            self.fail(error)
            raise

    def _begin(
        self, optimizer: SharpnessAware, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The same, once it is clear that it is to be done."""
        accumulates = self._passes is not None
        if accumulates:
            self.finish()  # of the micro-batch before
        self._clean = None
        passes = self._passes = optimizer.loop_passes(refreshes=not accumulates)
        gradient_pass = next(passes)
        while not gradient_pass.descends:
            held = [p.grad for p in optimizer.parameters()]
            try:
                self._open = gradient_pass.__enter__()
                self._probe(optimizer, gradient_pass, module, args, kwargs)
                self._restore()
                gradient_pass = next(passes)  # reads the gradients
            finally:
                for p, grad in zip(optimizer.parameters(), held, strict=True):
                    p.grad = grad
        self._open = gradient_pass.__enter__()

    def _probe(
        self,
        optimizer: SharpnessAware,
        gradient_pass: GradientPass,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Leave in ``.grad`` what shows the way to the next pass."""
        for p in optimizer.parameters():
            p.grad = None
        self._inside = True
        try:
            loss = loss_of(module(*args, **kwargs), module)
        finally:
            self._inside = False
        wanted = [p for p in optimizer.parameters() if p.requires_grad]
        scale = self._scale if self._in_half_precision(loss, optimizer.device) else 1.0
        optimizer.probe_scale = scale
        scaled = loss.float() * scale if scale != 1.0 else loss
        if optimizer.sharded:  # whose gradients arrive by hooks that only this runs
            scaled.backward()
        else:
            found = torch.autograd.grad(scaled, wanted, allow_unused=True)
            for p, grad in zip(wanted, found, strict=True):
                p.grad = grad
            if optimizer.m == "global" and optimizer.ranks.group is not None:
                for p in wanted:  # which of them took part may differ from rank to rank
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                optimizer.ranks.average_([p.grad for p in wanted])
        optimizer.expects_overflow = scale > 1.0
        if scale > 1.0:
            sums = [p.grad.sum(dtype=torch.float64) for p in wanted if p.grad is not None]
            if sums and not bool(torch.stack(sums).isfinite().all()):
                self._scale = max(1.0, self._scale / 2)
        if self._clean is None:
            self._clean = loss.detach()
        gradient_pass.loss = loss.detach()

    def _in_half_precision(self, loss: Tensor, device: torch.device) -> bool:
        """Whether small gradients become zero, as they do in float16, wherever in the module it comes from."""
        around = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        if self._precision is None or self._precision[0] != around:
            self._precision = (around, _holds_float16(loss))
        return self._precision[1]

    @_disable_dynamo
    def after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the loss of the first pass with the gradient of the last; restore when its backward pass is over."""
        optimizer = self.of(module)
        if optimizer is None or optimizer.busy or self._inside or not self._running or exporting():
            return None
        self._running = False
        open_ = self._open
        if output is None or open_ is None:  # the forward pass failed: hooks that are always called get nothing
            self.fail(RuntimeError("the forward pass failed"))
            return None
        loss = loss_of(output, module)
        open_.loss = loss.detach()
        value = loss if self._clean is None else self._clean + (loss - loss.detach())
        self._clean = None
        if not value.requires_grad:
            self.fail(RuntimeError("the loss has no graph"))
            return None

        def restore() -> None:
            if self._open is open_:
                try:
                    self._restore()
                except BaseException as error:
                    self.fail(error)
                    raise

        def at_the_beginning(_: Tensor) -> None:
            if self._open is not open_:
                raise OptimizerError(
                    f"the backward pass of a {type(module).__name__} came when its weights were themselves again: "
                    "each forward pass of an attached module has a perturbation of its own, which its own backward "
                    "pass has to follow, before another forward pass, an evaluation or a save; call the module once "
                    "per backward pass (with all inputs together), or use passes()"
                )
            torch.autograd.Variable._execution_engine.queue_callback(restore)

        value.register_hook(at_the_beginning)
        try:
            return with_loss(output, value)
        except BaseException as error:  # an output that cannot be given another loss
            self.fail(error)
            raise

    def interrupt(self) -> None:
        """Put everything back: the weights are perturbed, so the backward pass that restores them has not ended.

        A forward pass that looks at its own model in evaluation mode, as at a teacher, is let be.
        """
        looks_itself = self._inside or (self._running and self._on_the_stack())
        if self._open is not None and not looks_itself:
            self.fail(RuntimeError("the backward pass was not run to its end"))

    def detach(self) -> None:
        """Leave the module, and let the optimizer be attached to none."""
        super().detach()
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            optimizer.loss_module = None

    def fail(self, error: BaseException) -> None:
        """Put everything back after an exception."""
        self._clean = None
        super().fail(error)


def require_no_other(optimizer: SharpnessAware, module: nn.Module) -> None:
    """Refuse a second optimizer beside another of other parameters: each would run the other's passes in its own.

    Args:
        optimizer: The optimizer that is to be attached.
        module: The module.

    Raises:
        OptimizerError: If there is one. (That of the same parameters, built before, is superseded.)
    """
    for loop, other in takers(module):
        if isinstance(loop, LossLoop) and other is not optimizer and not share_parameters(optimizer, other):
            raise OptimizerError(
                f"another {type(other).__name__}, of other parameters, is attached to this {type(module).__name__}, "
                "and the passes of both would run inside each other; build one optimizer with a parameter group for "
                "each, drop the other first (del optimizer), or use passes() of one after the other"
            )


def loss_of(output: Any, module: nn.Module) -> Tensor:
    """The loss in what a module returned: itself, ``output["loss"]``, ``output.loss``, or the first of a tuple.

    Args:
        output: What it returned.
        module: The module, for the message.

    Returns:
        One number, with a graph.

    Raises:
        OptimizerError: If there is none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "loss", None)
    if not isinstance(found, Tensor) or found.numel() != 1:
        kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise OptimizerError(
            f"{type(module).__name__} was attached as a module whose training forward returns the loss, and returned "
            f"a {type(output).__name__} with {kind} in its place; return the loss, (loss, ...) or {{'loss': loss, ...}}"
        )
    return found


def with_loss(output: Any, loss: Tensor) -> Any:
    """The same output with another loss.

    Args:
        output: What a module returned.
        loss: The other loss.

    Returns:
        An output of the same kind.
    """
    if isinstance(output, Tensor):
        return loss.reshape(output.shape)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(loss, *output[1:])
    if isinstance(output, (tuple, list)):
        return type(output)((loss, *output[1:]))
    other = copy.copy(output)
    if isinstance(output, Mapping):
        other["loss"] = loss
    else:
        other.loss = loss
    return other


def _holds_float16(loss: Tensor) -> bool:
    """Whether a number of the graph of a loss is in float16: a module may cast of its own accord."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(meta.dtype is torch.float16 for meta in node._input_metadata):
            return True
        waiting += [source for source, _ in node.next_functions]
    return False
