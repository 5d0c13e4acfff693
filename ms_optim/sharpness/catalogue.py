"""Catalogue: every measure of this room in one table, with its formula, its cost and what it does not depend on.

A row names a public function of :mod:`ms_optim.sharpness`, which is looked up when it is asked for; a row whose
function is not there is passed over by :func:`available`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from .value import Sharpness


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        name: What it is called in the table and on the command line.
        function_name: The public function that computes it.
        formula: In one line of text.
        cost: In passes over the data.
        invariances: What it does not depend on.
        source: Where it was defined.
        needs_labels: Whether the data have to be ``(inputs, targets)``.
        fixed: Options of the function that make it this measure.
    """

    name: str
    function_name: str
    formula: str
    cost: str
    invariances: str
    source: str
    needs_labels: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., float] | None:
        """The function, if this version has it."""
        found: Callable[..., float] | None = getattr(import_module(__package__), self.function_name, None)
        return found

    @property
    def exists(self) -> bool:
        """Whether it can be measured: the function is there and takes the options that are fixed."""
        return self.function is not None and all(self.accepts(option) for option in self.fixed)

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """What the function takes beside model and data."""
        assert self.function is not None, f"{self.function_name} is not there; see exists"
        parameters = list(inspect.signature(self.function).parameters.items())
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {name: parameter for name, parameter in parameters[2:] if parameter.kind in named}

    @property
    def required(self) -> list[str]:
        """The options that have to be given."""
        none = inspect.Parameter.empty
        return [n for n, option in self.options.items() if option.default is none and n not in self.fixed]

    def accepts(self, option: str) -> bool:
        """Whether the function takes an option.

        Args:
            option: Its name.

        Returns:
            Whether it may be passed (a fixed one stays as it is).
        """
        return option in self.options

    def __call__(self, model: nn.Module, data: Any, **options: Any) -> Sharpness:
        """Measure.

        Args:
            model: The model.
            data: As the function takes it.
            **options: Of the function.

        Returns:
            The value.
        """
        assert self.function is not None, f"{self.function_name} is not there; see exists"
        value = self.function(model, data, **{**options, **self.fixed})
        return value if isinstance(value, Sharpness) else Sharpness(value)

    def __str__(self) -> str:
        given = {key: value for key, value in self.fixed.items() if value is not None}
        quoted = {key: f'"{value}"' if isinstance(value, str) else value for key, value in given.items()}
        fixed = ", ".join(f"{key}={value}" for key, value in quoted.items())
        return f"{self.function_name}({fixed})" if fixed else self.function_name


_LAYERS = "rescalings of layers"
_UNITS = "rescalings of layers and of units"
_ALL = "every rescaling that keeps the function"
_NONE = "rotations of all weights only"
_TRACE = "K − 1 backpropagations to activations; r + 1 with columns=r"
_PRODUCTS = "steps × probes products with H"
_ASCENT = "a forward and a backward pass per step of the ascent"

