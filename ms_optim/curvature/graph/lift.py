r"""Lifting: δ below a ReLU and a max pooling, in the form that it has above them.

Where what is followed by ReLU and max pooling is taken by nothing else, δ at its output y₀ is

    δ = 1[y > 0] ⊙ unpool(δ_pool) = unpool(1[pool(y) > 0] ⊙ δ_pool) ,      y = relu(y₀) ,

since only the winner of a window is sent anything, and the winner's sign is the window's.  The right-hand side masks at
the size of the pooled output, a quarter of the other for windows of two by two.  What is more, the bracket and the
places of the winners are all that a contraction needs: Σ_v δ_v U_v is a sum over windows, and the bracket need not be
spread over the larger tensor at all unless something further down asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .use import Node, operation, shape_of


class Lift:
    """A ReLU and a max pooling above an operation.

    Args:
        pool: The node of the pooling.

    Attributes:
        pool: The same.
        winners: Where in the plane of y each window has its largest entry, ``[N, C, P]``.
        samples: N.
        windows: P.
        places: The size of that plane.
    """

    def __init__(self, pool: Node) -> None:
        self.pool = pool
        # Once: what is saved may be in other hands (of a checkpoint, say) that give it out a single time.
        self._y, self._result = pool._saved_self, pool._saved_result1
        self.winners = self._result.flatten(-2)
        self.samples, _, self.windows = self.winners.shape
        self.places = self._y.shape[-2] * self._y.shape[-1]

    @cached_property
    def _positive(self) -> Tensor:
        """1[pool(y) > 0]."""
        return (self._y.flatten(-2).gather(-1, self.winners) > 0).view_as(self._result)

    def pooled(self, delta: Tensor) -> Pooled:
        """The bracket for δ of one column at the output of the pooling."""
        return Pooled((delta * self._positive)[None], self)

    def down(self, bracket: Tensor) -> Tensor:
        """unpool(bracket): δ at the output of what ReLU was applied to.

        Args:
            bracket: Of one column, as :meth:`pooled` gives it.

        Returns:
            δ.
        """
        pool = self.pool
        sizes = pool._saved_kernel_size, pool._saved_stride, pool._saved_padding, pool._saved_dilation
        found: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            bracket, self._y, *sizes, pool._saved_ceil_mode, self._result
        )
        return found


class Pooled:
    """δ at the output of an operation, by its values at the winners of the windows above.

    Args:
        bracket: ``[c, N, C, *windows]``.
        lift: How it was made.
    """

    def __init__(self, bracket: Tensor, lift: Lift) -> None:
        self.bracket, self.lift = bracket, lift

    def delta(self) -> Tensor:
        """δ itself, ``[c, N, C, H, W]``."""
        return torch.stack([self.lift.down(column) for column in self.bracket])


def lifts(order: Sequence[Node], nodes: Iterable[Node]) -> dict[Node, Lift]:
    """The nodes whose δ is known from a max pooling further up.

    Args:
        order: All nodes of the graph.
        nodes: The nodes at which δ is wanted.

    Returns:
        Node → its lift, for those that only a ReLU takes, which only a max pooling over planes of samples takes.
    """
    if not any(operation(node) == "MaxPool2DWithIndices" for node in order):
        return {}
    takers: dict[Node, list[Node]] = {}
    for node in order:
        for source, _ in node.next_functions:
            if source is not None:
                takers.setdefault(source, []).append(node)
    found = {}
    for node in nodes:
        above = takers.get(node, [])
        if len(above) != 1 or operation(above[0]) != "Relu" or len(shape_of(node)) != 4:
            continue
        pools = takers.get(above[0], [])
        if len(pools) == 1 and operation(pools[0]) == "MaxPool2DWithIndices":
            found[node] = Lift(pools[0])
    return found
