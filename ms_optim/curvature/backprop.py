r"""Backpropagation of logit columns to the places where parameters were used, and no further.

A column S_c is sent from the logits to the *outputs* of the operations that use parameters; weight gradients are never
formed, since autograd computes only what lies between the logits and the requested edges.  Several columns can go
together under ``vmap`` (one call, larger matrix products) or one after the other (each stays in the cache), and several
are kept at a time, so that what a contraction prepares from the input is prepared once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..errors import CurvatureError
from .contraction import Columns
from .tape import Node, Use

# δ of as many columns as fit in this are kept for one contraction; one column is kept whatever its size.
_KEPT_BYTES = 256 * 2**20


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
    logits: Tensor, nodes: Mapping[Node, bool], count: int, column: Callable[[int, int], Tensor]
) -> Iterator[dict[Node, Columns]]:
    """Send ``count`` columns to the nodes, a group at a time.

    Args:
        logits: ``[N, K]``, in the graph, which is kept.
        nodes: Autograd nodes below the logits, and whether the norms of their columns are enough.
        count: The number of columns.
        column: ``column(start, stop)`` gives columns ``[stop − start, N, K]``.

    Yields:
        Node → its columns, for disjoint groups that together are all of them.
    """
    sizes = {node: math.prod(node._input_metadata[0].shape) * logits.element_size() for node in nodes}
    kept = max(1, _KEPT_BYTES // max(1, sum(size for node, size in sizes.items() if not nodes[node])))
    # On CPU several columns at a time push each other out of the cache: 10 to 25% slower on LeNet, no gain on an MLP.
    together = max(1, _KEPT_BYTES // max(1, sum(sizes.values()))) if logits.is_cuda else 1
    for first in range(0, count, kept):
        last = min(first + kept, count)
        at = {node: Columns(norms_only=norms_only) for node, norms_only in nodes.items()}
        for start in range(first, last, together):
            piece = deltas(logits, list(nodes), column(start, min(start + together, last)))
            for node, delta in zip(nodes, piece, strict=True):
                at[node].add(delta)
            del piece, delta  # so that what is let go is free memory for the next piece
        yield at


def require_separate_samples(logits: Tensor, uses: Sequence[Use], column: Tensor) -> None:
    """Check that the first axis of every operation runs over samples, sample-major.

    A sample's logits may reach only that sample's part of the axis: the even samples are silenced, then the odd ones,
    and what arrives in their part must be exactly zero.  Both, because of two samples one alone may hide the other.

    Args:
        logits: ``[N, K]``, in the graph.
        uses: The uses to look at.
        column: ``[N, K]``, the column to send.

    Raises:
        CurvatureError: If something arrives; the parameter and the operation are named.
    """
    samples = logits.shape[0]
    if samples < 2 or not uses:
        return
    for parity in (0, 1):
        silenced = torch.arange(samples, device=logits.device) % 2 == parity
        half = column.masked_fill(silenced[:, None], 0.0)
        for use, (delta,) in zip(uses, deltas(logits, [use.node for use in uses], half[None]), strict=True):
            rows = delta.shape[0]
            if rows % samples or bool(delta.unflatten(0, (samples, rows // samples))[silenced].any()):
                raise CurvatureError(
                    f"parameter {use.parameter} {use.shape} is used by {use.operation} on a tensor whose first axis "
                    f"({rows}) does not run over the {samples} samples in order (a sequence-first layout, or samples "
                    "that influence each other); put the batch axis first, or measure with batches of one sample"
                )