_ROWS = (
    Measure(
        "trace",
        "trace_sharpness",
        formula="Σ_p c_p,  c_p = Tr H_p = (1/n) Σ_i ‖S_iᵀ J_{p,i}‖²",
        cost=_TRACE,
        invariances=_NONE,
        source="arXiv 2106.12612, Prop. 1",
    ),
    Measure(
        "minimum",
        "minimum_sharpness",
        formula="min_t Σ_p c_p e^{−2 (B t)_p}",
        cost="as the trace",
        invariances=_LAYERS,
        source="arXiv 2106.12612, Thm 1",
    ),
    Measure(
        "minimum_neuron",
        "minimum_sharpness",
        formula="min_t Σ_j DIAG[H]_j e^{−2 (B t)_j},  a scale for each unit",
        cost="as the diagonal",
        invariances=_UNITS,
        source="arXiv 2106.12612, generalised",
        fixed={"granularity": "neuron", "group": None},  # another group than that of the layers: its own to find
    ),
    Measure(
        "normalized",
        "normalized_sharpness",
        formula="Σ_p min_{s, s' > 0} ⟨s, DIAG[H_p] s'⟩ + ⟨s⁻¹, W_p² s'⁻¹⟩",
        cost="as the diagonal",
        invariances=_UNITS,
        source="arXiv 1901.04653",
    ),
    Measure(
        "renyi",
        "renyi_sharpness",
        formula="−log( Tr |H|^a / (Tr H)^a ) / (1 − a)",
        cost=_PRODUCTS,
        invariances="multiples of the loss; of each layer's value: rescalings of layers",
        source="arXiv 2510.07758",
        needs_labels=True,
    ),
    Measure(
        "universal",
        "universal_sharpness",
        formula="φ( E_v ψ( ½ vᵀ H v ) )",
        cost="a product with H per probe",
        invariances="those of the member (φ, ψ, μ)",
        source="arXiv 2406.03682",
        needs_labels=True,
    ),
    Measure(
        "frobenius",
        "frobenius_sharpness",
        formula="‖H‖_F² = E_v ‖H v‖²",
        cost="a product with H per probe",
        invariances=_NONE,
        source="arXiv 2406.03682",
        needs_labels=True,
    ),
    Measure(
        "logdet",
        "logdet_sharpness",
        formula="log det(I + H₊ / ε)",
        cost=_PRODUCTS,
        invariances=_NONE,
        source="arXiv 2406.03682",
        needs_labels=True,
    ),
    Measure(
        "top_eigenvalue",
        "top_eigenvalue",
        formula="λ_max(H) = max_v vᵀ H v / ‖v‖²",
        cost="10 to 40 products with H",
        invariances=_NONE,
        source="Lanczos",
        needs_labels=True,
    ),
    Measure(
        "riemannian",
        "riemannian_sharpness",
        formula="max_ξ |ξᵀ H ξ| / (Σ_p ‖ξ_p‖² / ‖W_p‖²)",
        cost="10 to 40 products with H",
        invariances=_LAYERS,
        source="arXiv 1902.02434",
        needs_labels=True,
    ),
    Measure(
        "sam",
        "sam_sharpness",
        formula="max_{‖ε‖ ≤ ρ} L(W + ε) − L(W)",
        cost=_ASCENT,
        invariances=_NONE,
        source="arXiv 2010.01412",
        needs_labels=True,
    ),
    Measure(
        "adaptive",
        "adaptive_sharpness",
        formula="max_{‖T⁻¹ ε‖ ≤ ρ} L(W + ε) − L(W),  T = |W|",
        cost=_ASCENT,
        invariances=_ALL,
        source="arXiv 2102.11600",
        needs_labels=True,
    ),
    Measure(
        "fisher_rao",
        "fisher_rao_norm",
        formula="⟨W, I(W) W⟩ = E ⟨W, ∇ℓ⟩²",
        cost="a Jacobian product: about 2 forward passes",
        invariances=_ALL,
        source="arXiv 1711.01530",
    ),
    Measure(
        "pac_bayes",
        "pac_bayes_flatness",
        formula="1/σ²,  σ = sup{ σ : E_u err(W + σ u) − err(W) ≤ 0.1 }",
        cost="a forward pass per probe and step of the search",
        invariances="nothing; magnitude-aware with ε = 0: " + _ALL,
        source="arXiv 1912.02178",
        needs_labels=True,
    ),
    Measure(
        "bn_invariant",
        "bn_invariant_sharpness",
        formula="max_{‖V⁻¹ ε‖ ≤ ρ} L(W + ε) − L(W),  V = ‖w_f‖ in front of a normaliser, else 1",
        cost=_ASCENT,
        invariances="scales of weights in front of a normaliser",
        source="arXiv 2101.02944",
        needs_labels=True,
    ),
)

#: Name → measure, in the order of the table; :func:`available` leaves out what this version does not have.
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _ROWS}


def available() -> dict[str, Measure]:
    """The measures whose function this version has.

    Returns:
        Name → measure, in the order of the table.
    """
    return {name: measure for name, measure in MEASURES.items() if measure.exists}


def as_markdown(measures: Iterable[Measure] | None = None) -> str:
    """The table as Markdown.

    Args:
        measures: Which; by default those that are available.

    Returns:
        Its lines: name, formula, cost, invariances, source.
    """
    rows = [("measure", "formula", "cost", "does not depend on", "labels", "source")]
    for measure in available().values() if measures is None else measures:
        labels = "yes" if measure.needs_labels else "no"
        row = (f"`{measure}`", measure.formula, measure.cost, measure.invariances, labels, measure.source)
        # A bar ends a cell, in a formula as elsewhere.
        rows.append(tuple(text.replace("|", "\\|") for text in row))  # type: ignore[arg-type]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])
