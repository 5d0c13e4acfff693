"""Epoch: once through the training data, step by step; what it says while it runs, and what it found.

The device is waited for where something is printed, and at the end: not in every step.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import DivergedError
from .pipeline import mixes_in
from .process import Process
from .progress import Bar, logger
from .steps import Batch, Steps


@dataclass
class Loop:
    """What an epoch needs; the parts are made by :mod:`ms_optim.train.training`.

    Attributes:
        steps: The optimizer's steps.
        model: The plain module.
        batches: The training data.
        options: The options.
        process: This process.
        scheduler: timm's, or none.
        average: timm's moving average of the weights, or none.
        mixup: timm's, for batches on the device, or none.
    """

    steps: Steps
    model: nn.Module
    batches: Any
    options: argparse.Namespace
    process: Process
    scheduler: Any = None
    average: Any = None
    mixup: Any = None
    waited: float = 0.0  # seconds of this epoch spent waiting for data

    @property
    def optimizer(self) -> Optimizer:
        """Of the steps."""
        return self.steps.optimizer

    @property
    def updates(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.batches) // int(self.options.grad_accum_steps))

    def learning_rate(self) -> float:
        """Averaged over the parameter groups, as timm prints it."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return float(sum(rates) / len(rates))

    def run(self, epoch: int, epochs: int) -> dict[str, float]:
        """Train for one epoch.

        Args:
            epoch: Counted from 0.
            epochs: How many there will be.

        Returns:
            ``loss``, averaged over all samples of all ranks, ``images_per_second`` and ``seconds``.

        Raises:
            DivergedError: If the loss is not finite.
        """
        process = self.process
        self.steps.model.train()
        self.optimizer.zero_grad()
        self._mix(epoch)
        # Of what counts: the summed loss and the number of samples.
        total = torch.zeros(2, dtype=torch.float64 if process.device.type != "mps" else None, device=process.device)
        samples = 0
        begin = time.perf_counter()
        self.waited = 0.0
        with Bar(self.updates, f"epoch {epoch}", process.primary) as bar:
            for update, window in enumerate(self._windows(), 1):
                loss = self.steps.take(window)
                count = sum(len(images) for images, _ in window)
                total += self._counted(loss.to(total.dtype), count)
                samples += count
                self._after_step(epoch * self.updates + update)
                self._say(epoch, epochs, update, loss, samples, begin, bar)
        if hasattr(self.optimizer, "sync_lookahead"):
            self.optimizer.sync_lookahead()
        summed, counted, images = process.summed(*total, samples)
        seconds = time.perf_counter() - begin
        # A scaler skips a step now and then; where it skips most of them, it skips all that are to come.
        mean = summed / counted if 2 * counted >= images else math.nan
        _require_finite(mean, epoch, self.learning_rate())
        return {"loss": mean, "images_per_second": images / seconds, "seconds": seconds}

    def _windows(self) -> Iterator[list[Batch]]:
        """The micro-batches of one step after another; the last step may have fewer (so may a stream than it said)."""
        window: list[Batch] = []
        begin = time.perf_counter()
        for x, y in self.batches:
            self.waited += time.perf_counter() - begin
            window.append(self._prepared(x, y))
            if len(window) == self.options.grad_accum_steps:
                yield window
                window = []
            begin = time.perf_counter()
        if window:
            yield window

    def _prepared(self, x: Any, y: Any) -> Batch:
        """A batch on the device, mixed if the loader has not done so (soft targets also where mixing is off)."""
        if self.mixup is not None and not self.batches.mixes:
            x, y = self.mixup(x, y)
        if self.options.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y

    def _counted(self, loss: torch.Tensor, samples: int) -> torch.Tensor:
        """Summed loss and number of a step's samples; where a scaler skips steps that overflow, theirs do not count."""
        both = torch.stack([loss * samples, torch.full_like(loss, samples)])
        return both if self.steps.scaler is None else torch.where(loss.isfinite(), both, 0.0)

    def _mix(self, epoch: int) -> None:
        """Turn mixing on or off."""
        if self.mixup is not None:  # a loader that mixes does so by itself
            self.mixup.mixup_enabled = mixes_in(self.options, epoch)

    def _after_step(self, updates: int) -> None:
        """What follows a step: averages and the learning rate."""
        if self.average is not None:
            self.average.update(self.model, step=updates)
        if self.options.synchronize_step and self.process.device.type == "cuda":
            torch.cuda.synchronize()
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=updates)

    def _say(
        self,
        epoch: int,
        epochs: int,
        update: int,
        loss: torch.Tensor,
        samples: int,
        begin: float,
        bar: Bar,
    ) -> None:
        """A line, or the bar's text, every now and then."""
        if not bar.shown and (update % self.options.log_interval and update != self.updates):
            return
        if bar.shown and update % max(1, self.updates // 100):
            bar.advance()
            return
        now = float(loss)
        if self.steps.scaler is None:
            _require_finite(now, epoch, self.learning_rate())
        speed = samples * self.process.world / (time.perf_counter() - begin)
        share = f"loss {now:#.4g}, {speed:,.0f} images/s, lr {self.learning_rate():.3e}"
        bar.advance(share)
        if not bar.shown and self.process.primary:
            of = f"{update:>4d}/{self.updates} ({100 * update / self.updates:>3.0f}%)"
            logger.info("train: epoch %d/%d [%s] %s, waited %.1f s for data", epoch, epochs, of, share, self.waited)


def _require_finite(loss: float, epoch: int, rate: float) -> None:
    """Refuse to go on with weights that are not numbers."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the training loss is {loss} in epoch {epoch}, at learning rate {rate:.3e}: training has diverged; lower "
            "--lr, warm it up for longer, or clip the gradient (--clip-grad); the last checkpoint is that of the last "
            "validated epoch before"
        )
