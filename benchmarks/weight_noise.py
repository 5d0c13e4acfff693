"""Flat minima should withstand noise: accuracy under noise on weights, few bits, and corrupted images.

The networks are those of the fresh seeds of :mod:`benchmarks.equal_budget`, every method with what it chose there on
clean images, and so are the raw runs: nothing is tuned for noise.  Sizes are relative to each tensor's own norm and so
do not depend on how a network is scaled (:mod:`benchmarks.corruptions` has the formulas).  A method is above or below
SAM at a size if the paired t-test says so at 5 %, after Holm's correction over the methods of that row and size.  The
report compares what is lost, accuracy under a corruption less that without.

    MS_OPTIM_DATA=... python -m benchmarks.weight_noise        after equal_budget, whose trainings are not repeated
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ms_optim import sweep
from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Difference
from ms_optim.sweep.trial import DIVERGED

from . import equal_budget, trials
from .corruptions import SIZES
from .entrants import CONTENDERS, MSSAM, SGD
from .equal_budget_page import judged_of
from .figure import pyplot, save
from .harness import RESULTS, Run
from .problems import PROBLEMS
from .render import newest
from .rows import Row, seed_by_seed

REFERENCE = "SAM"
SCALES, DEVICES = equal_budget.SCALES, equal_budget.DEVICES
_TITLES = {
    "gaussian": "Gaussian noise on weights, σ",
    "adversarial": "Adversarial weights, radius r",
    "bits": "Bits per weight",
    "image noise": "Gaussian noise on images, σ",
    "erased": "Erased square, share of the side",
}


def plan(run: trials.Trainings) -> None:
    """Take over the trainings of the fresh seeds, or train them.

    Args:
        run: The trainings.

    Raises:
        FileNotFoundError: If nothing was chosen yet.
    """
    if run.scale == "smoke":
        row, names = next(iter(PROBLEMS)), (SGD, REFERENCE, MSSAM)
        middle = {name: CONTENDERS[name].values[2] for name in names}
        run([equal_budget.trial(row, n, 0.1, 0.0, middle[n], seed, "smoke", "fresh") for n in names for seed in (0, 1)])
        return
    chosen = newest(RESULTS / "equal_budget", "cuda" if run.scale == "paper" else "cpu")
    if chosen is None:
        raise FileNotFoundError(
            "results/equal_budget has no runs, and the settings are those that were chosen there: run "
            "python -m benchmarks.equal_budget first"
        )
    lines = [trials.line_of(result) for result in judged_of([trials.result_of(line) for line in chosen.runs])]
    where = f"{chosen.folder.parent.name}/{chosen.folder.name}"
    told = ("date", "commit", "torch", "cpu", "resumed", "complete")
    run.taken_from = {"run": where} | {key: chosen.environment[key] for key in told if key in chosen.environment}
    run.remember(lines)
    run([trials.result_of(line).trial for line in lines])


def found(runs: Sequence[Run]) -> dict[tuple[str, str, str, str], dict[int, float]]:
    """Accuracy under corruption; a training that diverged has that of chance, as it has without corruption.

    Args:
        runs: All lines of one run.

    Returns:
        (Row, method, corruption, size) → seed → per cent.
    """
    cells: dict[tuple[str, str, str, str], dict[int, float]] = {}
    guessed: dict[str, dict[str, float]] = {}
    for corruption, size in columns():
        guessed.setdefault(corruption, {})[size] = 0.1
    for run in runs:
        withstood: Mapping[str, Any] = guessed if run["status"] == DIVERGED else run.get("withstood", {})
        for corruption, sizes in withstood.items():
            for size, value in sizes.items():
                cells.setdefault((run["network"], run["contender"], corruption, size), {})[run["round"]] = 100 * value
    return cells


def columns() -> Iterator[tuple[str, str]]:
    """(Corruption, size) of all columns, the images without any first."""
    yield "none", "0"
    for corruption, sizes in SIZES.items():
        for size in sizes:
            yield corruption, f"{size:g}"


def significant(cells: Mapping[tuple[str, str, str, str], Mapping[int, float]], row: str) -> dict[tuple[str, ...], int]:
    """Where a method differs from SAM.

    Args:
        cells: As of :func:`found`.
        row: The problem.

    Returns:
        (Method, corruption, size) → 1 if it is above, −1 if below.
    """
    signs = {}
    for corruption, size in columns():
        base = cells.get((row, REFERENCE, corruption, size), {})
        apart = {
            name: Difference.of(seed_by_seed(mine, base))
            for name in CONTENDERS
            if name != REFERENCE and (mine := cells.get((row, name, corruption, size)))
        }
        for (name, each), p in zip(apart.items(), sweep.holm([each.p_t for each in apart.values()]), strict=True):
            if math.isfinite(p) and p <= 0.05:
                signs[name, corruption, size] = 1 if each.mean > 0 else -1
    return signs


def body(runs: Sequence[Run]) -> list[str]:
    """A table for every row and corruption.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    cells = found(runs)
    lines = [
        "Test accuracy in per cent on 2,000 test images, mean ± standard error over fresh seeds; ▲ above SAM's, ▼ "
        "below, at 5 % after Holm's correction: what is so without corruption, too, is not what was withstood.",
    ]
    for row in dict.fromkeys(row for row, *_ in cells):
        signs = significant(cells, row)
        names = [name for name in CONTENDERS if (row, name, "none", "0") in cells]
        lines += ["", f"## {row}"]
        for corruption, sizes in SIZES.items():
            wanted = [("none", "0"), *((corruption, f"{size:g}") for size in sizes)]
            lines += ["", f"| {_TITLES[corruption]} | none | {' | '.join(f'{size:g}' for size in sizes)} |"]
            lines += [f"|{' --- |' * (len(wanted) + 1)}"]
            for name in names:
                shown = []
                for column in wanted:
                    mean, error = mean_and_error(list(cells[(row, name, *column)].values()))
                    mark = {1: " ▲", -1: " ▼"}.get(signs.get((name, *column), 0), "")
                    shown.append(f"{mean:.1f} ± {error:.1f}{mark}")
                lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def draw(runs: Sequence[Run], path: Any) -> None:
    """Accuracy against size: a row of panels per problem, a panel per corruption.

    Args:
        runs: All lines of one run.
        path: Where the figure is written.
    """
    cells = found(runs)
    rows = list(dict.fromkeys(row for row, *_ in cells))
    if not rows:
        return
    figure, panels = pyplot().subplots(
        len(rows), len(SIZES), figsize=(3.2 * len(SIZES), 2.6 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, axes in zip(rows, panels, strict=True):
        for (corruption, sizes), axis in zip(SIZES.items(), axes, strict=True):
            for index, name in enumerate(CONTENDERS):
                if (row, name, "none", "0") not in cells:
                    continue
                wanted = [("none", "0"), *((corruption, f"{size:g}") for size in sizes)]
                means = [mean_and_error(list(cells[(row, name, *column)].values()))[0] for column in wanted]
                style = "-" if index < 10 else "--"
                axis.plot(range(len(means)), means, style, color=f"C{index % 10}", marker=".", label=name)
            axis.set_xticks(range(len(sizes) + 1), ["none", *(f"{size:g}" for size in sizes)])
            axis.set_xlabel(_TITLES[corruption])
        axes[0].set_ylabel(f"{row}\ntest accuracy %", fontsize=7)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def summary(runs: Sequence[Run]) -> list[Row]:
    """What MSSAM loses and what SAM loses, over all rows and sizes: of that many tests a few say something by chance.

    Args:
        runs: All lines of one run.

    Returns:
        A row per corruption; Holm's correction is over its rows and sizes.
    """
    made = []
    for corruption, beside in against_sam(runs).items():
        further = beside.further
        ours = f"less in {beside.less}, more in {beside.more} of {beside.count} (row, size)"
        ours += f"; mean difference of the losses {further:+.2f} points"
        word = "no difference shown"
        if beside.less and beside.more:
            word = "better in some, worse in others"
        elif beside.less or beside.more:  # the mean may be the other way round: nothing is the better on the whole
            agrees = (further < 0) if beside.less else (further > 0)
            word = f"{'better' if beside.less else 'worse'}{'' if agrees else ' at some sizes, and not in the mean'}"
        made.append(Row(f"{_name(corruption)}: MSSAM loses less accuracy than SAM", ours, word))
    return made


def in_short(runs: Sequence[Run]) -> str:
    """Where MSSAM loses less than SAM, and where more.

    Args:
        runs: All lines of one run.

    Returns:
        A sentence of the report.
    """
    counts = "; ".join(
        f"{_name(corruption)}, less in {each.less} and more in {each.more} of {each.count}"
        for corruption, each in against_sam(runs).items()
    )
    return f"Of its accuracy MSSAM loses under (problems and sizes, beside SAM): {counts}."


def _name(corruption: str) -> str:
    """A corruption in a sentence, without its size."""
    return _TITLES[corruption].split(",")[0].lower()


@dataclass(frozen=True)
class BesideSAM:
    """What MSSAM loses beside SAM under one corruption.

    Attributes:
        less: Rows and sizes at which it is shown to lose less, at 5 % after Holm's correction over all of them.
        more: Those at which it is shown to lose more.
        count: How many there are.
        further: By how many points it loses more, in the mean of all.
    """

    less: int
    more: int
    count: int
    further: float


def against_sam(runs: Sequence[Run]) -> dict[str, BesideSAM]:
    """What MSSAM loses beside SAM.

    Args:
        runs: All lines of one run.

    Returns:
        Corruption → comparison, of those under which both were measured.
    """
    cells = found(runs)
    rows = list(dict.fromkeys(row for row, *_ in cells))
    made = {}
    for corruption, sizes in SIZES.items():
        apart = []
        for row, size in itertools.product(rows, sizes):
            mine, base = (kept(cells, row, name, corruption, f"{size:g}") for name in (MSSAM, REFERENCE))
            both = seed_by_seed(mine, base)
            apart += [Difference.of(both)] if both else []
        p_values = sweep.holm([each.p_t for each in apart])
        shown = [each.mean for each, p in zip(apart, p_values, strict=True) if math.isfinite(p) and p <= 0.05]
        less, more = sum(value > 0 for value in shown), sum(value < 0 for value in shown)
        if apart:
            made[corruption] = BesideSAM(less, more, len(apart), -sum(each.mean for each in apart) / len(apart))
    return made


def kept(
    cells: Mapping[tuple[str, str, str, str], Mapping[int, float]], row: str, name: str, corruption: str, size: str
) -> dict[int, float]:
    """Accuracy under a corruption less that without.

    Args:
        cells: As of :func:`found`.
        row: The problem.
        name: The method.
        corruption: Its name.
        size: Its size.

    Returns:
        Seed → points, negative where accuracy is lost.
    """
    clean = cells.get((row, name, "none", "0"), {})
    return {s: value - clean[s] for s, value in cells.get((row, name, corruption, size), {}).items() if s in clean}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "weight_noise", equal_budget.FUNCTION, plan, arguments, SCALES)


if __name__ == "__main__":
    main()
