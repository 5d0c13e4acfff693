"""Discovery, channel by channel: from a model and one batch to the group of its hidden units' scales.

The graphs are those of :func:`ms_optim.scale_symmetries`, read with labels in place of one scale per tensor.  What a
parameter's labels are depends on its use (:mod:`~ms_optim.symmetry.weight_labels`).  Directions that move no parameter
are dropped at the end, and every variable that is left is a unit.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from typing import Any, cast

import scipy.sparse
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..batch import Batch
from ..errors import NoEffectWarning
from .channel_rules import ChannelOperation, apply_channel_rule
from .discover import ancestors, exported, module_path
from .group import Opaque
from .invariance import set_training, undisturbed
from .labels import ANY, FIXED_LABEL, Labels, compressed
from .linear_system import FIXED, LinearSystem, LogScale
from .operation import Operation, is_scalable
from .rules import COPIES, apply_rule
from .unit_group import Factor, NeuronGroup, UnitStatistics, moving_factors
from .weight_labels import WeightLabels

_FIXED = torch.tensor(FIXED_LABEL)


def neuron_symmetries(model: nn.Module, example_inputs: Any) -> NeuronGroup:
    """Find the positive rescalings of single hidden units (channels) that leave the logits unchanged.

    For two layers of a ReLU network and a unit j between them: W1[j, :] → e^t W1[j, :], W2[:, j] → e^{−t} W2[:, j].
    Nothing is disturbed, as in :func:`ms_optim.scale_symmetries`, whose group is contained in this one.

    Args:
        model: Any module that ``torch.export`` can read, on any device; parameters with ``requires_grad=False`` stay.
        example_inputs: One batch on the model's device: a tensor, a dictionary, or ``(inputs, targets)``.

    Returns:
        The group: an element has one number for each unit.

    Raises:
        SymmetryError: If the model cannot be exported.

    Warns:
        NoEffectWarning: If there is no symmetry.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> neuron_symmetries(net, torch.ones(1, 3)).units
    4
    """
    batch = Batch.of(example_inputs, model)
    discovery = _Channels(model)
    with undisturbed(model):
        for mode in ("evaluation", "training"):
            set_training(model, mode == "training")
            discovery.read(exported(model, batch, mode))
    group = discovery.group()
    if not group.units:
        warnings.warn(
            f"{type(model).__name__} has no hidden unit that can be rescaled, so balancing changes nothing; opaque "
            f"operations: {', '.join(sorted({o.operation for o in group.opaque})) or 'none'}",
            NoEffectWarning,
            stacklevel=2,
        )
    return group


class _Channels:
    """The equations of one model on labels; what the rules for tensors ask of a graph is answered here, too."""

    def __init__(self, model: nn.Module) -> None:
        self.system = LinearSystem()
        self.labels = Labels(self.system)
        self.parameters = dict(model.named_parameters())
        self.weights = WeightLabels(self.labels, self.parameters.values())
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        self._statistics: dict[tuple[int, int], tuple[str, str, float, Tensor]] = {}
        self._opaque: Counter[Opaque] = Counter()
        self._inexact = 0
        self._begin()

    def _begin(self) -> None:
        self._nodes: dict[tuple[fx.Node, int | None], Tensor] = {}
        self._names: dict[fx.Node, str] = {}  # of placeholders, and of what a BatchNorm hands on of them
        self._constants: dict[fx.Node, Tensor] = {}
        self._views: dict[fx.Node, tuple[Tensor, bool]] = {}  # parameters and their transposes
        self._norms: set[fx.Node] = set()
        self._used_statistics: dict[fx.Node, Tensor] = {}
        self._inexact_here = 0

    def read(self, program: ExportedProgram) -> None:
        """Add the equations of one graph.

        Args:
            program: An exported program after decomposition.
        """
        self._begin()
        opaque: Counter[Opaque] = Counter()
        moving: set[fx.Node] = set()
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        alive = ancestors(program.graph)
        for node in program.graph.nodes:
            if node not in alive:
                continue
            if node.op == "placeholder":
                if self._read_placeholder(node, specs.get(node.name), program):
                    moving.add(node)
            elif node.op == "call_function":
                reason = self._read_call(node)
                if not moving.isdisjoint(node.all_input_nodes):
                    moving.add(node)
                    if reason is not None:
                        opaque[Opaque(str(node.target), module_path(node), reason)] += 1
            elif node.op == "output":
                self._read_outputs(node, program)
        self._fix_statistics_of_other_uses(alive)
        self._opaque |= opaque
        self._inexact = max(self._inexact, self._inexact_here)

    def _read_call(self, node: fx.Node) -> str | None:
        """Apply the rule for channels, or that for tensors; the reason, if the operation is opaque."""
        if node.target is operator.getitem:
            return None
        operation = Operation(node, self)
        source = operation.first
        if isinstance(source, fx.Node) and source in self._views and _is_copy_or_transpose(operation):
            # What it is depends on who uses it; see labels_of.
            tensor, transposed = self._views[source]
            self._views[node] = (tensor, transposed != (operation.name not in COPIES))
            return None
        if apply_channel_rule(ChannelOperation(operation, self)):
            return None
        return apply_rule(operation)

    def labels_of(self, node: fx.Node, index: int | None = None) -> Tensor:
        """The labels of a node's tensor, or of one of its outputs, with as many axes as the tensor.

        Args:
            node: A node of the graph that is being read.
            index: Which output, of a node with several.

        Returns:
            Labels; new ones, equal for all entries, for a tensor that no rule has described.
        """
        if node.target is operator.getitem:
            return self.labels_of(cast(fx.Node, node.args[0]), cast(int, node.args[1]))
        value: Any = node.meta.get("val")
        if not is_scalable(value if index is None else value[index]):
            return _FIXED
        if (node, index) not in self._nodes:
            if node in self._views:
                tensor, transposed = self._views[node]
                entries = self.weights.entries(tensor)
                self.put(node, index, entries.T if transposed else entries)
            else:
                self.put(node, index, self.labels.fresh())
        return self._nodes[node, index]

    def put(self, node: fx.Node, index: int | None, labels: Tensor) -> None:
        """Set the labels of a result.

        Args:
            node: The node.
            index: Which output.
            labels: They broadcast to the tensor.
        """
        value: Any = node.meta.get("val")
        value = value if index is None else value[index]
        if is_scalable(value):
            missing = value.ndim - labels.ndim
            self._nodes[node, index] = compressed(labels.reshape((1,) * missing + tuple(labels.shape)))

    def scale_of(self, node: fx.Node, index: int | None = None) -> LogScale:
        """The one log-scale of a tensor, for the rules on tensors: all of its labels become equal.

        Args:
            node: A node.
            index: Which output.

        Returns:
            The log-scale; 0 for what is not a floating-point tensor.
        """
        if node.target is operator.getitem:
            return self.scale_of(cast(fx.Node, node.args[0]), cast(int, node.args[1]))
        value: Any = node.meta.get("val")
        if not is_scalable(value if index is None else value[index]):
            return FIXED
        labels = self.labels_of(node, index)
        labels = self.labels.without_any(self.labels.collapsed(labels, range(labels.ndim)))
        self._nodes[node, index] = labels
        return self.labels.expression(int(labels.reshape(())))

    def known(self, node: fx.Node) -> Tensor | None:
        """The value of a constant tensor of integers, on the CPU, if the node is one."""
        while node not in self._constants and node.op == "call_function" and len(node.all_input_nodes) == 1:
            if Operation(node, self).name not in COPIES:
                return None
            node = node.all_input_nodes[0]
        return self._constants.get(node)

    def weighted(
        self, node: fx.Node, inputs: Tensor, outputs: Tensor | None, groups: int, transposed: bool
    ) -> Tensor | None:
        """Use a weight ``[out, in / groups, ...]`` (or ``[in, out, ...]``): a_ji = s_out,j − s_in,i.

        Args:
            node: The weight.
            inputs: Labels ``[in]``.
            outputs: Labels ``[out]`` that the outputs have to have; ``None``: they are what they are.
            groups: Groups of a convolution; 1 where the weight is transposed.
            transposed: Whether the first axis is that of the inputs.

        Returns:
            Labels of the outputs; None if a weight is not a parameter and its labels vary in a way not spelled out.
        """
        tensor, flipped = self._views.get(node, (None, False))
        if tensor is None:
            return self._weighted_by_entries(node, inputs, outputs, groups, transposed)
        count = node.meta["val"].shape[1 if transposed else 0]
        outputs = self.labels.fresh(count) if outputs is None else outputs
        return self.weights.linear(tensor, inputs, outputs, groups, transposed != flipped)

    def _weighted_by_entries(
        self, node: fx.Node, inputs: Tensor, outputs: Tensor | None, groups: int, transposed: bool
    ) -> Tensor | None:
        """The same for a weight that is computed: s_in,i + a_ji is equal for all i."""
        entries = self.labels_of(node)
        entries = self.labels.collapsed(entries, range(2, entries.ndim))
        entries = entries.reshape(entries.shape[:2])
        entries = entries.T if transposed else entries
        size = node.meta["val"].shape
        if max(entries.shape[0], groups) * inputs.numel() // groups > 2**20:
            return None
        count = size[1] if transposed else size[0]
        per_group = entries.expand(count, entries.shape[1]).reshape(groups, count // groups, -1)
        total = self.labels.total(per_group, inputs.reshape(groups, 1, -1))
        found = self.labels.collapsed(total, [2]).reshape(count)
        return found if outputs is None else self.labels.merged([outputs, found])

    def batch_statistics(self, op: Operation, mean: Any, variance: Any, eps: float, labels: Tensor) -> None:
        """A BatchNorm uses running statistics: they move with its input, if they are buffers; else nothing moves.

        Args:
            op: The BatchNorm.
            mean: running_mean.
            variance: running_var.
            eps: ε.
            labels: Labels of the input, per channel.
        """
        labels = self.labels.without_any(labels)
        names = [self._names.get(node, "") for node in (mean, variance)]
        tensors = [self._tensors.get(name) for name in names]
        if any(tensor is None or tensor in self.weights for tensor in tensors):
            self.labels.equal(labels, _FIXED)
            return
        known = self._statistics.setdefault((id(tensors[0]), id(tensors[1])), (names[0], names[1], eps, labels))
        self.labels.equal(known[3], labels)
        if known[2] != eps:
            # var + ε and var + ε' cannot both scale.
            self.labels.equal(labels, _FIXED)
        self._norms.add(op.node)
        self._used_statistics |= {mean: known[3], variance: known[3]}
        # In training mode a later use of the same statistics reads what this one returns: outputs 3 and 4.
        for user in op.node.users:
            if user.target is operator.getitem and user.args[1] in (3, 4):
                self._names[user] = names[0 if user.args[1] == 3 else 1]
                self._used_statistics[user] = known[3]

    def running_statistics(self, op: Operation, mean: fx.Node, variance: fx.Node, eps: float, s: LogScale) -> None:
        """The same for the rules on tensors: one scale for all channels."""
        size = mean.meta["val"].numel()
        self.batch_statistics(op, mean, variance, eps, torch.tensor([self.labels.named(s)]).expand(size))

    def inexact(self, op: Operation) -> None:
        """Count a normaliser whose ε does not move."""
        self._inexact_here += 1

    def _read_placeholder(self, node: fx.Node, spec: Any, program: ExportedProgram) -> bool:
        """Give an input of the graph its labels; True if it is a parameter."""
        kind = spec.kind if spec is not None else None
        if kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = spec.target.removeprefix("model.")
            tensor = self._tensors[name]
            self._names[node] = name
            if tensor in self.weights:
                self._views[node] = (tensor, False)
                return True
            if not is_scalable(tensor):
                self._constants[node] = tensor.detach().cpu()
        constant = program.constants.get(spec.target) if kind == InputKind.CONSTANT_TENSOR else None
        if isinstance(constant, Tensor) and is_scalable(constant):
            values = constant.detach().cpu()
            self.put(node, None, torch.where((values == 0) | values.isinf(), ANY, FIXED_LABEL))
            return False
        if isinstance(constant, Tensor):
            self._constants[node] = constant.detach().cpu()
        self.put(node, None, _FIXED)
        return False

    def _read_outputs(self, node: fx.Node, program: ExportedProgram) -> None:
        """The logits do not move, nor does what is written back to a tensor, other than to running statistics."""
        outputs = cast(tuple[Any, ...], node.args[0])
        for value, spec in zip(outputs, program.graph_signature.output_specs, strict=True):
            if not isinstance(value, fx.Node) or not is_scalable(value.meta.get("val")):
                continue
            if spec.kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION"):
                if self._names.get(value) == str(spec.target).removeprefix("model."):
                    continue  # of a BatchNorm, to the statistics that it read
            labels = self.labels_of(value)
            self.labels.equal(labels, _FIXED)

    def _fix_statistics_of_other_uses(self, alive: set[fx.Node]) -> None:
        """Running statistics move for the BatchNorms that use them, not for whoever else reads or writes them."""
        readers = {node for node in alive if node not in self._norms and node.op != "output"}
        readers -= {node for node in self._used_statistics if node.target is operator.getitem}
        for node, labels in self._used_statistics.items():
            if not readers.isdisjoint(node.users):
                self.labels.equal(labels, _FIXED)

    def group(self) -> NeuronGroup:
        """Solve.

        Returns:
            The group of everything that was read.
        """
        scales = {name: self.weights.factors(parameter) for name, parameter in self.parameters.items()}
        self.weights.drop_what_moves_nothing([[labels for _, labels, _ in parts] for parts in scales.values() if parts])
        solutions: dict[int, LogScale] = {}
        units: dict[int, int] = {}

        def solution(label: int) -> LogScale:
            if label not in solutions:
                solutions[label] = self.system.solution(self.labels.expression(label))
            return solutions[label]

        for parts in scales.values():
            for _, labels, _ in parts:
                for label in labels.flatten().tolist():
                    for variable in solution(label).terms:
                        units.setdefault(variable, len(units))

        def matrix(labels: Tensor, sign: int = 1) -> scipy.sparse.csr_matrix:
            terms = [solution(label).terms for label in labels.flatten().tolist()]
            # (Statistics may move with what moves no parameter: that is left out.)
            known = [(i, units[v], sign * float(c)) for i, t in enumerate(terms) for v, c in t.items() if v in units]
            rows, columns, values = zip(*known, strict=True) if known else ((), (), ())
            return scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(terms), len(units)), dtype=float)

        return NeuronGroup(
            parameters=tuple(self.parameters),
            shapes=tuple(tuple(parameter.shape) for parameter in self.parameters.values()),
            units=len(units),
            factors={
                name: moving_factors(Factor(matrix(labels, sign), shape) for sign, labels, shape in parts)
                for name, parts in scales.items()
            },
            opaque=tuple(self._opaque.elements()),
            statistics=tuple(
                UnitStatistics(mean, variance, eps, matrix(self.labels.without_any(labels)))
                for mean, variance, eps, labels in self._statistics.values()
            ),
            inexact_normalizers=self._inexact,
        )

def _is_copy_or_transpose(operation: Operation) -> bool:
    """Whether an operation hands a parameter on as it is, or a matrix transposed."""
    value: Any = operation.node.meta.get("val")
    if not isinstance(value, Tensor) or not is_scalable(value):
        return False
    if operation.name in COPIES:
        return True
    if value.ndim != 2:
        return False
    if operation.name in ("t", "numpy_T", "mT", "adjoint"):
        return True
    if operation.name == "permute":
        return [dim % 2 for dim in operation.arguments["dims"]] == [1, 0]
    if operation.name == "transpose":
        return int(operation.arguments["dim0"]) % 2 != int(operation.arguments["dim1"]) % 2
    return False

