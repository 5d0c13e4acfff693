"""The request: what is to be measured and how, and the sums that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import CurvatureError, UnsupportedError
from .evaluation import Statistics
from .losses.loss import Loss

Columns = int | Literal["rank"] | None


@dataclass
class Request:
    """What is to be measured.

    Attributes:
        loss: The loss.
        entries: Diagonals rather than traces.
        columns: ``None``: exact; ``"rank"``; or r.
        probes: m, independent signed columns for what the r leave.
        tolerance: The relative standard error to reach by adding columns; ``None``: no adaptation.
        statistics: BatchNorm's.
        generator: Draws the signs.
        generic: Whether parameters without a rule go through the generic path.
        max_memory: Bytes; ``None``: by the device; ``"pass"``: about what autograd keeps of one pass over the batch.
        progress: Whether to show progress; ``None``: on a terminal, when it takes long.
    """

    loss: Loss
    entries: bool
    columns: Columns
    probes: int
    tolerance: float | None
    statistics: Statistics
    generator: torch.Generator
    generic: bool = True
    max_memory: int | Literal["pass"] | None = None
    progress: bool | None = None


def checked_request(request: Request) -> Request:
    """The request, once its numbers are in range.

    Args:
        request: What a user asked for.

    Returns:
        The same.

    Raises:
        ValueError: If a number is not.
    """
    columns, probes, tolerance, memory = request.columns, request.probes, request.tolerance, request.max_memory
    counted = {"columns": columns, "probes": probes, "max_memory": memory}
    for name, value in counted.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        word = {"columns": "rank", "max_memory": "pass"}.get(name)
        if not (whole or (value is None and name != "probes") or (word is not None and value == word)):
            other = "" if word is None else f", {word!r} or None"
            raise ValueError(f"{name} must be a whole number{other}, got {value!r}")
    if not (tolerance is None or isinstance(tolerance, Real)):
        raise ValueError(f"tolerance must be a positive number or None, got {tolerance!r}")
    if isinstance(columns, Integral) and columns < 0:
        raise ValueError(f"columns must be >= 0, 'rank' or None, got {columns!r}; None is exact")
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}; one signed column per sample is the least")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance}; None does not adapt")
    if tolerance is not None and columns == "rank":
        raise ValueError("tolerance adds columns until a standard error is small; columns='rank' leaves none to add")
    if isinstance(memory, Integral) and memory < 1:
        raise ValueError(f"max_memory must be a positive number of bytes, got {memory}; None asks the device")
    # NumPy's integers are not Python's, and a scheme tells r from None and "rank" by its type.
    return replace(
        request,
        columns=int(columns) if isinstance(columns, Integral) else columns,
        probes=int(probes),
        max_memory=int(memory) if isinstance(memory, Integral) else memory,
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that curvature is computed for: name → parameter with ``requires_grad``, each tensor once.

    Args:
        model: The model.

    Returns:
        The parameters, in the model's order.

    Raises:
        CurvatureError: If there is none.
        UnsupportedError: If one is complex.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise CurvatureError(
            f"{type(model).__name__} has no parameter with requires_grad=True; call model.requires_grad_() "
            "to measure a frozen copy"
        )
    for name, parameter in found.items():
        if parameter.is_complex():
            raise UnsupportedError(
                f"parameter {name} {tuple(parameter.shape)} is complex ({parameter.dtype}), for which no trace is "
                "defined here; hold it as two real tensors (torch.view_as_complex in the forward pass), or "
                "freeze it (requires_grad_(False)) to leave it out"
            )
    return found


@dataclass
class Totals:
    """Sums over the samples seen so far.

    Attributes:
        values: Parameter name → the sum: a scalar in float64 for traces, the parameter's shape for diagonals.
        variances: Parameter name → the variance of that sum over the signs, of the same shape; ``None``: not known.
        hessian: Parameter name → whether its Hessian block is its Gauss-Newton block.
        generic: The names that had no rule.
        samples: n.
        backpropagations: Columns sent, times samples.
    """

    values: dict[str, Tensor]
    variances: dict[str, Tensor] | None
    hessian: dict[str, bool]
    generic: set[str] = field(default_factory=set)
    samples: int = 0
    backpropagations: float = 0.0

    def copy(self) -> Totals:
        """The same sums in containers of their own; the tensors are shared, and never written to."""
        variances = None if self.variances is None else dict(self.variances)
        return replace(
            self, values=dict(self.values), variances=variances, hessian=dict(self.hessian), generic=set(self.generic)
        )
