"""Observation: what happened in a dry step, event by event, in the order in which it happened.

    Forward     a training forward of the model: at which weights, on which inputs, with which masks
    Backward    a backward pass: of which loss, times which scale, to which gradients
    Unscaling   ``scaler.unscale_``
    Descent     an optimizer's ``step``: at which weights, along which gradients

Distances are from W, where the weights were as the step began, or where a refresh of the step's has moved them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim import SharpnessAware
from ..optim.distributed import local
from ..optim.randomness import Streams
from ..symmetry import Group
from .diagnosis import PassSeen


@dataclass(frozen=True)
class Look:
    """A look at some tensors.

    Attributes:
        squares: ‖·‖² of each, or of its distance from W.
        sums: The sum of the entries of each: with the squares, as good as a fingerprint.
    """

    squares: tuple[float, ...]
    sums: tuple[float, ...]

    @classmethod
    def at(cls, tensors: list[Tensor | None], origins: list[Tensor] | None = None) -> Look:
        """Look at tensors.

        Args:
            tensors: The tensors; ``None`` counts as zero.
            origins: What distances are taken from; ``None``: zero.

        Returns:
            The numbers, in float64.
        """
        squares, sums = [], []
        with torch.no_grad():
            for index, tensor in enumerate(tensors):
                values = torch.zeros(()) if tensor is None else local(tensor).detach()
                values = (values.coalesce().values() if values.is_sparse else values).double()
                distances = values if origins is None else values - origins[index].double()
                squares.append(distances.square().sum().cpu())
                sums.append(values.sum().cpu())
        numbers = torch.stack([*squares, *sums]).tolist() if squares else []
        return cls(tuple(numbers[: len(squares)]), tuple(numbers[len(squares) :]))

    @property
    def norm(self) -> float:
        """‖·‖ of all."""
        return math.sqrt(sum(self.squares)) if self.finite else math.nan

    @property
    def finite(self) -> bool:
        """Whether all entries are."""
        return all(math.isfinite(square) for square in self.squares)

    def bad(self, names: list[str]) -> list[str]:
        """Those that are not finite."""
        return [name for name, square in zip(names, self.squares, strict=True) if not math.isfinite(square)]

    def moved(self, names: list[str]) -> list[str]:
        """Those that are not zero, or at a distance."""
        return [name for name, square in zip(names, self.squares, strict=True) if square != 0]

    def agrees_with(self, other: Look) -> bool:
        """Whether these are the same tensors, up to the rounding of other hardware."""
        pairs = zip(self.squares + self.sums, other.squares + other.sums, strict=True)
        return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) or a != a for a, b in pairs)


@dataclass
class Forward:
    """A forward pass of the model in which a graph was recorded."""

    training: bool
    inputs: list[Tensor]
    stream: Streams
    buffers: list[Tensor]
    synchronised: bool | None  # whether a wrapper is to average its gradients; None without one
    autocast: bool  # whether weights come from autocast's cache
    look: Look = field(default_factory=lambda: Look((), ()))
    buffers_after: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    draws: bool = False
    stale: float | None = None  # how far the outputs are from those with the weights that were there


@dataclass
class Backward:
    """A backward pass."""

    loss: float
    scale: float
    synchronised: bool | None
    before: float  # ‖.grad‖ as it began
    look: Look = field(default_factory=lambda: Look((), ()))  # at the gradients as it ended
    cosine: float = math.nan  # with those at W


@dataclass
class Unscaling:
    """``scaler.unscale_``."""

    norm: float  # of the gradients before


@dataclass
class ScalerStep:
    """``scaler.step``, after which a descent comes or does not."""

    scale: float


@dataclass
class Descent:
    """An optimizer's step."""

    optimizer: Optimizer
    weights: Look
    gradients: Look
    missing: list[str]  # parameters without a gradient
    fused: bool  # whether it divides by the scale itself
    has_rate: bool  # whether it could be taken at lr=0
    innermost: bool = True  # it called no other optimizer
    drives: bool = False  # it ran forward passes itself
    gradients_after: Look = field(default_factory=lambda: Look((), ()))


