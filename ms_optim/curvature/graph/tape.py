r"""The tape: what autograd recorded of one forward pass, read as a description of the network.

Autograd's graph of the logits is the one record that misses nothing: functional code, in-place operations, tied and
reused tensors all end in it, and every path from a parameter to the logits passes through its nodes.  Two things are
read off it.

*Uses.*  Every use of every parameter is an edge into that parameter's ``AccumulateGrad`` node.  The node at the other
end says what was done with it (``ConvolutionBackward0``, …), keeps the input that the curvature rule needs, and is the
place where the backpropagated factor is taken: an in-place operation afterwards has a node of its own, so it does no
harm.  A node that depends on parameters alone, as far as the graph knows, is only another form of them if whatever
takes it has a rule; then that is the use (:mod:`ms_optim.curvature.graph.use`).  This holds even where a constant in
it was made of the data: all samples share it.  A use without a rule is left as one, hence no parameter is ever skipped
silently.

*Kind.*  Whether the logits are piecewise linear in a parameter (:mod:`ms_optim.curvature.graph.kind`).

Source: arXiv 2106.12612, section 4; the reading of the graph is our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from .kind import nonlinear_in, union
from .layout import Layout
from .registry import entry_at
from .rows import proved_layouts
from .use import Node, Use, derivation, operation, shape_of, transposition

__all__ = ["Node", "Tape", "Use", "operation", "read_tape"]

_VIEWS = frozenset(
    """
