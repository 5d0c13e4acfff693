r"""Reductions: parameters that scale or shift, g_k = Σ_v δ_kv x̂_kv or Σ_v δ_kv, and what is broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import NoRuleError
from ..graph.layout import Layout
from ..graph.lift import Lift
from ..graph.use import Use
from .contraction import Accumulator, Contraction, Piece, RowNorms, Running, slices, wide


class Reduced(Contraction):
    """g = δ ⊙ x̂, or δ alone, summed over every axis that the parameter does not have.

    Args:
        use: The use.
        layout: Of the operation's output.
        axes: For each axis of the parameter, the axis of the operation's output it lies along.
        factor: x̂ in the operation's output shape, or what gives it for ``[n, T, …]`` slices of the samples; ``None``
            for a shift.
    """

    def __init__(
        self,
        use: Use,
        layout: Layout,
        axes: tuple[int, ...],
        factor: Tensor | Callable[[slice], Tensor] | None = None,
    ) -> None:
        super().__init__(use, layout)
        self.axes = axes
        self.factor = layout.front(factor) if isinstance(factor, Tensor) else factor

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        shape = self.use.output_shape
        if self.factor is None and len(shape) == 2 and shape[0] == self.samples and self.axes == (1,):
            return RowNorms()
        return _ReducedSquares(self)

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        g = self.part_gradients(self.layout.front(delta, lead=1), slice(0, self.samples))
        return g.reshape(*g.shape[:2], *self.use.shape)

    def part_gradients(self, columns: Tensor, part: slice) -> Tensor:
        """g of ``[c, N, T, …]`` for a slice of the samples: ``[c, n, parameter's axes…]``."""
        d = wide(columns[:, part])
        if self.factor is not None:
            d = d * (self.factor[part] if isinstance(self.factor, Tensor) else self.factor(part))
        keep = {self.layout.axis(axis) + 1 for axis in self.axes}  # behind c
        summed = [axis for axis in range(2, d.ndim) if axis not in keep]
        return d.sum(summed) if summed else d

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        return 2 * max(4, item) * math.prod(self.use.output_shape) // self.samples


class _ReducedSquares(Accumulator):
    """The trace by the gradients, a slice of the samples at a time."""

    def __init__(self, rule: Reduced) -> None:
        self.rule = rule
        self.squares = Running()

    def prefers(self, lift: Lift) -> bool:
        """A shift of channels is a sum over windows as well."""
        rule = self.rule
        return rule.factor is None and rule.axes == (1,) and rule.layout == Layout(lift.samples)

    def add(self, piece: Piece) -> None:
        """See the base class."""
        rule = self.rule
        pooled = piece.pooled if piece.pooled is not None and self.prefers(piece.pooled.lift) else None
        delta = piece.delta if pooled is None else pooled.bracket
        columns = rule.layout.front(delta, lead=1)
        size = 2 * delta[0].numel() // rule.samples * delta.shape[0] * max(4, delta.element_size())
        found = [
            torch.linalg.vector_norm(rule.part_gradients(columns, part).flatten(2), dim=-1).square().sum(0)
            for part in slices(rule.samples, size)
        ]
        self.squares.add(torch.cat(found) if len(found) > 1 else found[0])

    def result(self) -> Tensor:
        """See the base class."""
        return self.squares.total


class Broadcast(Contraction):
    """g = δ summed over the axes along which the parameter was broadcast, the batch among them.

    Args:
        use: The use.
        layout: Of the operation's output.

    Raises:
        NoRuleError: If the parameter has an axis along the samples.
    """

    def __init__(self, use: Use, layout: Layout) -> None:
        super().__init__(use, layout)
        self.summed = broadcast_axes(use, layout)

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        d = wide(self.layout.front(delta, lead=1))  # c n t *rest
        d = d.sum(self.summed) if self.summed else d
        return d.reshape(*d.shape[:2], *self.use.shape)


def broadcast_axes(use: Use, layout: Layout) -> list[int]:
    """The axes of ``[c, n, T, …]`` along which a parameter was broadcast to the operation's output.

    Args:
        use: The use.
        layout: Of the operation's output.

    Returns:
        The axes to sum over.

    Raises:
        NoRuleError: If the parameter has an axis along the samples.
    """
    output = use.output_shape
    shape = (1,) * (len(output) - len(use.shape)) + use.shape
    sample_axis = 1 if layout.order == "sequence-first" else 0
    if len(shape) <= sample_axis or shape[sample_axis] != 1:
        raise NoRuleError(
            f"parameter {use.parameter} {use.shape} meets a tensor {output} along the axis of the samples, or before "
            "there is one; no curvature rule covers it. Freeze the parameter (requires_grad_(False)) to leave it out"
        )
    summed = [] if layout.order == "sequence-first" else [2]
    return summed + [layout.axis(k) + 1 for k in range(len(output)) if k != sample_axis and shape[k] == 1]
