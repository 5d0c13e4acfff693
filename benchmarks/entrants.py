"""Contenders: an optimizer and what it searches; and who takes part in the comparison at equal budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A method, and what it searches.

    Attributes:
        optimizer: Its name.
        scalar: The argument that it searches.
        values: Those that it tries, rising.
        options: Its other arguments.
        epochs: A factor.
        shown: The scalar's symbol.
    """

    optimizer: str
    scalar: str
    values: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 1
    shown: str = "ρ"

    def value(self, settings: Mapping[str, Any]) -> float:
        """The scalar in the settings of a training."""
        value: float = settings["options"][self.scalar]
        return value


_RADII = (0.03, 0.06, 0.12, 0.24, 0.48)
_ADAPTIVE = (0.25, 0.5, 1.0, 2.0, 4.0)
_ELEMENTS = (0.5, 1.0, 2.0, 4.0, 8.0)
_LAYERS = (0.0025, 0.005, 0.01, 0.02, 0.04)
# Options in full, defaults included: a training is its settings, whatever the package's defaults will be.
ROWS = {"rebalance": "rows", "refresh_every": 100, "columns": 2}
TRACE = {**ROWS, "gauge": 0.0, "gradient": "trace"}
SGD, LONGER, MSSAM = "SGD", "SGD, twice the epochs", "MSSAM"
#: Those that the report has a row for; the others are there if they did not work.
OURS = (MSSAM, "ASAM, layer, at rows", "MSRegularizedSGD, trace")
SHOWN = (LONGER, *OURS, "MSSAM, κ = 0", "MSRegularizedSGD, noise")
#: Those of which the best one is the reference.
BASELINES = ("SAM", "ASAM, official", "ASAM, elementwise", "ASAM, layer")
#: The columns of the table at the top of the report.
OVERVIEW = (SGD, LONGER, *BASELINES, *OURS)
CONTENDERS: dict[str, Contender] = {
    SGD: Contender("SGD", "momentum", (0.0, 0.5, 0.8, 0.9, 0.95), shown="momentum"),
    LONGER: Contender("SGD", "momentum", (0.0, 0.5, 0.8, 0.9, 0.95), epochs=2, shown="momentum"),
    "SAM": Contender("SAM", "rho", _RADII),
    "ASAM, official": Contender("ASAM", "rho", _ADAPTIVE, {"operator": "official", "eta": 0.01}),
    "ASAM, elementwise": Contender("ASAM", "rho", _ELEMENTS, {"operator": "elementwise"}),
    "ASAM, layer": Contender("ASAM", "rho", _LAYERS, {"operator": "layer"}),
    # The package's defaults, in full; the best of the exploration (benchmarks.gauge); the ball of the smallest trace.
    MSSAM: Contender("MSSAM", "rho", _RADII, {**ROWS, "gauge": 0.5}),
    "ASAM, layer, at rows": Contender("ASAM", "rho", _LAYERS, {"operator": "layer", **ROWS, "gauge": 0.0}),
    "MSSAM, κ = 0": Contender("MSSAM", "rho", _RADII, {**ROWS, "gauge": 0.0}),
    "MSRegularizedSGD, trace": Contender(
        "MSRegularizedSGD", "strength", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), TRACE, shown="λ"
    ),
    "MSRegularizedSGD, noise": Contender(
        "MSRegularizedSGD", "strength", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), {**TRACE, "gradient": "noise"}, shown="λ"
    ),
    "RSAM": Contender("RSAM", "rho", (0.1, 0.2, 0.4, 0.8, 1.6), {"order": 1.2}),
    "FrobSAM": Contender("FrobSAM", "strength", (1e-5, 1e-4, 1e-3, 3e-3, 1e-2), {"rho": 0.01, "samples": 2}, shown="λ"),
}
