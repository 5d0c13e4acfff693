"""An operation of the graph, as a scale rule sees it: arguments by name, and the log-scales of inputs and outputs."""

from __future__ import annotations

import math
import operator
from typing import Any, Protocol

from torch import Tensor, fx

from .linear_system import FIXED, LinearSystem, LogScale


def operator_name(node: fx.Node) -> str:
    """The key of a node's operator in the table.

    Args:
        node: A call in the graph.

    Returns:
        ``"relu"``, ``"library.name"``, ``"getitem"``, or a Python function with its module.
    """
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).replace("::", ".").removeprefix("aten.")
    # With its module: Python's operator.add, on symbolic numbers, is not torch's add.
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"


def fits_any_scale(value: Any) -> bool:
    """Whether a number (or an absent argument) equals every positive multiple of itself: 0, ∞, −∞.

    Args:
        value: An argument.

    Returns:
        True for ``None``, zero and the infinities.
    """
    return value is None or (isinstance(value, (int, float)) and (value == 0 or math.isinf(value)))


def is_scalable(value: Any) -> bool:
    """Whether a traced value is a tensor that can carry a scale: real or complex floating-point.

    Args:
        value: The value of a node.

    Returns:
        False for integers, booleans, symbolic numbers and everything else that is not such a tensor.
    """
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def is_moving(argument: Any) -> bool:
    """Whether an argument is a tensor that can carry a scale.

    Args:
        argument: An argument of an operation.

    Returns:
        False for numbers, and for nodes whose value is not scalable.
    """
    return isinstance(argument, fx.Node) and is_scalable(argument.meta.get("val"))


class GraphScales(Protocol):
    """What a rule may ask of the graph it is applied to."""

    system: LinearSystem

    def scale_of(self, node: fx.Node, index: int | None = None) -> LogScale:
        """The log-scale of a node's tensor, or of one of its outputs."""

    def running_statistics(self, op: Operation, mean: fx.Node, variance: fx.Node, eps: float, s: LogScale) -> None:
        """Running statistics of an input with log-scale s are used by a BatchNorm."""

    def inexact(self, op: Operation) -> None:
        """The operation is scale-invariant up to an ε, in evaluation mode too."""


class Operation:
    """One call in the graph: its arguments by the names of the operator's schema, and their scales.

    Attributes:
        node: The node of the graph.
        name: The operator without overload, and without its namespace if that is ``aten``.
        arguments: Argument name -> value (tensors are nodes), defaults included.
    """

    def __init__(self, node: fx.Node, graph: GraphScales) -> None:
        self.node = node
        self.graph = graph
        self.system = graph.system
        self.name = operator_name(node)
        schema = getattr(node.target, "_schema", None)
        declared = schema.arguments if schema is not None else []
        given = dict(zip((argument.name for argument in declared), node.args, strict=False)) | dict(node.kwargs)
        self.arguments: dict[str, Any] = {a.name: given.get(a.name, a.default_value) for a in declared}

    @property
    def inputs(self) -> list[Any]:
        """All arguments in order, with lists of tensors opened."""
        values: list[Any] = []
        for value in self.arguments.values():
            values.extend(value if isinstance(value, (list, tuple)) else [value])
        return values

    @property
    def first(self) -> Any:
        """The first argument, whatever the schema calls it."""
        return next(iter(self.arguments.values()), None)

    def scale(self, value: Any) -> LogScale:
        """The log-scale of an argument's value: 0 for numbers, integers and absent tensors."""
        return self.graph.scale_of(value) if isinstance(value, fx.Node) else FIXED

    @property
    def output(self) -> LogScale:
        """The log-scale of the result, of the first where there are several."""
        return self.outputs[0]

    @property
    def results(self) -> list[Any]:
        """The traced values of all results."""
        value = self.node.meta.get("val")
        return list(value) if isinstance(value, (list, tuple)) else [value]

    @property
    def outputs(self) -> list[LogScale]:
        """The log-scales of all results."""
        if isinstance(self.node.meta.get("val"), (list, tuple)):
            return [self.graph.scale_of(self.node, index) for index in range(len(self.results))]
        return [self.graph.scale_of(self.node)]
