"""The page of :mod:`benchmarks.random_labels`: rank correlations with the gap, beside the archive's, and a figure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figure import pyplot, save
from .harness import Run
from .ranks import Rank, correlation, mean_correlation
from .rows import Row

#: A run with a training accuracy of at most this has learned nothing: a tenth or so of the labels is of one class.
CHANCE = 0.15
RATIO = "the ratio itself"
MEASURES = (
    *("minimum, layer", "minimum, neuron", "normalized", "Tr H", "Fisher–Rao", "adaptive", "SAM"),
    *("Rényi", "Rényi, Gauss-Newton", "Rényi, by layer"),
)
#: τ of the stored results of the authors' code, recomputed: over all runs with and without dead ones, and within ratios
#: without dead ones, of which only minimum sharpness is known.
ARCHIVE = {
    ("MLP", "minimum, layer"): (0.864, 0.856),
    ("MLP", "normalized"): (0.942, 0.941),
    ("LeNet", "minimum, layer"): (0.677, 0.677),
    ("LeNet", "normalized"): (0.722, 0.722),
}
_SHORT = {"minimum, layer": "minimum sharpness", "normalized": "normalized sharpness"}
WITHIN = {
    "MLP": {0.1: 0.56, 0.3: 0.73, 0.5: 0.73, 0.7: 0.33, 0.9: 0.04},
    "LeNet": {0.1: -0.11, 0.3: -0.07, 0.5: 0.20, 0.7: 0.20, 0.9: 0.02},
}


@dataclass(frozen=True)
class Point:
    """One network.

    Attributes:
        seed: Its seed.
        ratio: Share of permuted labels.
        gap: Generalization gap.
        train_accuracy: Training accuracy.
        values: Measure → value.
    """

    seed: int
    ratio: float
    gap: float
    train_accuracy: float
    values: dict[str, float | None]

    @property
    def dead(self) -> bool:
        """Whether it has learned nothing. Permuted labels of a network that learns nothing are at chance as well."""
        return self.train_accuracy <= CHANCE


def points(runs: Sequence[Run], network: str) -> list[Point]:
    """All networks of one kind.

    Args:
        runs: All lines of one run; a line is a seed.
        network: Its name.

    Returns:
        One for each seed and ratio, of the seeds that ended.
    """
    return [
        Point(run["round"], member["ratio"], member["gap"], member["train_accuracy"], member["values"])
        for run in runs
        if run["network"] == network
        for member in run.get("members", ())
    ]


def _series(found: Sequence[Point], measure: str) -> tuple[list[float], list[float], list[int]]:
    """Gaps, values and seeds of the networks of which a value is known."""
    pairs = [(point, point.ratio if measure == RATIO else point.values.get(measure)) for point in found]
    known = [(point, value) for point, value in pairs if value is not None and math.isfinite(value)]
    return [p.gap for p, _ in known], [value for _, value in known], [p.seed for p, _ in known]


def overall(found: Sequence[Point], measure: str) -> Rank:
    """τ(gap, measure) over all these networks.

    Args:
        found: The networks.
        measure: Its name, or :data:`RATIO`.

    Returns:
        The correlation.
    """
    return correlation(*_series(found, measure))


def within(found: Sequence[Point], measure: str, ratio: float | None = None) -> Rank:
    """τ(gap, measure) among networks of one ratio.

    Args:
        found: The networks.
        measure: Its name.
        ratio: Of which; ``None``: the mean over the ratios.

    Returns:
        The correlation.
    """
    ratios = ratios_of(found) if ratio is None else [ratio]
    return mean_correlation([_series([p for p in found if p.ratio == each], measure) for each in ratios])


def ratios_of(found: Sequence[Point]) -> list[float]:
    """The ratios there are, in order.

    Args:
        found: Networks.

    Returns:
        Each once.
    """
    return sorted({point.ratio for point in found})


def body(runs: Sequence[Run]) -> list[str]:
    """Correlations over all runs, within ratios, and beside the archive.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    networks = list(dict.fromkeys(run["network"] for run in runs))
    lines = [
        "Kendall's τ-b between generalization gap and measure [95 %, by seeds]. The overall τ is carried by the "
        'ratio: what knows nothing else has the τ of the row "the ratio itself", and the last column is what a '
        "measure says beyond it.",
        "",
        "| network | measure | all runs | n | without dead runs | n | mean τ within a ratio, without dead runs |",
        f"|{' --- |' * 7}",
    ]
    for network in networks:
        found = points(runs, network)
        alive = [point for point in found if not point.dead]
        for measure in (RATIO, *MEASURES):
            every, living = overall(found, measure), overall(alive, measure)
            inside = "" if measure == RATIO else str(within(alive, measure))
            cells = (network, measure, str(every), str(every.n), str(living), str(living.n), inside)
            lines.append(f"| {' | '.join(cells)} |")
    return lines + ["", *beside_archive(runs, networks)]


