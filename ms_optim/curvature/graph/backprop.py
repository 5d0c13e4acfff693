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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ...errors import NoRuleError
from .layout import Layout, Order
from .lift import Lift, Pooled
from .tape import Node, Use

Sink = Callable[[Tensor | Pooled], None]  # takes δ, [c, *output.shape]

# Up to this many samples every two are told apart, at two backpropagations per binary digit.
_FEW = 16

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
    how = {"retain_graph": True, "allow_unused": True}  # an operation may declare that it passes nothing on
    if columns.shape[0] == 1:
        found = torch.autograd.grad(logits, edges, columns[0], create_graph=create_graph, **how)
        return tuple(delta_of(delta, node)[None] for delta, node in zip(found, nodes, strict=True))
    found = torch.autograd.grad(logits, edges, columns, is_grads_batched=True, **how)
    nothing = (len(columns),)
    return tuple(delta_of(delta, node, nothing) for delta, node in zip(found, nodes, strict=True))


def delta_of(delta: Tensor | None, node: Node, lead: tuple[int, ...] = ()) -> Tensor:
    """δ, or zeros in its place where nothing arrives at the node."""
    if delta is not None:
        return delta
    meta = node._input_metadata[0]
    return torch.zeros((*lead, *meta.shape), dtype=meta.dtype, device=meta.device)


def send_together(
    logits: Tensor, sinks: Mapping[Node, Sink], columns: Iterable[Tensor], count: int, after: Callable[[], None]
) -> None:
    """Send columns to the sinks, some at a time under ``vmap``.

    Args:
        logits: ``[N, K]``, in the graph, which is kept.
        sinks: Autograd nodes, and what takes δ at their outputs.
        columns: Pieces ``[c, N, K]``.
        count: How many go together.
        after: Called when every sink has had the δ of some columns.
    """
    for piece in columns:
        for part in piece.split(count):
            for node, delta in zip(sinks, deltas(logits, list(sinks), part), strict=True):
                sinks[node](delta)
            after()


