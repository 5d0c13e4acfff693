"""Rebalance: discover, trace, solve, rescale — from any network to its canonical representative, in one call."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import nn
from torch.optim import Optimizer

from ..batch import peek
from ..curvature import hessian_diagonal, hessian_trace
from ..errors import SymmetryError
from ..symmetry import NeuronGroup, ScaleGroup, neuron_symmetries, scale_symmetries
from .neurons import NeuronBalance, balance_neurons
from .solve import Balance, balance

Granularity = Literal["layer", "neuron"]


@overload
def rebalance_(
    model: nn.Module,
    data: Any,
    optimizer: Optimizer | None = None,
    columns: int | None = None,
    group: ScaleGroup | None = None,
    gauge: float = 0.0,
    granularity: Literal["layer"] = "layer",
) -> Balance: ...


@overload
def rebalance_(
    model: nn.Module,
    data: Any,
    optimizer: Optimizer | None = None,
    columns: int | None = None,
    group: NeuronGroup | None = None,
    gauge: float = 0.0,
    *,
    granularity: Literal["neuron"],
) -> NeuronBalance: ...


def rebalance_(
    model: nn.Module,
    data: Any,
    optimizer: Optimizer | None = None,
    columns: int | None = None,  # r: exact columns of S per sample; None: all
    group: ScaleGroup | NeuronGroup | None = None,
    gauge: float = 0.0,  # κ
    granularity: Granularity = "layer",
) -> Balance | NeuronBalance:
    """Rescale the model to the equivalent network with the smallest Hessian trace; the function is unchanged.

    The same as ``hessian_trace``, ``balance`` and ``group.rescale_`` one after the other; weights, running statistics,
    gradients and the optimizer's state move together, or, if anything raises, not at all.

    Args:
        model: The model; changed in place.
        data: Inputs or batches, as in :func:`ms_optim.hessian_trace`.
        optimizer: An optimizer whose state moves along.
        columns: ``None`` is exact; ``r`` samples the traces.
        group: The scale group; discovered on the first batch if ``None``.
        gauge: κ ∈ [0, 1], as in :func:`ms_optim.balance`; for single units 0 or 1.
        granularity: What is rescaled: whole layers, or single hidden units (``hessian_diagonal``, ``balance_neurons``).

    Returns:
        The balance that was applied: ``.log_scale`` says by how much each parameter, or entry, was rescaled.

    Raises:
        SymmetryError: If the model cannot be read, or the group is another model's or of another granularity.
        CurvatureError: If a parameter has no curvature rule, or a trace is not finite.
        UnsupportedError: If the optimizer holds state of a kind that is not known to transform.

    Source: arXiv 2106.12612, Thm 1.
    """
    example, data = peek(data, model)
    if granularity == "neuron":
        units = neuron_symmetries(model, example) if group is None else group
        if not isinstance(units, NeuronGroup):
            raise SymmetryError("granularity='neuron' rescales by a NeuronGroup; pass what neuron_symmetries returns")
        balanced = balance_neurons(model, hessian_diagonal(model, data, columns), units, gauge)
        bounded = units.bound(model, balanced.t)
        balanced = balanced if bool((bounded == balanced.t).all()) else balanced.at(units, bounded)
        units.rescale_(model, bounded, optimizer)
        return balanced
    layers = scale_symmetries(model, example) if group is None else group
    if not isinstance(layers, ScaleGroup):
        raise SymmetryError("granularity='layer' rescales by a ScaleGroup; pass what scale_symmetries returns")
    traces = hessian_trace(model, data, columns)
    found = balance(model, traces, layers, gauge)
    t = layers.bound(model, found.t)
    found = found if bool((t == found.t).all()) else found.at(t)
    layers.rescale_(model, t, optimizer)
    return found