def beside_archive(runs: Sequence[Run], networks: Sequence[str]) -> list[str]:
    """The archive's τ and ours.

    Args:
        runs: All lines of one run.
        networks: Names of networks.

    Returns:
        Lines of Markdown.
    """
    rows: list[tuple[str, str, str, float, Rank]] = []
    for network in networks:
        found = points(runs, network)
        alive = [point for point in found if not point.dead]
        for (name, measure), (every, living) in ARCHIVE.items():
            if name == network:
                rows.append((network, measure, "all runs", every, overall(found, measure)))
                rows.append((network, measure, "without dead runs", living, overall(alive, measure)))
        for ratio, value in WITHIN.get(network, {}).items():
            if ratio in ratios_of(alive):
                rows.append(
                    (network, "minimum, layer", f"ratio {ratio:g}", value, within(alive, "minimum, layer", ratio))
                )
        known = WITHIN.get(network, {})
        if known:
            mean, same = statistics.fmean(known.values()), [point for point in alive if point.ratio in known]
            rows.append((network, "minimum, layer", "mean over these ratios", mean, within(same, "minimum, layer")))
    lines = ["The archive of the paper's code (10 seeds × 11 ratios at full size) beside ours:", ""]
    lines += ["| network | measure | runs | archive | ours | n | verdict |", f"|{' --- |' * 7}"]
    for network, measure, scope, theirs, ours in rows:
        cells = (network, measure, scope, f"{theirs:.3g}", str(ours), str(ours.n), verdict(theirs, ours))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(theirs: float, ours: Rank) -> str:
    """Whether the archive's number is in our interval.

    Args:
        theirs: Their τ.
        ours: Ours.

    Returns:
        Words.
    """
    if math.isnan(ours.value):
        return "not measured"
    if math.isnan(ours.low):
        return "too few runs for an interval"
    if ours.low <= theirs <= ours.high:
        return "in our interval"
    return "ours is higher" if ours.low > theirs else "ours is lower"


def summary(runs: Sequence[Run]) -> list[Row]:
    """The correlations that the archive has, and what all measures say within a ratio.

    Args:
        runs: All lines of one run.

    Returns:
        Rows of the report.
    """
    made = []
    for network in dict.fromkeys(run["network"] for run in runs):
        found = points(runs, network)
        alive = [point for point in found if not point.dead]
        for (name, measure), (theirs, _) in ARCHIVE.items():
            if name == network:
                ours = overall(found, measure)
                claim = f"{network}: τ(gap, {_SHORT[measure]}), over all ratios"
                made.append(Row(claim, f"{ours} (n = {ours.n})", verdict(theirs, ours), f"{theirs:.3f} (its archive)"))
        archive = statistics.fmean(WITHIN[network].values())
        inside = {measure: within(alive, measure) for measure in MEASURES}
        ours = "; ".join(f"{measure} {rank}" for measure, rank in inside.items())
        best = max(inside, key=lambda measure, of=inside: -2.0 if math.isnan(of[measure].value) else of[measure].value)
        claim = (
            f"{network}: mean τ within a ratio, without dead runs; the ratio alone has {overall(found, RATIO)} over all"
        )
        paper = f"{archive:.2f} for minimum sharpness (its archive, five ratios)"
        shown = [measure for measure, rank in inside.items() if rank.low > 0]  # NaN, no interval, shows nothing
        says = f"shown to be above 0: {', '.join(shown)}" if shown else "none is shown to be above 0"
        made.append(Row(claim, ours, f"{says}; the largest is that of {best}", paper))
    return made


def in_short(runs: Sequence[Run]) -> str:
    """What orders the gaps, and what of it is left within a ratio.

    Args:
        runs: All lines of one run.

    Returns:
        Sentences of the report.
    """
    said = []
    for network in dict.fromkeys(run["network"] for run in runs):
        found = points(runs, network)
        alive = [point for point in found if not point.dead]
        measures = ("minimum, layer", "normalized")
        over = ", ".join(f"{_SHORT[measure]} {overall(found, measure)}" for measure in measures)
        inside = ", ".join(f"{_SHORT[measure]} {within(alive, measure)}" for measure in measures)
        said.append(
            f"Generalization gaps of {network}s that fitted random labels (n = {len(found)}), Kendall's τ: {over}, and "
            f"the share of random labels itself {overall(found, RATIO)}; within a share, {inside}."
        )
    return " ".join(said)


