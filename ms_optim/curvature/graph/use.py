r"""Uses: where in autograd's graph a parameter, or a tensor made of parameters alone, enters an operation.

An operation rarely takes the parameter itself: a weight is transposed, a scale is reshaped, three biases are
concatenated, a kernel is standardised, a factor is normalised.  Whatever lies between, D = f(θ₁, θ₂, …) is one tensor
that all samples share, so the contraction at the operation gives the gradient g_D of every sample and

    g_θ = (∂f/∂θ)ᵀ g_D

is a vector-Jacobian product along the recorded chain.  Where every entry of D is an entry of θ up to its sign, and none
twice, that is a rearrangement: sums of squares stay what they are and nothing has to be formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes that the type does not declare

# Operations whose output holds entries of their only input, each at most once, up to signs.
_REARRANGEMENTS = frozenset(
    """
View UnsafeView ReshapeAlias T Transpose Permute Squeeze Unsqueeze Clone Alias ToCopy Select Slice Split SplitWithSizes
UnsafeSplit UnsafeSplitWithSizes Unbind Neg Flip Roll Diagonal Narrow
""".split()
)
_REPETITIONS = frozenset(["Expand", "Repeat"])  # the same if they repeat nothing


def operation(node: Node) -> str:
    """The name of the operation that a node differentiates: ``"Convolution"`` for ``ConvolutionBackward0``."""
    return _operation(node.name())


@cache
def _operation(name: str) -> str:
    """The same for a node's name."""
    return name.rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """The shape of an output of the operation that a node differentiates."""
    return tuple(node._input_metadata[output].shape)


@dataclass(frozen=True)
class Derivation:
    """How the tensor D that an operation takes was made of a parameter θ and others.

    Attributes:
        edge: D, as an output of an autograd node.
        leaf: θ.
        links: The operations on a way from θ to D.
    """

    edge: GradientEdge
    leaf: Tensor
    links: tuple[str, ...]

    def pull(self, gradients: Tensor) -> Tensor:
        """g_θ = (∂f/∂θ)ᵀ g_D for several gradients at once, differentiable where gradients are enabled.

        Args:
            gradients: ``[m, *D.shape]``.

        Returns:
            ``[m, *θ.shape]``.
        """
        meta = self.edge.node._input_metadata[self.edge.output_nr]
        gradients = gradients.to(meta.dtype)
        again = torch.is_grad_enabled()
        try:
            (found,) = torch.autograd.grad(
                (self.edge,), (self.leaf,), (gradients,), retain_graph=True, create_graph=again, is_grads_batched=True
            )
        except RuntimeError:  # an operation that vmap cannot batch
            each = [
                torch.autograd.grad((self.edge,), (self.leaf,), (g,), retain_graph=True, create_graph=again)[0]
                for g in gradients
            ]
            found = torch.stack(each)
        return found


@dataclass(frozen=True)
class Use:
    """One use of one parameter.

    Attributes:
        parameter: Its name in the model.
        shape: The shape of what the operation takes: of the parameter, or of what was derived from it.
        node: The autograd node of the operation that used it.
        operation: That operation's name.
        slot: Which input of the operation it was.
        transposed: Whether an odd number of transpositions stands between the parameter, a matrix, and the operation.
        samples: N, the length of the logits' first axis.
        source: The node of what the operation takes; ``None``: the parameter's own.
        derivation: How what the operation takes was made of the parameter; ``None``: it is the parameter itself, or
            a transpose of it.
    """

    parameter: str
    shape: tuple[int, ...]
    node: Node
    operation: str
    slot: int
    transposed: bool = False
    samples: int = 1
    source: Node | None = None
    derivation: Derivation | None = None

    @cached_property
    def rearranged(self) -> bool:
        """Whether the operation takes entries of the parameter up to signs, none of them twice, and nothing else."""
        return self.source is None or _rearranges(self.source)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the operation's output, where δ arrives."""
        return shape_of(self.node)

    @property
    def path(self) -> str:
        """The operations from the parameter to this one, for messages."""
        links = self.derivation.links if self.derivation is not None else ("transpose",) * self.transposed
        return " -> ".join((*links, self.operation))


def derivation(node: Node, output: int, leaf: Node) -> Derivation:
    """Describe how an output of a node was made of the parameter at a leaf.

    Args:
        node: The node of D.
        output: Which of its outputs D is.
        leaf: The parameter's ``AccumulateGrad`` node, below it.

    Returns:
        The derivation.
    """
    return Derivation(GradientEdge(node, output), leaf.variable, tuple(reversed(_links(node, leaf))))


def _links(node: Node, leaf: Node) -> list[str]:
    """Operations on the shortest way from a node down to a leaf."""
    found: dict[Node, tuple[str, ...]] = {node: (operation(node),)}
    queue = [node]
    for node in queue:
        for source, _ in node.next_functions:
            if source is leaf:
                return list(found[node])
            if source is not None and source not in found:
                found[source] = (*found[node], operation(source))
                queue.append(source)
    raise AssertionError("the leaf is not below the node")


def _rearranges(node: Node) -> bool:
    """Whether a node's output holds entries of one leaf up to signs, none of them twice, and nothing else."""
    while operation(node) != "AccumulateGrad":
        sources = [source for source, _ in node.next_functions if source is not None]
        if len(sources) != 1 or len(node.next_functions) != 1:
            return False
        name = operation(node)
        if name in _REPETITIONS:
            if not sources[0]._input_metadata or math.prod(shape_of(sources[0])) != math.prod(shape_of(node)):
                return False
        elif name not in _REARRANGEMENTS:
            return False
        node = sources[0]
    return True


def transposition(node: Node, leaf: Node) -> bool | None:
    """Whether a node is a leaf matrix after an odd number of transpositions; ``None`` if it is anything else.

    Args:
        node: A node above the leaf, or the leaf.
        leaf: An ``AccumulateGrad`` node.

    Returns:
        The parity, or ``None``.
    """
    odd = False
    while node is not leaf:
        if node is None or operation(node) not in ("T", "Transpose", "Permute") or len(shape_of(node)) != 2:
            return None
        # Autograd saves axes as unsigned numbers, -1 as 2⁶⁴ − 1; of two axes the parity tells which it is.
        if operation(node) == "Transpose":
            odd ^= (node._saved_dim0 - node._saved_dim1) % 2 == 1
        else:
            odd ^= operation(node) == "T" or node._saved_dims[0] % 2 == 1
        node = node.next_functions[0][0]
    return odd
