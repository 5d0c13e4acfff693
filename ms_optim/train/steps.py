"""Steps: one step of any optimizer over the micro-batches of a window.

Written once for all of them: each gradient pass takes all micro-batches, so that SAM's perturbation and its gradient
are those of the whole batch; an optimizer of torch or timm has one pass.  After the passes the gradient is unscaled and
clipped, and then descended along, as timm does it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..curvature.parallel import unwrapped
from ..errors import CommandLineError
from ..optim.gradient_pass import GradientPass
from .optimizer import ours
from .process import Process

Batch = tuple[Tensor, Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]


def autocast_of(options: argparse.Namespace, device: torch.device) -> Autocast:
    """Mixed precision as the options want it, to be entered anew for each forward.

    Args:
        options: ``amp``, ``amp_dtype``.
        device: Where the model is.

    Returns:
        Makes the context.
    """
    if not options.amp:
        return nullcontext
    return lambda: torch.autocast(device.type, getattr(torch, options.amp_dtype))


def scaler_of(options: argparse.Namespace, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler that float16 needs.

    Args:
        options: ``amp``, ``amp_dtype``.
        device: Where the model is.

    Returns:
        A scaler, or nothing where none is needed.
    """
    return torch.amp.GradScaler(device.type) if options.amp and options.amp_dtype == "float16" else None


class Steps:
    """Steps of an optimizer.

    Args:
        model: What is called: the model, compiled or in ``DistributedDataParallel`` or not.
        optimizer: Any; ours make their own passes.
        criterion: The loss of logits and targets.
        options: ``clip_grad``, ``clip_mode``, ``grad_accum_steps``, ``amp`` ….
        process: This process.

    Raises:
        CommandLineError: If the optimizer's m cannot be had with several micro-batches a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: nn.Module,
        options: argparse.Namespace,
        process: Process,
    ) -> None:
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.clip, self.clip_mode = options.clip_grad, options.clip_mode
        self.autocast, self.scaler = autocast_of(options, process.device), scaler_of(options, process.device)
        self.ours = ours(optimizer)
        self.second_order = bool(getattr(optimizer, "is_second_order", False))
        m = None if self.ours is None else self.ours.m
        if isinstance(m, int) and options.grad_accum_steps > 1:
            raise CommandLineError(
                f"m={m} takes a perturbation for so many samples of one batch, and --grad-accum-steps is "
                f"{options.grad_accum_steps}; use m='local' or 'global', or --grad-accum-steps 1"
            )
        self.m = m if isinstance(m, int) else None

    def take(self, window: Sequence[Batch]) -> Tensor:
        """One step.

        Args:
            window: Its micro-batches, on the device.

        Returns:
            The loss at the weights before the step, averaged over the window; not waited for.
        """
        first: Tensor | None = None
        for gradient_pass in self._passes(window):
            with gradient_pass:
                loss = self._backward(window, getattr(gradient_pass, "samples", slice(None)))
                if isinstance(gradient_pass, GradientPass):
                    gradient_pass.loss = loss  # by which some weigh their passes' gradients
                first = loss if first is None else first
        self._descend()
        assert first is not None  # there is at least one pass
        return first

    def _passes(self, window: Sequence[Batch]) -> Iterable[AbstractContextManager[Any]]:
        """The passes of one step; of an optimizer that knows of none, one."""
        if self.ours is None:
            return [nullcontext()]
        return self.ours.passes(self.scaler, None if self.m is None else len(window[0][0]))

    def _backward(self, window: Sequence[Batch], samples: slice) -> Tensor:
        """Forward and backward over the window."""
        total: Tensor | None = None
        for index, (x, y) in enumerate(window):
            # Gradients are averaged over ranks once, in the last backward pass.
            waits = isinstance(self.model, DistributedDataParallel) and index + 1 < len(window)
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self.autocast():
                    loss = self.criterion(_precise(self.model(x[samples])), y[samples]) / len(window)
                scaled = loss if self.scaler is None else self.scaler.scale(loss)
                scaled.backward(create_graph=self.second_order)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None  # a window is not empty
        return total

    def _descend(self) -> None:
        """Clip, step, and forget the gradients."""
        if self.clip is not None:
            from timm.utils import dispatch_clip_grad

            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self._clipped(), value=self.clip, mode=self.clip_mode)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def _clipped(self) -> list[Tensor]:
        """What is clipped: all parameters, and with AGC all but the classifier's (arXiv 2102.06171, section 4.1)."""
        plain: Any = unwrapped(self.model)
        head: set[int] = set()
        if self.clip_mode == "agc" and hasattr(plain, "get_classifier"):
            classifier = plain.get_classifier()
            head = {id(p) for p in classifier.parameters()} if isinstance(classifier, nn.Module) else set()
        return [p for p in plain.parameters() if id(p) not in head and p.grad is not None]


def _precise(logits: Tensor) -> Tensor:
    """Logits in float32 where they are in half precision: autocast does so for losses on a GPU, but not on a CPU."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
