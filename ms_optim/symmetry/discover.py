"""Discovery: from a model and one batch to its scale group.

The model is exported to a graph of torch's operations, twice: in evaluation mode and in training mode, because a path
that exists in one of them only (an auxiliary head) constrains the same parameters.  Each operation adds its rule's
equations; on top of them

    s = 0 for inputs, constants, buffers (running statistics excepted), logits and frozen parameters,

and a parameter has one log-scale however many names and uses it has; one without any use does not move.  The null space
of all this, restricted to parameters and running statistics, is the group.

The function that is kept is the logits.  Whatever else a model returns beside them is not read.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.modules.batchnorm import _BatchNorm

from ..batch import Batch, logits_of
from ..errors import MsOptimError, NoEffectWarning, SymmetryError
from .group import Opaque, ScaleGroup, Statistics
from .invariance import set_training, undisturbed
from .linear_system import FIXED, LinearSystem, LogScale, integer_basis
from .operation import Operation, fits_any_scale, is_scalable
from .rules import apply_rule


def scale_symmetries(model: nn.Module, example_inputs: Any) -> ScaleGroup:
    """Find the positive rescalings of parameters that leave the logits unchanged: the null space of the graph's rules.

    Nothing is disturbed: modes, buffers, gradients, ``requires_grad`` and random streams are as before, also after an
    error.

    Args:
        model: Any module that ``torch.export`` can read, on any device; parameters with ``requires_grad=False`` stay.
        example_inputs: One batch on the model's device: a tensor, a dictionary, or ``(inputs, targets)``.

    Returns:
        The group, with integer generators.

    Raises:
        SymmetryError: If the model cannot be exported.

    Warns:
        NoEffectWarning: If there is no symmetry.

    >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    >>> scale_symmetries(net, torch.ones(1, 3)).generators
    tensor([[ 1., -1.]], dtype=torch.float64)
    """
    batch = Batch.of(example_inputs, model)
    discovery = _Discovery(model)
    with undisturbed(model):
        for mode in ("evaluation", "training"):
            set_training(model, mode == "training")
            discovery.read(exported(model, batch, mode))
    group = discovery.group()
    if not len(group):
        blocked = Counter(o.operation for o in group.opaque)
        names = ", ".join(f"{name} ({count} x)" for name, count in blocked.items())
        warnings.warn(
            f"{type(model).__name__} has no scale symmetry, so balancing changes nothing; opaque operations: "
            f"{names or 'none, its constants and frozen parameters fix every scale'}",
            NoEffectWarning,
            stacklevel=2,
        )
    return group


class _LogitsAlone(nn.Module):
    """The model with its logits as only output, so that no type of the model's own has to be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return logits_of(self.model(*args, **kwargs))


def exported(model: nn.Module, batch: Batch, mode: str) -> ExportedProgram:
    """The functional graph of the model in its present modes.

    Args:
        model: The model.
        batch: The batch it is called with.
        mode: The name of the modes, for a message.

    Returns:
        The program after decomposition, with the logits as only output.

    Raises:
        SymmetryError: If it cannot be exported.
    """
    try:
        # Gradients on: without them some modules take a fused path in evaluation mode.
        with warnings.catch_warnings(), torch.enable_grad(), _known_momentum(model):
            warnings.simplefilter("ignore")
            program = torch.export.export(_LogitsAlone(model), (batch.args, batch.kwargs), strict=False)
            # Before this, in-place operations are still in the graph, and values change behind the rules' back.
            return program.run_decompositions({})
    except MsOptimError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SymmetryError(
            f"{type(model).__name__} cannot be read by torch.export in {mode} mode: {type(error).__name__}: "
            f"{lines[0] if lines else 'no message'}; rewrite control flow that depends on values, pass the module "
            "inside a DistributedDataParallel or torch.compile wrapper, try two or more samples on the model's device, "
            "or pass group= from a model with the same parameters"
        ) from error


@contextmanager
def _known_momentum(model: nn.Module) -> Iterator[None]:
    """Give a BatchNorm that averages over all batches a number: its own depends on a value, and no scale on it."""
    averaging = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is None]
    for module in averaging:
        module.momentum = 0.1
    try:
        yield
    finally:
        for module in averaging:
            module.momentum = None