def send_one_by_one(
    logits: Tensor,
    sinks: Mapping[Node, Sink],
    ends: Sequence[Node],
    lifted: Mapping[Node, Lift],
    columns: Iterable[Tensor],
    after: Callable[[], None],
) -> None:
    """Send columns to the sinks, one after the other.

    Args:
        logits: ``[N, K]``, in the graph, which is kept.
        sinks: Autograd nodes, and what takes δ at their outputs.
        ends: The sinks that have no other sink below them.
        lifted: The sinks that take δ as it is above a pooling.
        columns: Pieces ``[c, N, K]``.
        after: Called when every sink has had the δ of a column.
    """
    # The node where δ is taken, which may be the pooling's.
    where = {node: lifted[node].pool if node in lifted else node for node in sinks}
    edges = [GradientEdge(where[node], 0) for node in ends]

    def hand_over(node: Node, delta: Tensor | None) -> None:
        found = delta_of(delta, where[node]).detach()
        sinks[node](lifted[node].pooled(found) if node in lifted else found[None])

    def hook(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        return lambda gradients: hand_over(node, gradients[0])

    hooks = [where[node].register_prehook(hook(node)) for node in sinks if node not in ends]
    try:
        for piece in columns:
            for column in piece.to(logits.dtype):
                found = torch.autograd.grad(logits, edges, column, retain_graph=True, allow_unused=True)
                for node, delta in zip(ends, found, strict=True):
                    hand_over(node, delta)
                del found, delta  # free memory for the next column
                after()
    finally:
        for each in hooks:
            each.remove()


def lowest(order: Sequence[Node], nodes: Collection[Node]) -> list[Node]:
    """The nodes that have no other of them below.

    Args:
        order: All nodes of the graph, each after those that it takes its inputs from.
        nodes: The ones to choose from.

    Returns:
        The lowest of them.
    """
    above: set[Node] = set()  # nodes with one of them at or below
    found = []
    for node in order:
        below = any(source in above for source, _ in node.next_functions if source is not None)
        if node in nodes and not below:
            found.append(node)
        if below or node in nodes:
            above.add(node)
    return found


def find_layouts(logits: Tensor, uses: Sequence[Use]) -> dict[Node, list[Layout]]:
    """Find out where the samples are in the outputs of operations.

    A sample's logits may reach only that sample's part of a tensor: half of the samples are silenced, then the others,
    and in the right layout what arrives in their part is exactly zero.  Both, because of two samples one alone may
    hide the other.  Of few samples every two are separated by one of the halves; of many the half is random, because
    what mixes samples follows a pattern, and mixes many.

    Args:
        logits: ``[N, K]``, in the graph.
        uses: The uses to look at.

    Returns:
        Node → the layouts that fit.  None: the samples are folded in an unknown way, or influence each other.
        Several: next to nothing arrives (dead units), or one position fits everywhere; any of them will do for these
        samples, but says nothing about others.
    """
    samples, classes = logits.shape
    # Any column will do that no layer is likely to annihilate, whatever the probabilities are.
    column = torch.arange(1, classes + 1, device=logits.device).cos().to(logits.dtype).expand(samples, classes)
    shapes = {use.node: use.output_shape for use in uses}
    fitting = {node: _candidates(samples, shape) for node, shape in shapes.items()}
    if samples > 1 and shapes:
        for silenced in _halves(samples, logits.device):
            masked = column.masked_fill(silenced[:, None], 0.0)
            for node, (delta,) in zip(shapes, deltas(logits, list(shapes), masked[None]), strict=True):
                fitting[node] = [found for found in fitting[node] if not bool(found.front(delta)[silenced].any())]
    return fitting


def _halves(samples: int, device: torch.device) -> Iterator[Tensor]:
    """Which samples to silence: halves of them, and the other halves."""
    index = torch.arange(samples)
    if samples <= _FEW:
        halves = [(index >> bit) % 2 == 1 for bit in range((samples - 1).bit_length())]
    else:
        halves = [torch.randperm(samples, generator=torch.Generator().manual_seed(samples)) < samples // 2]
    for half in halves:
        yield half.to(device)
        yield ~half.to(device)


def _candidates(samples: int, shape: tuple[int, ...]) -> list[Layout]:
    """The layouts that a tensor of this shape can have; of two that are the same for it, one."""
    found = [Layout(samples, order) for order in _ORDERS]
    one = len(shape) > 0 and shape[0] == samples  # one position: before or behind the samples makes no difference
    return [layout for layout in found if layout.fits(shape) and not (one and layout.order == "position-major")]


def no_layout(use: Use, samples: int) -> NoRuleError:
    """The error of a use whose samples were not found."""
    return NoRuleError(
        f"parameter {use.parameter} {use.shape} is used by {use.operation} on a tensor {use.output_shape} in which the "
        f"{samples} samples lie on no axis by themselves: they influence each other, or are folded in an unknown way, "
        "and no curvature rule covers that; put the batch axis first, or measure with batches of one sample"
    )


def undifferentiable(logits: Tensor, order: Sequence[Node]) -> Node | None:
    """The operation through which nothing can be sent, if there is one; for an error's message, so slow.

    Args:
        logits: ``[N, K]``, in the graph.
        order: The nodes below the logits, each after those that it takes its inputs from.

    Returns:
        The first node from the logits down that raises.
    """
    column = torch.ones_like(logits)
    takers: dict[Node, Node] = {}
    for node in reversed(order):
        try:
            if node in takers:
                torch.autograd.grad(logits, [GradientEdge(node, 0)], column, retain_graph=True, allow_unused=True)
        except Exception:  # noqa: BLE001 - whatever it raises, it is the one
            return takers[node]
        takers.update((source, node) for source, _ in node.next_functions if source is not None)
    return None


def bytes_of(node: Node) -> int:
    """Bytes of δ at a node's output, one column."""
    meta = node._input_metadata[0]
    return int(math.prod(meta.shape) * meta.dtype.itemsize)