def details(runs: Sequence[Run]) -> list[str]:
    """τ within each ratio, means over the seeds, what failed, and how exact the sampled measures are.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines: list[str] = []
    for network in dict.fromkeys(run["network"] for run in runs):
        found = points(runs, network)
        if not found:
            continue
        ratios = ratios_of(found)
        alive = [point for point in found if not point.dead]
        heads = [f"{ratio:g}" for ratio in ratios]
        lines += [f"{network}: τ within each ratio, without dead runs [95 %].", ""]
        lines += [f"| measure | {' | '.join(heads)} |", f"|{' --- |' * (len(ratios) + 1)}"]
        for measure in MEASURES:
            lines.append(f"| {measure} | {' | '.join(str(within(alive, measure, ratio)) for ratio in ratios)} |")
        lines += ["", f"{network}: means over the seeds, dead runs left out.", ""]
        lines += [f"| | {' | '.join(heads)} |", f"|{' --- |' * (len(ratios) + 1)}"]
        rows = {
            "runs": [str(sum(p.ratio == ratio for p in found)) for ratio in ratios],
            "of these dead": [str(sum(p.ratio == ratio and p.dead for p in found)) for ratio in ratios],
            "training accuracy": [_mean([p.train_accuracy for p in alive if p.ratio == ratio]) for ratio in ratios],
            "gap": [_mean([p.gap for p in alive if p.ratio == ratio]) for ratio in ratios],
        }
        for measure, ratio in itertools.product(MEASURES, ratios):
            values = _series([p for p in alive if p.ratio == ratio], measure)[1]
            rows.setdefault(measure, []).append(_mean(values))
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
        lines += ["", *_exactness(runs, network), ""]
    failed = [f"{run['network']}, seed {run['round']}: {run['failed']}" for run in runs if "failed" in run]
    return lines + ([f"Failed: {'; '.join(failed)}."] if failed else [])


def _mean(values: Sequence[float]) -> str:
    """A mean in four digits; nothing if there are no values."""
    return f"{statistics.fmean(values):.4g}" if values else "—"


def _exactness(runs: Sequence[Run], network: str) -> list[str]:
    """Errors of the sampled measures, seconds, and what could not be measured."""
    members = [member for run in runs if run["network"] == network for member in run.get("members", ())]
    parts = []
    for name in ("Rényi", "Rényi, Gauss-Newton"):
        errors = [m["errors"][name] for m in members if name in m["errors"]]
        steps = [m["errors"][f"{name}, steps"] for m in members if f"{name}, steps" in m["errors"]]
        if errors and steps:
            parts.append(f"{name} {statistics.median(errors):.2g} and {statistics.median(steps):.2g}")
    taken = {name: [m["seconds"][name] for m in members] for name in members[0]["seconds"]}
    seconds = ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in taken.items())
    missing = {name: sum(m["values"].get(name) is None for m in members) for name in MEASURES}
    unknown = ", ".join(f"{name} of {count} runs" for name, count in missing.items() if count)
    return [
        f"{network}: standard error over probes and change from half of the steps, medians: {'; '.join(parts)}. "
        f"Seconds of each measure, medians: {seconds}. Not finite or not measured: {unknown or 'none'}."
    ]


def draw(runs: Sequence[Run], path: Path) -> None:
    """The gap against every measure, a row for each network, coloured by the ratio.

    Args:
        runs: All lines of one run.
        path: Where to write the figure.
    """
    networks = [name for name in dict.fromkeys(run["network"] for run in runs) if points(runs, name)]
    columns = math.ceil(len(MEASURES) / 2)
    rows = 2 * max(len(networks), 1)
    figure, panels = pyplot().subplots(rows, columns, figsize=(2.3 * columns, 2.3 * rows), squeeze=False, sharey="row")
    figure.set_layout_engine("constrained")
    for number, network in enumerate(networks):
        two = panels[2 * number : 2 * number + 2]
        for panel, measure in zip(two.flat, MEASURES, strict=False):
            shown = _scatter(panel, points(runs, network), measure)
        for row in two:
            row[0].set_ylabel(f"{network}: gap", fontsize=8)
        figure.colorbar(shown, ax=list(two.flat), label="ratio", pad=0.01)
    save(figure, path)


def _scatter(panel: Any, found: Sequence[Point], measure: str) -> Any:
    """The gap against one measure; crosses are dead runs.

    Args:
        panel: Of the figure.
        found: Networks.
        measure: Its name.

    Returns:
        The dots, for the scale of colours.
    """
    from matplotlib import ticker

    known = [(point, point.values.get(measure)) for point in found]
    drawn = [(point, value) for point, value in known if value is not None]
    for dead, marker in ((True, "x"), (False, "o")):
        mine = [(point, value) for point, value in drawn if point.dead is dead]
        values, gaps = [value for _, value in mine], [point.gap for point, _ in mine]
        shades = {"c": [point.ratio for point, _ in mine], "cmap": "viridis", "vmin": 0.0, "vmax": 1.0}
        dots = panel.scatter(values, gaps, 10, marker=marker, **shades)
    if drawn and min(value for _, value in drawn) > 0.0:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.set_title(f"{measure}, τ = {overall(found, measure).value:.2f}", fontsize=8)
    panel.tick_params(labelsize=6)
    panel.grid(alpha=0.3)
    return dots
