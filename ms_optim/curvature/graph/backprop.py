r"""Backpropagation of logit columns to the places where parameters were used, and no further.

A column S_c is sent from the logits to the *outputs* of the operations that use parameters; weight gradients are never
formed, since autograd computes only what lies between the logits and the requested edges.  On its way it is handed to
whoever waits at a node, by a hook that runs before the node does, and is let go; only the ends of the way (the uses
with no other use below them) are returned by the engine.  So a column costs no more memory than a training backward
pass has in flight.

Several small columns can go together under ``vmap`` instead, which a GPU needs to be busy at all; then all of them are
kept until the call returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ...errors import NoRuleError
from .layout import Layout, Order
from .lift import lifts
from .tape import Node, Use

Sink = Callable[[Tensor], None]  # takes δ, [c, *output.shape]

_ORDERS: tuple[Order, ...] = ("sample-major", "position-major", "sequence-first")


def deltas(logits: Tensor, nodes: Sequence[Node], columns: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
    """δ = Σ_k S_ck ∂o_k / ∂(output of each node), for all columns at once.

    Args:
        logits: ``[N, K]``, in the graph, which is kept.
        nodes: Autograd nodes below the logits.
        columns: ``[C, N, K]``.
        create_graph: Whether δ can be differentiated again (for C = 1 only).

    Returns:
        One tensor ``[C, *output.shape]`` per node.
    """
    edges = [GradientEdge(node, 0) for node in nodes]
    columns = columns.to(logits.dtype)
    if columns.shape[0] == 1:
        found = torch.autograd.grad(logits, edges, columns[0], retain_graph=True, create_graph=create_graph)
        return tuple(delta[None] for delta in found)
    return torch.autograd.grad(logits, edges, columns, retain_graph=True, is_grads_batched=True)


def backpropagate(
    logits: Tensor,
    order: Sequence[Node],
    sinks: Mapping[Node, Sink],
    columns: Iterable[Tensor],
    after: Callable[[], None] = lambda: None,
    together: int = 1,
) -> None:
    """Send columns to the sinks.

    Args:
        logits: ``[N, K]``, in the graph, which is kept.
        order: The nodes below the logits, each after those that it takes its inputs from.
        sinks: Autograd nodes, and what takes δ at their outputs.
        columns: Pieces ``[c, N, K]``.
        after: Called when every sink has had the δ of a piece.
        together: How many columns may go under ``vmap``; 1: one by one.
    """
    if together > 1:
        for piece in columns:
            for part in piece.split(together):
                for node, delta in zip(sinks, deltas(logits, list(sinks), part), strict=True):
                    sinks[node](delta)
                after()
        return
    ends = _ends(order, sinks)
    lifted = lifts(order, ends)
    edges = [GradientEdge(lifted[node].pool if node in lifted else node, 0) for node in ends]
    on_the_way = [node for node in sinks if node not in ends]

    def hand_over(sink: Sink) -> Callable[[tuple[Tensor, ...]], None]:
        def hook(gradients: tuple[Tensor, ...]) -> None:
            sink(gradients[0].detach()[None])

        return hook

    hooks = [node.register_prehook(hand_over(sinks[node])) for node in on_the_way]
    try:
        for piece in columns:
            for column in piece.to(logits.dtype):
                found = torch.autograd.grad(logits, edges, column, retain_graph=True)
                for node, delta in zip(ends, found, strict=True):
                    sinks[node]((lifted[node].down(delta) if node in lifted else delta)[None])
                del found, delta  # free memory for the next column
                after()
    finally:
        for hook in hooks:
            hook.remove()


def _ends(order: Sequence[Node], sinks: Mapping[Node, Sink]) -> list[Node]:
    """The sinks that have no other sink below them."""
    above: set[Node] = set()  # nodes with a sink at or below them
    ends = []
    for node in order:
        below = any(source in above for source, _ in node.next_functions if source is not None)
        if node in sinks and not below:
            ends.append(node)
        if below or node in sinks:
            above.add(node)
    return ends


def find_layouts(logits: Tensor, uses: Sequence[Use]) -> dict[Node, Layout | None]:
    """Find out where the samples are in the outputs of operations.

    A sample's logits may reach only that sample's part of a tensor: the even samples are silenced, then the odd ones,
    and in the right layout what arrives in their part is exactly zero.  Both, because of two samples one alone may
    hide the other.

    Args:
        logits: ``[N, K]``, in the graph.
        uses: The uses to look at.

    Returns:
        Node → its layout, the first that fits; ``None`` where none does: the samples are folded in an unknown way, or
        influence each other.
    """
    samples, classes = logits.shape
    # Any column will do that no layer is likely to annihilate, whatever the probabilities are.
    column = torch.arange(1, classes + 1, device=logits.device).cos().to(logits.dtype).expand(samples, classes)
    shapes = {use.node: use.output_shape for use in uses}
    fitting = {node: [order for order in _ORDERS if Layout(samples, order).fits(shapes[node])] for node in shapes}
    if samples > 1 and shapes:
        for parity in (0, 1):
            silenced = torch.arange(samples, device=logits.device) % 2 == parity
            half = column.masked_fill(silenced[:, None], 0.0)
            for node, (delta,) in zip(shapes, deltas(logits, list(shapes), half[None]), strict=True):
                fitting[node] = [
                    order for order in fitting[node] if not bool(Layout(samples, order).front(delta)[silenced].any())
                ]
    return {node: Layout(samples, orders[0]) if orders else None for node, orders in fitting.items()}


def no_layout(use: Use, samples: int) -> NoRuleError:
    """The error of a use whose samples were not found."""
    return NoRuleError(
        f"parameter {use.parameter} {use.shape} is used by {use.operation} on a tensor {use.output_shape} in which the "
        f"{samples} samples lie on no axis by themselves: they influence each other, or are folded in an unknown way, "
        "and no curvature rule covers that; put the batch axis first, or measure with batches of one sample"
    )


def bytes_of(node: Node) -> int:
    """Bytes of δ at a node's output, one column."""
    meta = node._input_metadata[0]
    return int(math.prod(meta.shape) * meta.dtype.itemsize)
