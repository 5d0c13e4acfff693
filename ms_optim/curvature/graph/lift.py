r"""Lifting: the last steps of a backpropagation taken past a ReLU and a max pooling at once.

Where a convolution is followed by ReLU and max pooling and nothing is wanted below it, its δ is

    δ = 1[y > 0] ⊙ unpool(δ_pool) = unpool(1[pool(y) > 0] ⊙ δ_pool) ,      y = relu(convolution) ,

since only the winner of a window is sent anything, and the winner's sign is the window's.  The right-hand side masks at
the size of the pooled output, a quarter of the other for windows of two by two, and spares one pass over the largest
tensor of many networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .use import Node, operation


class Lift:
    """From δ at the output of a max pooling to δ at the output of what ReLU was applied to.

    Args:
        pool: The node of the pooling.
    """

    def __init__(self, pool: Node) -> None:
        self.pool = pool
        y, self.winners = pool._saved_self, pool._saved_result1
        self.positive = y.flatten(-2).gather(-1, self.winners.flatten(-2)).view_as(self.winners) > 0
        self.y = y

    def down(self, delta: Tensor) -> Tensor:
        """δ one ReLU and one pooling further down.

        Args:
            delta: At the output of the pooling.

        Returns:
            At the output of what ReLU was applied to.
        """
        pool = self.pool
        sizes = pool._saved_kernel_size, pool._saved_stride, pool._saved_padding, pool._saved_dilation
        found: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            delta * self.positive, self.y, *sizes, pool._saved_ceil_mode, self.winners
        )
        return found


def lifts(order: Sequence[Node], ends: Iterable[Node]) -> dict[Node, Lift]:
    """The ends of a backpropagation that can be reached from a max pooling further up.

    Args:
        order: All nodes of the graph.
        ends: The nodes with nothing wanted below them.

    Returns:
        End → its lift, for those that only a ReLU takes, which only a max pooling takes.
    """
    takers: dict[Node, list[Node]] = {}
    for node in order:
        for source, _ in node.next_functions:
            if source is not None:
                takers.setdefault(source, []).append(node)
    found = {}
    for end in ends:
        above = takers.get(end, [])
        if len(above) != 1 or operation(above[0]) != "Relu":
            continue
        pools = takers.get(above[0], [])
        if len(pools) == 1 and operation(pools[0]) == "MaxPool2DWithIndices":
            found[end] = Lift(pools[0])
    return found