AccumulateGrad View UnsafeView ReshapeAlias T Transpose Permute Expand Squeeze Unsqueeze Select Slice Alias AsStrided
Split SplitWithSizes Unbind Detach
""".split()
)

_MATRIX_SLOTS = (("Addmm", 2), ("Mm", 1))  # where a transposed matrix is as good as the matrix


@dataclass(frozen=True)
class Tape:
    """The uses of all parameters, and what may be said of their traces.

    Attributes:
        uses: Parameter name → its uses, in the order of the forward pass; empty if the logits ignore it.
        kind: Parameter name → ``"hessian"`` or ``"gauss-newton"``.
        order: All nodes, each after those that it takes its inputs from.
        logits: The shape of the logits.
    """

    uses: dict[str, list[Use]] = field(default_factory=dict)
    kind: dict[str, str] = field(default_factory=dict)
    order: list[Node] = field(default_factory=list)
    logits: tuple[int, ...] = (1, 1)

    @cached_property
    def layouts(self) -> dict[Node, Layout]:
        """See :func:`ms_optim.curvature.graph.rows.proved_layouts`."""
        return proved_layouts(self.order, self.logits)

    @cached_property
    def activation_bytes(self) -> int:
        """An upper bound on what autograd keeps of the forward pass: the outputs of all nodes that are no views."""
        total = 0
        for node in self.order:
            if operation(node) not in _VIEWS:
                total += sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in node._input_metadata[:1])
        return total


def read_tape(logits: Tensor, parameters: Mapping[str, Tensor]) -> Tape:
    """Find every use of every parameter in the graph of ``logits``, and each parameter's kind.

    Args:
        logits: The output of a forward pass, in the graph.
        parameters: Name → parameter; each tensor once.

    Returns:
        The tape. Parameters that the logits do not depend on have no use, and kind ``"hessian"`` (of zero).

    Raises:
        CurvatureError: If part of the graph is hidden by reentrant checkpointing, or a BatchNorm differentiates
            through the statistics of the batch, so that samples are not independent.
    """
    names = {id(tensor): name for name, tensor in parameters.items()}
    inputs = _inputs_first(logits.grad_fn)
    bits = {name: 1 << i for i, name in enumerate(parameters)}
    reader = _Reader(inputs, names, logits.shape[0] if logits.ndim else 1)
    uses: dict[str, list[Use]] = {name: [] for name in parameters}
    depends: dict[Node, int] = {}
    tainted = 0
    for node, sources in inputs.items():
        if node in reader.leaves:
            name = names.get(id(node.variable))
            depends[node] = 0 if name is None else bits[name]
            if name is not None:
                uses[name] = reader.uses(name, node)
            continue
        slots = [0 if source is None else depends[source] for source, _ in sources]
        depends[node] = union(slots)
        tainted |= nonlinear_in(node, reader.operations[node], slots, reader.samples, node in reader.derived)
    kind = {name: "gauss-newton" if tainted & bit else "hessian" for name, bit in bits.items()}
    return Tape(uses, kind, list(inputs), tuple(logits.shape))


def _inputs_first(root: Node | None) -> dict[Node, tuple[tuple[Node | None, int], ...]]:
    """All nodes below ``root``, each after every node that it takes its inputs from, with these and their outputs."""
    order: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
    seen: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
    stack: list[tuple[Node, bool]] = [] if root is None else [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order[node] = seen[node]
        elif node not in seen:
            seen[node] = node.next_functions
            stack.append((node, True))
            stack.extend((source, False) for source, _ in seen[node] if source is not None)
    return order


class _Reader:
    """Decides which nodes are only other forms of parameters.

    A node is *derived* if everything it takes is a parameter or derived, and everything that takes it has a rule for
    what it takes or is derived in turn: the largest set of nodes of which this is true.  Of one sample alone nothing
    can be told from a parameter, but nothing needs to be: there an operation with a rule is the use.

    Args:
        inputs: All nodes, inputs first, with their inputs.
        names: id of a parameter → its name.
        samples: N.

    Attributes:
        samples: N.
        operations: Node → its operation.
        leaves: The nodes of parameters, whether asked for or not.
        derived: The derived nodes.
    """

    def __init__(
        self,
        inputs: Mapping[Node, tuple[tuple[Node | None, int], ...]],
        names: Mapping[int, str],
        samples: int,
    ) -> None:
        self.samples, self.inputs = samples, inputs
        self.operations = {node: operation(node) for node in inputs}
        self.consumers: dict[Node, list[tuple[Node, int, int]]] = {node: [] for node in inputs}
        self.leaves: set[Node] = set()
        self.derived: set[Node] = set()
        for node, sources in inputs.items():
            if self.operations[node] == "AccumulateGrad":
                if id(node.variable) in names or isinstance(node.variable, nn.Parameter):
                    self.leaves.add(node)
                continue
            alone = False
            for slot, (source, output) in enumerate(sources):
                if source is not None:
                    self.consumers[source].append((node, slot, output))
                    alone = True
            if alone and self._takes_parameters_alone(node):
                self.derived.add(node)
        self._settle()

    def _settle(self) -> None:
        """Remove nodes until all that are left are only other forms of parameters."""
        doubtful: list[Node] = []
        for node in reversed(self.inputs):  # whatever takes a node has been looked at before it
            if node in self.derived and not self._serves(node):
                self.derived.remove(node)
                doubtful.extend(taker for taker, _, _ in self.consumers[node] if taker in self.derived)
        while doubtful:
            node = doubtful.pop()
            if node in self.derived and not (self._takes_parameters_alone(node) and self._serves(node)):
                self.derived.remove(node)
                doubtful.extend(source for source, _ in self.inputs[node] if source in self.derived)
                doubtful.extend(taker for taker, _, _ in self.consumers[node] if taker in self.derived)

    def _takes_parameters_alone(self, node: Node) -> bool:
        """Whether all that a node takes are parameters or derived."""
        return all(
            source is None or source in self.derived or source in self.leaves for source, _ in self.inputs[node]
        )

    def _serves(self, node: Node) -> bool:
        """Whether everything that takes a node has a rule for it; of one sample, whether the node itself has none."""
        takers = self.consumers[node]
        for taker, slot, output in takers:
            if taker not in self.derived and not self._has_rule(taker, slot, node, output):
                return False
        if self.samples > 1:
            return bool(takers)
        edges = [(slot, *edge) for slot, edge in enumerate(self.inputs[node]) if edge[0] is not None]
        return bool(takers) and not all(self._has_rule(node, slot, source, output) for slot, source, output in edges)

    def _has_rule(self, taker: Node, slot: int, node: Node, output: int) -> bool:
        """Whether there is a rule for an output of a node as if it were a parameter."""
        entry = entry_at(self.operations[taker], slot)
        return entry is not None and entry.covers(self._use("", taker, slot, node, output))

    def uses(self, name: str, leaf: Node) -> list[Use]:
        """All uses of the parameter at a leaf, the last of the forward pass last."""
        found: list[tuple[Node, int, Use]] = []
        seen = {leaf}
        stack = [leaf]
        while stack:
            node = stack.pop()
            for taker, slot, output in self.consumers[node]:
                if taker not in self.derived:
                    found.append((node, output, self._use(name, taker, slot, node, output)))
                elif taker not in seen:
                    seen.add(taker)
                    stack.append(taker)
        if len(found) > 1:
            position = {node: i for i, node in enumerate(self.inputs)}
            found.sort(key=lambda each: (position[each[2].node], each[2].slot))
        return [self._of_parameter(use, node, output, leaf) for node, output, use in found]

    def _use(self, name: str, taker: Node, slot: int, node: Node, output: int) -> Use:
        """The use of an output of a node as if it were a parameter."""
        kind = self.operations[taker]
        node, output = self._unexpanded(kind, slot, node, output)
        shape = tuple(node.variable.shape) if self.operations[node] == "AccumulateGrad" else shape_of(node, output)
        return Use(name, shape, taker, kind, slot, samples=self.samples, source=node)

    def _of_parameter(self, use: Use, node: Node, output: int, leaf: Node) -> Use:
        """The use with the way from the parameter to it."""
        node, output = self._unexpanded(use.operation, use.slot, node, output)
        if node is leaf:
            return use
        odd = transposition(node, leaf) if (use.operation, use.slot) in _MATRIX_SLOTS else None
        if odd is not None:
            return replace(use, shape=tuple(leaf.variable.shape), transposed=odd)
        return replace(use, derivation=derivation(node, output, leaf))

    def _unexpanded(self, taker: str, slot: int, node: Node, output: int) -> tuple[Node, int]:
        """What an expansion was made of, before an operation that broadcasts."""
        entry = entry_at(taker, slot)
        if entry is not None and entry.broadcasts:
            while self.operations[node] == "Expand":
                source, output = self.inputs[node][0]
                assert source is not None
                node = source
        return node, output
