"""Measurement: what was found for each layer and by each measure, and how it reads as text, JSON and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..balancing import Balance
from ..curvature import LayerTraces
from ..sharpness.value import Sharpness
from .table import number, table, with_error


@dataclass(frozen=True)
class Layer:
    """One parameter tensor.

    Attributes:
        name: Its name.
        shape: Its shape.
        trace: c_p, the trace of its block.
        standard_error: Of the trace: 0 if it is exact, NaN if unknown.
        kind: ``"hessian"`` or ``"gauss-newton"``.
        alpha: α* = e^{a}, the factor that takes it to the representative; NaN where the symmetries are not known.
        share: c_p e^{−2a} / MS, its share of minimum sharpness.
    """

    name: str
    shape: tuple[int, ...]
    trace: float
    standard_error: float
    kind: str
    alpha: float
    share: float

    @property
    def balanced(self) -> float:
        """c_p e^{−2a}, the trace at the representative."""
        return self.trace / self.alpha**2


@dataclass(frozen=True)
class Outcome:
    """What one measure gave.

    Attributes:
        formula: Of the measure.
        value: Its value; ``None`` if it could not be measured.
        reason: Why not.
        seconds: How long it took; NaN if it came with the table of layers.
    """

    formula: str
    value: Sharpness | None = None
    reason: str = ""
    seconds: float = math.nan


@dataclass(frozen=True)
class Measurement:
    """Everything that ``ms-optim measure`` has to say.

    Attributes:
        model: Facts about the model.
        data: The data, in words.
        options: What was asked for, in plain values.
        layers: One entry per parameter.
        traces: The traces that they are made of.
        measures: Name → outcome.
        notes: What the reader has to know.
    """

    model: dict[str, Any]
    data: str
    options: dict[str, Any]
    layers: tuple[Layer, ...]
    traces: LayerTraces
    measures: dict[str, Outcome] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The two tables."""
        exact = all(layer.standard_error == 0 for layer in self.layers)
        columns = f"{self.traces.backpropagations:.4g} columns per sample"
        how = f"exact, from {columns}" if exact else f"from {columns}, some of them signed"
        parts = [f"data: {self.data}\n{self.traces.samples:,} samples, traces {how}", self._layer_table()]
        if self.measures:
            parts.append(self._measure_table())
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)

    def _layer_table(self) -> str:
        rows = [
            [
                layer.name,
                "×".join(map(str, layer.shape)) or "scalar",
                with_error(layer.trace, layer.standard_error),
                layer.kind,
                number(layer.alpha),
                number(100 * layer.share, 3),
            ]
            for layer in self.layers
        ]
        return table(["layer", "shape", "trace", "kind", "α*", "share %"], rows, right=("α*", "share %"))

    def _measure_table(self) -> str:
        rows, notes = [], []
        for name, outcome in self.measures.items():
            value = outcome.value
            text = "not measured" if value is None else with_error(value, value.standard_error, 6)
            rows.append([name, text, outcome.formula])
            said = (outcome.reason,) if value is None else value.notes
            notes += [f"  {name}: {note}" for note in said]
        return "\n".join([table(["measure", "value", "formula"], rows), *notes])

    def as_json(self) -> dict[str, Any]:
        """Plain containers: all of it.

        Returns:
            What ``--json`` writes.
        """
        return {
            "ms_optim": __version__,
            "torch": torch.__version__,
            "model": self.model,
            "data": {"description": self.data, "samples": self.traces.samples},
            "options": self.options,
            "notes": list(self.notes),
            "measures": {name: _outcome(outcome) for name, outcome in self.measures.items()},
            "layers": [
                {
                    **{"name": layer.name, "shape": list(layer.shape), "kind": layer.kind},
                    **{"trace": layer.trace, "standard_error": layer.standard_error},
                    **{"alpha": layer.alpha, "share": layer.share},
                }
                for layer in self.layers
            ],
        }

    def as_rows(self) -> tuple[list[str], list[list[Any]]]:
        """A row per layer, with a column for every measure that has a value for each layer.

        Returns:
            The header and the rows of ``--csv``.
        """
        names = {layer.name for layer in self.layers}
        parts = {
            name: outcome.value.layers
            for name, outcome in self.measures.items()
            if name != "trace" and outcome.value is not None and not names.isdisjoint(outcome.value.layers)
        }
        header = ["name", "shape", "entries", "kind", "trace", "standard_error", "alpha", "share", *parts]
        rows = [
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                math.prod(layer.shape),
                layer.kind,
                layer.trace,
                layer.standard_error,
                layer.alpha,
                layer.share,
                *(values.get(layer.name) for values in parts.values()),
            ]
            for layer in self.layers
        ]
        return header, rows


def layers_of(model: nn.Module, traces: LayerTraces, found: Balance | None) -> tuple[Layer, ...]:
    """One entry per parameter that was measured.

    Args:
        model: The model.
        traces: Of its parameters.
        found: Its balance; ``None`` if its symmetries could not be read.

    Returns:
        The layers, in the model's order.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = math.nan if found is None else found.minimum_sharpness
    layers = []
    for name, trace in traces.items():
        a = math.nan if found is None else found.log_scale[name]
        share = trace * math.exp(-2 * a) / total if total > 0 else math.nan
        error, kind = traces.standard_error.get(name, math.nan), traces.kind.get(name, "")
        layers.append(Layer(name, shapes[name], trace, error, kind, math.exp(a), share))
    return tuple(layers)


def scale_free_note(found: Balance) -> list[str]:
    """What is to be known of weights whose scale means nothing: with them, minimum sharpness may exceed the trace.

    Args:
        found: The balance of the model.

    Returns:
        One note, or none.
    """
    if not found.free:
        return []
    return [
        f"{len(found.free)} parameters in front of a normaliser may have any scale: they are held at unit norm per "
        "output on average, so that the minimum may exceed the trace"
    ]


def minimum_of(traces: LayerTraces, found: Balance) -> Sharpness:
    """Minimum sharpness from the traces of the layers, as the measure ``minimum`` has it.

    Args:
        traces: Of all parameters.
        found: The balance of the model.

    Returns:
        The minimum. By the envelope theorem its derivative in c_p is w_p = e^{−2a_p}, so that Σ w_p se(c_p) bounds the
        standard error, to first order.
    """
    weights = found.weights
    error = sum(weights[name] * value for name, value in traces.standard_error.items())
    layers = {name: value * weights[name] for name, value in traces.items()}
    return Sharpness(found.minimum_sharpness, error, layers, [*found.notes, *scale_free_note(found)])


def _outcome(outcome: Outcome) -> Mapping[str, Any]:
    value = outcome.value
    if value is None:
        return {"value": None, "reason": outcome.reason, "formula": outcome.formula}
    return {
        **{"value": float(value), "standard_error": value.standard_error, "formula": outcome.formula},
        **{"notes": list(value.notes), "details": value.details, "layers": value.layers, "seconds": outcome.seconds},
    }