@dataclass
class Pass:
    """Forward passes in a row at the same weights, and the backward passes after them."""

    forwards: list[Forward]
    backwards: list[Backward] = field(default_factory=list)

    @property
    def norm(self) -> float:
        """‖ε‖; NaN if it is not finite."""
        return self.forwards[0].look.norm

    @property
    def perturbed(self) -> bool:
        """Whether the weights are not W."""
        return self.norm != 0

    @property
    def loss(self) -> float:
        """The sum of the losses: those the model returned, else those of the backward passes."""
        returned = [f.outputs[0] for f in self.forwards if len(f.outputs) == 1 and f.outputs[0].numel() == 1]
        if len(returned) == len(self.forwards):
            return float(sum(float(loss) for loss in returned))
        return sum(b.loss for b in self.backwards) if self.backwards else math.nan


@dataclass(frozen=True)
class RankView:
    """What one rank saw of what all have to agree on."""

    failed: bool
    start: Look
    perturbed: tuple[Look, ...]
    gradients: Look | None


@dataclass
class Observation:
    """Everything that was seen in a dry step."""

    model: nn.Module
    optimizer: Optimizer
    names: list[str]
    parameters: list[Tensor]
    foreign: list[str]  # trainable parameters of the model that the optimizer does not have
    buffer_names: list[str]
    start: Look
    events: list[Any] = field(default_factory=list)
    unseen: int = 0  # forward passes without a graph
    buffers_after: list[Tensor] = field(default_factory=list)
    after: Look | None = None
    stepped: bool = False  # whether the optimizer's own `step` ran
    group: Group | None = None
    movable: set[int] = field(default_factory=set)  # the identities of the parameters that it moves
    losses: tuple[float, float] = (math.nan, math.nan)
    cosine: float = math.nan
    said: list[str] = field(default_factory=list)
    error: Exception | None = None
    ranks: list[RankView] = field(default_factory=list)

    @property
    def ours(self) -> SharpnessAware | None:
        """The optimizer, if it is of this package."""
        return self.optimizer if isinstance(self.optimizer, SharpnessAware) else None

    @property
    def forwards(self) -> list[Forward]:
        """The forward passes."""
        return [event for event in self.events if isinstance(event, Forward)]

    @property
    def descents(self) -> list[Descent]:
        """The descents of optimizers that call no other."""
        return [event for event in self.events if isinstance(event, Descent) and event.innermost]

    @property
    def scale(self) -> float:
        """The largest loss scale in use; 1 if there is none."""
        return max((event.scale for event in self.events if isinstance(event, (Backward, ScalerStep))), default=1.0)

    @property
    def passes(self) -> list[Pass]:
        """The passes, in order."""
        found: list[Pass] = []
        for event in self.events:
            if isinstance(event, Forward):
                same = found and _same(found[-1].forwards[-1].look, event.look)
                found[-1].forwards.append(event) if same else found.append(Pass([event]))
            elif isinstance(event, Backward) and found:
                found[-1].backwards.append(event)
        return found

    @property
    def pairs(self) -> list[tuple[Forward, Forward]]:
        """Forward passes at W, each with its counterpart in the perturbed pass after it."""
        passes = self.passes
        return [
            (clean, perturbed)
            for a, b in zip(passes, passes[1:], strict=False)
            if not a.perturbed and b.perturbed and len(a.forwards) == len(b.forwards)
            for clean, perturbed in zip(a.forwards, b.forwards, strict=True)
        ]

    @property
    def cosine_seen(self) -> float:
        """Of the gradients at W and W + ε."""
        seen = [event.cosine for event in self.events if isinstance(event, Backward)]
        return next((cosine for cosine in reversed(seen) if not math.isnan(cosine)), self.cosine)

    def passes_seen(self) -> tuple[PassSeen, ...]:
        """For the report."""
        passes = self.passes
        losses = [one.loss for one in passes]
        first, last = self.losses
        if len(passes) == 2 and first == first and last == last:
            losses = [first, last]
        return tuple(PassSeen(len(one.forwards), one.norm, loss) for one, loss in zip(passes, losses, strict=True))


def _same(a: Look, b: Look) -> bool:
    """Whether these are the same weights (NaN is like NaN here)."""
    return all(x == y or (x != x and y != y) for x, y in zip(a.squares + a.sums, b.squares + b.sums, strict=True))


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit.

    Args:
        a: Tensors.
        b: Tensors.

    Returns:
        Whether they are.
    """
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def same_streams(a: Streams, b: Streams) -> bool:
    """Whether random streams stand where others do.

    Args:
        a: Streams.
        b: Streams of the same devices.

    Returns:
        Whether they do.
    """
    return torch.equal(a.cpu, b.cpu) and all(torch.equal(a.cuda[device], b.cuda[device]) for device in a.cuda)