class _Discovery:
    """The equations of one model, over all the graphs that were read; what rules ask of a graph is answered here."""

    def __init__(self, model: nn.Module) -> None:
        self.system = LinearSystem()
        self.parameters = dict(model.named_parameters())
        self._scales = {id(p): self.system.variable(solve_first=True) for p in self.parameters.values()}
        self._buffers = {id(b): self.system.variable(solve_first=True) for b in model.buffers()}
        # Every name of a tensor, tied ones included: parameters are one variable by identity.
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        self._used: set[int] = set()
        self._nodes: dict[tuple[fx.Node, int | None], LogScale] = {}
        self._buffer_names: dict[fx.Node, str] = {}
        self._statistics: dict[tuple[int, int], tuple[str, str, float]] = {}
        self._norms: set[fx.Node] = set()
        self._variances: set[fx.Node] = set()
        self._opaque: Counter[Opaque] = Counter()
        self._inexact = 0
        self._inexact_here = 0

    def read(self, program: ExportedProgram) -> None:
        """Add the equations of one graph.

        Args:
            program: An exported program after decomposition.
        """
        self._nodes, self._buffer_names, self._norms, self._variances = {}, {}, set(), set()
        self._inexact_here = 0
        opaque: Counter[Opaque] = Counter()
        # Only what depends on a parameter can block a scale: opaque operations on inputs alone are not worth a word.
        moving: set[fx.Node] = set()
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        # What does not reach an output is no part of the function, and its parameters are unused.
        alive = ancestors(program.graph)
        for node in program.graph.nodes:
            if node not in alive:
                continue
            if node.op == "placeholder":
                if self._read_placeholder(node, specs.get(node.name), program):
                    moving.add(node)
            elif node.op == "call_function":
                operation = Operation(node, self)
                reason = apply_rule(operation)
                if not moving.isdisjoint(node.all_input_nodes):
                    moving.add(node)
                    if reason is not None:
                        opaque[Opaque(str(node.target), module_path(node), reason)] += 1
            elif node.op == "output":
                self._read_outputs(node, program)
        self._fix_variances_of_other_uses(alive)
        # The same operation in both graphs is one entry.
        self._opaque |= opaque
        self._inexact = max(self._inexact, self._inexact_here)

    def scale_of(self, node: fx.Node, index: int | None = None) -> LogScale:
        """The log-scale of a node's tensor, or of one of its outputs.

        Args:
            node: A node of the graph that is being read.
            index: Which output, of a node with several.

        Returns:
            The log-scale; 0 for what is not a floating-point tensor.
        """
        if node.target is operator.getitem:
            source, position = node.args
            return self.scale_of(cast(fx.Node, source), cast(int, position))
        value: Any = node.meta.get("val")
        if not is_scalable(value if index is None else value[index]):
            return FIXED
        if (node, index) not in self._nodes:
            self._nodes[node, index] = self.system.variable()
        return self._nodes[node, index]

    def running_statistics(self, op: Operation, mean: fx.Node, variance: fx.Node, eps: float, s: LogScale) -> None:
        """A BatchNorm uses running statistics: they move with its input, if they are buffers; else nothing moves.

        Args:
            op: The BatchNorm.
            mean: running_mean.
            variance: running_var.
            eps: ε.
            s: Log-scale of the input.
        """
        names = [self._buffer_names.get(node, "") for node in (mean, variance)]
        tensors = [self._tensors.get(name) for name in names]
        if not all(tensor is not None and id(tensor) in self._buffers for tensor in tensors):
            self.system.equal(FIXED, s, self.scale_of(mean), self.scale_of(variance))
            return
        key = (id(tensors[0]), id(tensors[1]))
        known = self._statistics.setdefault(key, (names[0], names[1], eps))
        self.system.equal(self.scale_of(mean), s)
        self.system.equal(self.scale_of(variance), s * 2)
        if known[2] != eps:
            # var + ε and var + ε' cannot both scale.
            self.system.equal(s, FIXED)
        self._norms.add(op.node)
        self._variances.add(variance)
        # In training mode a later use of the same statistics reads what this one returns: outputs 3 and 4.
        for user in op.node.users:
            if user.target is operator.getitem and user.args[1] in (3, 4):
                self._buffer_names[user] = names[0 if user.args[1] == 3 else 1]
                if user.args[1] == 4:
                    self._variances.add(user)

    def inexact(self, op: Operation) -> None:
        """Count a normaliser whose ε does not move.

        Args:
            op: The normaliser.
        """
        self._inexact_here += 1

    def group(self) -> ScaleGroup:
        """Solve.

        Returns:
            The group of everything that was read.
        """
        statistic = {identity for key in self._statistics for identity in key}
        self.system.equal(FIXED, *(s for identity, s in self._buffers.items() if identity not in statistic))
        for parameter in self.parameters.values():
            if id(parameter) not in self._used or not parameter.requires_grad:
                self.system.equal(self._scales[id(parameter)], FIXED)
        p = len(self.parameters)
        watched = [self._scales[id(parameter)] for parameter in self.parameters.values()]
        watched += [self._buffers[mean] for mean, _ in self._statistics]
        matrix = integer_basis(self.system, watched, leading=p)
        statistics = tuple(
            Statistics(mean, variance, eps, matrix[:, p + i].clone())
            for i, (mean, variance, eps) in enumerate(self._statistics.values())
        )
        return ScaleGroup(
            parameters=tuple(self.parameters),
            generators=matrix[:, :p].clone(),
            opaque=tuple(self._opaque.elements()),
            statistics=statistics,
            shapes=tuple(tuple(parameter.shape) for parameter in self.parameters.values()),
            inexact_normalizers=self._inexact,
        )

    def _read_placeholder(self, node: fx.Node, spec: Any, program: ExportedProgram) -> bool:
        """Give an input of the graph its scale; True if it is a parameter."""
        kind = spec.kind if spec is not None else None
        if kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = spec.target.removeprefix("model.")
            tensor = self._tensors[name]
            self._buffer_names[node] = name
            self._nodes[node, None] = (self._scales | self._buffers)[id(tensor)]
            if kind == InputKind.PARAMETER:
                self._used.add(id(tensor))
            return kind == InputKind.PARAMETER
        constant = program.constants.get(spec.target) if kind == InputKind.CONSTANT_TENSOR else None
        if isinstance(constant, Tensor) and all(fits_any_scale(c) for c in constant.unique().tolist()):
            return False
        self.system.equal(self.scale_of(node), FIXED)
        return False

    def _read_outputs(self, node: fx.Node, program: ExportedProgram) -> None:
        """The logits do not move; what is written back to a tensor of the model has that tensor's scale."""
        outputs = cast(tuple[Any, ...], node.args[0])
        for value, spec in zip(outputs, program.graph_signature.output_specs, strict=True):
            if not isinstance(value, fx.Node):
                continue
            target = FIXED
            if spec.kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION"):
                tensor = self._tensors[str(spec.target).removeprefix("model.")]
                target = (self._scales | self._buffers)[id(tensor)]
            if is_scalable(value.meta.get("val")):
                self.system.equal(self.scale_of(value), target)

    def _fix_variances_of_other_uses(self, alive: set[fx.Node]) -> None:
        """A running variance moves as var + ε: whoever else reads it would see something other than a scale."""
        # What is written back, or is a logit, has its equation from the outputs.
        readers = {node for node in alive if node not in self._norms and node.op != "output"}
        for variance in self._variances:
            if not readers.isdisjoint(variance.users):
                self.system.equal(self.scale_of(variance), FIXED)


def ancestors(graph: fx.Graph) -> set[fx.Node]:
    """The output and everything it depends on.

    Args:
        graph: The graph.

    Returns:
        Its nodes that are alive.
    """
    alive: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or not alive.isdisjoint(node.users):
            alive.add(node)
    return alive


def module_path(node: fx.Node) -> str:
    """Path of the innermost module a node was called in, without the wrapper's prefix.

    Args:
        node: The node.

    Returns:
        The path; empty for the model itself.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("model").removeprefix(".")
