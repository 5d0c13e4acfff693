"""Figure: the traces of the layers as they are and at the representative, and the scales between the two."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from ..errors import CommandLineError
from .measurement import Measurement
from .output import whole_file


def require_matplotlib(path: Path | None) -> None:
    """Refuse a figure that could not be drawn, before anything has been computed for it.

    Args:
        path: The figure; ``None``: none is wanted.

    Raises:
        CommandLineError: If matplotlib is missing, or does not write such files.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandLineError("--figure needs matplotlib, which ms_optim itself does not: pip install 'ms_optim[cli]'")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        ending = path.suffix or "file without ending"
        raise CommandLineError(f"--figure {path}: matplotlib writes no {ending}; take .png, .pdf or .svg")


def draw(measurement: Measurement, path: Path) -> None:
    """Draw the layers.

    Args:
        measurement: What was found.
        path: Where the image is written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    layers = measurement.layers
    places = range(len(layers))
    height = max(3.0, 1.5 + 0.22 * len(layers))
    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    errors = [0.0 if math.isnan(layer.standard_error) else layer.standard_error for layer in layers]
    left.errorbar([layer.trace for layer in layers], places, xerr=errors, fmt="o", color="C0", label="as it is")
    left.plot([layer.balanced for layer in layers], places, "x", color="C2", markersize=8, label="balanced")
    left.set_yticks(places, [layer.name for layer in layers])
    left.invert_yaxis()
    if any(layer.trace > 0 for layer in layers):
        left.set_xscale("log")
    left.set(title="trace of each layer", xlabel="$c_p$ = Tr $H_p$")
    left.legend()

    scales = [layer.alpha for layer in layers]
    right.plot(scales, places, "o", color="C3")
    right.axvline(1.0, color="0.7", linewidth=1)
    if any(scale > 0 for scale in scales):
        right.set_xscale("log")
    right.set(title="scale that takes it there", xlabel="$\\alpha^*$")

    values = {name: outcome.value for name, outcome in measurement.measures.items() if outcome.value is not None}
    told = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name in ("trace", "minimum"))
    canvas.suptitle(f"{measurement.model['name']}" + (f": {told}" if told else ""))
    with whole_file(path) as file:
        canvas.savefig(file, dpi=120)
    pyplot.close(canvas)
