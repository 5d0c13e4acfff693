"""The report of the demo: outcomes of trainings as one table and one figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from .training import Outcome


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error s / √n; the error of a single value is NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def of(outcomes: Sequence[Outcome], model: str, optimizer: str, start: str) -> list[Outcome]:
    """The outcomes of one cell of the comparison: its seeds."""
    return [o for o in outcomes if (o.run.model, o.run.optimizer, o.run.start) == (model, optimizer, start)]


def table(outcomes: Sequence[Outcome], seconds: dict[str, dict[str, float]]) -> str:
    """The comparison as a Markdown table: a row per model, optimizer and start.

    Args:
        outcomes: Of all runs.
        seconds: Model → optimizer → time per step relative to SGD.

    Returns:
        The table, its columns padded so that it reads well in a terminal too.
    """
    head = ("model", "optimizer", "start", "test accuracy %", "train accuracy %", "Tr H", "MS before", "MS after")
    rows: list[tuple[str, ...]] = [(*head, "s/step ÷ SGD")]
    for model, optimizer, start in dict.fromkeys((o.run.model, o.run.optimizer, o.run.start) for o in outcomes):
        cell = of(outcomes, model, optimizer, start)
        test, error = mean_and_error([100 * o.test_accuracy for o in cell])
        training, _ = mean_and_error([100 * o.train_accuracy for o in cell])
        measures = zip(*((o.trace, o.sharpness_before, o.sharpness_after) for o in cell), strict=True)
        accuracies = (f"{test:.2f} ± {error:.2f}" if len(cell) > 1 else f"{test:.2f}", f"{training:.2f}")
        medians = (f"{statistics.median(values):.4g}" for values in measures)
        rows.append((model, optimizer, start, *accuracies, *medians, f"{seconds[model][optimizer]:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def figure(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw, for each model, accuracy from both starts and the traces of the layers before and after balancing.

    Args:
        outcomes: Of all runs.
        path: Where the image is written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn = list(dict.fromkeys(o.run.model for o in outcomes))
    optimizers = list(dict.fromkeys(o.run.optimizer for o in outcomes))
    canvas, axes = pyplot.subplots(len(drawn), 2, figsize=(12, 4 * len(drawn)), squeeze=False, layout="constrained")
    for (left, right), model in zip(axes, drawn, strict=True):
        for offset, start, colour in ((-0.1, "usual", "C0"), (0.1, "rescaled", "C3")):
            cells = [of(outcomes, model, name, start) for name in optimizers]
            means, errors = zip(*(mean_and_error([100 * o.test_accuracy for o in cell]) for cell in cells), strict=True)
            places = [index + offset for index in range(len(cells))]
            left.errorbar(places, means, errors, fmt="o", color=colour, capsize=4)
        left.set(title=f"{model}: two starts, one function", ylabel="test accuracy, % (mean ± s.e.)")
        left.set_xticks(range(len(optimizers)), optimizers, rotation=15)

        # Balanced, the two starts are one network again: crosses on crosses.
        for start, colour, cross in (("usual", "C0", "x"), ("rescaled", "C3", "+")):
            shown = of(outcomes, model, optimizers[0], start)[0]
            names, balanced = list(shown.start_layers), list(shown.balanced_layers.values())
            right.plot(names, list(shown.start_layers.values()), "o", color=colour, label=f"{start} start")
            right.plot(names, balanced, cross, markersize=9, color="C2", label=f"{start} start, balanced")
        right.set(title=f"{model}: trace of each layer at the start", ylabel="trace", yscale="log")
        right.tick_params(axis="x", rotation=90)
    canvas.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)
