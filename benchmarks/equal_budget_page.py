"""The page of :mod:`benchmarks.equal_budget`: a table for every row of the comparison, and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ms_optim import sweep
from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Choice, Difference, Result
from ms_optim.sweep.trial import canonical

from . import trials
from .entrants import BASELINES, CONTENDERS, LONGER, MSSAM, OURS, OVERVIEW, SGD, SHOWN
from .figure import pyplot, save
from .harness import Run
from .problems import PAPER, PROBLEMS
from .rows import Row, compared, in_one_row, mean, seed_by_seed

#: Points below the reference up to which the figure goes.
_FURTHEST = -4.0
#: Panels side by side, that names can be read where a page is as wide as a screen.
_ACROSS = 3


def best_of(results: Sequence[Result]) -> list[Choice]:
    """The best setting of each method on held-out images, of those of which a training ended.

    Args:
        results: All.

    Returns:
        A choice for each method.
    """
    ended = {(r.trial.problem, r.trial.method) for r in results if r.value("held_out") is not None}
    return sweep.choose([r for r in results if (r.trial.problem, r.trial.method) in ended], "held_out")


def scalar(choice: Choice) -> float:
    """The value of the method's own argument."""
    return CONTENDERS[choice.setting.method].value(choice.setting.settings)


def chosen_text(choice: Choice) -> str:
    """What was chosen, with marks at the edges of the grids.

    Args:
        choice: Of a method.

    Returns:
        Words.
    """
    settings, method = choice.setting.settings, CONTENDERS[choice.setting.method]
    mark = " (edge)" if f"options.{method.scalar}" in choice.edges else ""
    rate = f"{settings['lr']:.3g}{' (edge)' if 'lr' in choice.edges else ''}"
    return f"{method.shown} {scalar(choice):g}{mark}, lr {rate}, wd {settings['weight_decay']:g}"


def accuracies(results: Sequence[Result], row: str, name: str) -> dict[int, float]:
    """Test accuracy from fresh seeds; a training that diverged has that of chance.

    Args:
        results: All.
        row: The problem.
        name: The method.

    Returns:
        Seed → per cent.
    """
    found = {}
    for result in judged_of([r for r in results if (r.trial.problem, r.trial.method) == (row, name)]):
        value = result.value("test")
        if value is not None or result.status == "diverged":
            found[int(result.trial.seed)] = 10.0 if value is None else 100 * value
    return found


def judged_of(results: Sequence[Result]) -> list[Result]:
    """The trainings from fresh seeds of what holds: what was chosen before a search went on is no choice any more.

    Args:
        results: All.

    Returns:
        Those; of a method without a search all from fresh seeds.
    """
    points: dict[tuple[str, str], str] = {}
    for choice in best_of(results):
        points[choice.setting.problem, choice.setting.method] = _point(choice.setting.results[0])
    fresh = [r for r in results if r.trial.stage == "fresh"]
    return [r for r in fresh if _point(r) == points.get((r.trial.problem, r.trial.method), _point(r))]


def _point(result: Result) -> str:
    """A setting, whatever was measured at it."""
    left_out = ("seed", "test", "withstood")
    return canonical({name: value for name, value in result.trial.settings.items() if name not in left_out})


def reference(results: Sequence[Result], row: str) -> str | None:
    """The best of SAM and the ASAMs on the test images.

    Args:
        results: All.
        row: The problem.

    Returns:
        Its name; ``None`` if none was run.
    """
    found = {name: list(accuracies(results, row, name).values()) for name in BASELINES}
    means = {name: mean_and_error(values)[0] for name, values in found.items() if values}
    return max(means, key=means.__getitem__) if means else None


@dataclass(frozen=True)
class Judged:
    """A row of the comparison.

    Attributes:
        reference: The best of SAM and the ASAMs; ``None`` if none was run.
        apart: Method → difference to it, in points, seed by seed.
        corrected: Method → the p-value of the t-test after Holm's correction.
    """

    reference: str | None
    apart: Mapping[str, Difference]
    corrected: Mapping[str, float]

    @classmethod
    def of(cls, results: Sequence[Result], row: str) -> Judged:
        """Compare all methods of a row with its reference.

        Args:
            results: All.
            row: The problem.

        Returns:
            The comparison; without differences if there is no reference.
        """
        best = reference(results, row)
        if best is None:
            return cls(None, {}, {})
        base = accuracies(results, row, best)
        others = {name: accuracies(results, row, name) for name in CONTENDERS if name != best}
        apart = {name: Difference.of(seed_by_seed(mine, base)) for name, mine in others.items() if mine}
        return cls(best, apart, dict(zip(apart, sweep.holm([each.p_t for each in apart.values()]), strict=True)))

    def verdict(self, name: str) -> str:
        """What the difference of a method says."""
        return verdict(self.apart[name], self.corrected[name])


def judged_rows(results: Sequence[Result]) -> dict[str, Judged]:
    """The rows that have been judged.

    Args:
        results: All.

    Returns:
        Problem → its comparison.
    """
    rows = {row: Judged.of(results, row) for row in {**PROBLEMS, **PAPER}}
    return {row: judged for row, judged in rows.items() if judged.apart}


def verdict(difference: Difference, corrected: float) -> str:
    """What a difference says at the level of 5 %, corrected.

    Args:
        difference: Method minus reference.
        corrected: The p-value of the t-test after Holm's correction.

    Returns:
        A word or two.
    """
    if not math.isfinite(corrected) or corrected > 0.05:
        return "no difference shown"
    return "better" if difference.mean > 0 else "worse"


def body(runs: Sequence[Run]) -> list[str]:
    """A table for every row.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    results = [trials.result_of(run) for run in runs]
    lines = [
        "Test accuracy in per cent, mean ± standard error over fresh seeds; difference to the best of SAM and the "
        "ASAMs [95 % interval]; p of the paired t-test after Holm's correction, which the verdict goes by, and of the "
        "exact test that flips signs.",
    ]
    choices = best_of(results)
    for row in {**PROBLEMS, **PAPER}:
        mine = {choice.setting.method: choice for choice in choices if choice.setting.problem == row}
        if not mine:
            continue
        lines += ["", f"## {row} ({_kind(row)})", ""]
        found = row_lines(results, row, mine)
        if not found:
            lines.append("Searched so far, and not judged.")
            continue
        lines += [
            "| method | chosen | test accuracy (n) | difference | p (t), p (signs) | verdict "
            "| ms a step | ÷ SGD's | gradients | MiB |"
        ]
        lines += [f"|{' --- |' * 10}", *found]
    return lines


def row_lines(results: Sequence[Result], row: str, choices: Mapping[str, Choice]) -> list[str]:
    """The lines of one row's table.

    Args:
        results: All.
        row: The problem.
        choices: Method → what was chosen.

    Returns:
        Lines of Markdown.
    """
    judged = Judged.of(results, row)
    costs = costs_of(results, row)
    lines = []
    for name in CONTENDERS:
        values = list(accuracies(results, row, name).values())
        if name not in choices or not values:
            continue
        mean, error = mean_and_error(values)
        cells = [name, chosen_text(choices[name]), f"{mean:.2f} ± {error:.2f} ({len(values)})"]
        if name == judged.reference:
            cells += ["", "", "the reference"]
        elif name in judged.apart:
            found = judged.apart[name]
            cells += [interval(found)]
            cells += [f"{judged.corrected[name]:.3f}, {found.p_signs:.3f}", judged.verdict(name)]
        else:
            cells += ["", "", ""]
        mine = cost_of(costs, name)
        shown = {"seconds": "{:.1f}", "ratio": "{:.2f}", "gradients": "{:g}", "mib": "{:.1f}"}
        ours = {**mine, "seconds": 1000 * mine["seconds"]} if "seconds" in mine else mine
        cells += [text.format(ours[key]) if key in ours else "" for key, text in shown.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def costs_of(results: Sequence[Result], row: str) -> Mapping[str, Any]:
    """What steps of a problem cost, as of :func:`benchmarks.cost.measured`; nothing if that was not measured."""
    return next((r.outcome for r in results if (r.trial.problem, r.trial.stage) == (row, "cost")), {})


def cost_of(costs: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a step of a method costs."""
    found: Mapping[str, Any] = costs.get("methods", {}).get(SGD if name == LONGER else name, {})
    return found


def draw(runs: Sequence[Run], path: Any) -> None:
    """Differences to the best of SAM and the ASAMs: a panel per problem, a line per method, 95 % intervals.

    Args:
        runs: All lines of one run.
        path: Where the figure is written.
    """
    rows = judged_rows([trials.result_of(run) for run in runs])
    if not rows:
        return
    across = min(_ACROSS, len(rows))
    down = math.ceil(len(rows) / across)
    size = (2.6 + 2.6 * across, 4.2 * down)
    figure, panels = pyplot().subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in panels.flat[len(rows) :]:
        axis.set_axis_off()
    for (row, judged), axis in zip(rows.items(), panels.flat, strict=False):
        apart = judged.apart
        axis.axvline(0.0, color="grey", linewidth=0.8)
        for place, name in enumerate(CONTENDERS):
            found = apart.get(name)
            if found is None:
                continue
            colour = "C3" if name in SHOWN and name != LONGER else "C0" if name in BASELINES else "C7"
            if found.mean < _FURTHEST:  # what did not train would leave nothing to see of the others
                axis.text(_FURTHEST, place, f"◂ {found.mean:.1f}", color=colour, va="center", fontsize=8)
            else:
                bars = [[found.mean - found.low], [found.high - found.mean]]
                axis.errorbar([found.mean], [place], xerr=bars, fmt="o", color=colour, markersize=4)
        axis.set_xlim(_FURTHEST, max(2.0, *(found.high + 0.2 for found in apart.values() if found.n > 1)))
        axis.set_title(f"{row}\nagainst {judged.reference}", fontsize=8)
        axis.set_xlabel("points", fontsize=8)
    for axis in panels[:, 0]:
        axis.set_yticks(range(len(CONTENDERS)), list(CONTENDERS), fontsize=8)
    panels[0][0].set_ylim(len(CONTENDERS) - 0.5, -0.5)
    save(figure, path)


def summary(runs: Sequence[Run]) -> list[Row]:
    """Of every problem, all methods against the best of SAM and the ASAMs; and MSSAM against SGD with as many passes.

    Args:
        runs: All lines of one run.

    Returns:
        Rows of the report.
    """
    results = [trials.result_of(run) for run in runs]
    made = []
    for row, judged in judged_rows(results).items():
        kind = _kind(row)
        best = mean_and_error(list(accuracies(results, row, str(judged.reference)).values()))[0]
        claim = f"{row} ({kind}): points over the {best:.2f} % of {judged.reference}, the best of SAM and the ASAMs"
        for detail in (False, True):
            apart = {name: found for name, found in judged.apart.items() if (name not in SHOWN) is detail}
            if apart:
                texts = [(name, interval(found), judged.verdict(name)) for name, found in apart.items()]
                seeds = ", ".join(sorted({str(found.n) for found in apart.values()}))
                ours, word = in_one_row(texts)
                made.append(Row(claim, f"{ours} (n = {seeds})", word, detail=detail))
        mssam, longer = (accuracies(results, row, name) for name in (MSSAM, LONGER))
        if mssam and longer:
            text, word = compared(seed_by_seed(mssam, longer))
            made.append(Row(f"{row} ({kind}): {MSSAM} against {LONGER}, as many passes", f"{text} points", word))
    return made


def _kind(row: str) -> str:
    """Whether anything was chosen by looking at a problem."""
    return "judging" if {**PROBLEMS, **PAPER}[row].judging else "development"


def interval(found: Difference) -> str:
    """A mean and its 95 % interval."""
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def overview(runs: Sequence[Run]) -> list[str]:
    """What a reader looks for first: the accuracy of every method on every problem, and what its steps cost.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown; none before a problem has been judged.
    """
    results = [trials.result_of(run) for run in runs]
    rows = judged_rows(results)
    if not rows:
        return []
    steps: dict[str, list[float]] = {name: [] for name in OVERVIEW}
    marks = {"better": " ▲", "worse": " ▼"}
    lines = [f"| test accuracy, per cent | {' | '.join(OVERVIEW)} |", f"|{' --- |' * (1 + len(OVERVIEW))}"]
    for row, judged in rows.items():
        costs = costs_of(results, row)
        cells = []
        for name in OVERVIEW:
            values = list(accuracies(results, row, name).values())
            mark = marks.get(judged.verdict(name), "") if name in judged.apart else ""
            cells.append(f"{mean(values)}{mark or ' *' * (name == judged.reference)}" if values else "")
            steps[name] += [cost["ratio"]] if (cost := cost_of(costs, name)) else []
        lines.append(f"| {row} ({_kind(row)}) | {' | '.join(cells)} |")
    taken = [f"{statistics.median(found):.1f}" if found else "" for found in steps.values()]
    lines.append(f"| time of a step, in SGD's, median of the problems | {' | '.join(taken)} |")
    seeds = sorted({found.n for judged in rows.values() for found in judged.apart.values()})
    lines += [
        "",
        f"All tuned alike; mean ± standard error over {' or '.join(map(str, seeds))} fresh seeds. \\* the best of SAM "
        "and the ASAMs on the test images; ▲ ▼ better or worse than that, paired by seed, after Holm's correction. "
        f"{LONGER}: as many passes as SAM. Ours were chosen by looking at development problems: marks there are no "
        "evidence.",
    ]
    return lines


def in_short(runs: Sequence[Run]) -> str:
    """On how many judging rows ours are better or worse than the best of SAM and the ASAMs, and MSSAM than SGD.

    Args:
        runs: All lines of one run.

    Returns:
        A sentence of the report; development rows, by which ours were chosen, do not count.
    """
    results = [trials.result_of(run) for run in runs]
    rows = {row: judged for row, judged in judged_rows(results).items() if _kind(row) == "judging"}
    shown = (*OURS, LONGER)
    words = {name: [judged.verdict(name) for judged in rows.values() if name in judged.apart] for name in shown}
    counts = "; ".join(f"{name} {_counted(found)}" for name, found in words.items())
    beside = []
    for row in rows:
        ours, plain = (accuracies(results, row, name) for name in (MSSAM, SGD))
        if ours and plain:
            apart = Difference.of(seed_by_seed(ours, plain))
            beside.append(verdict(apart, apart.p_t))
    judging = sum(problem.judging for problem in PROBLEMS.values())
    return (
        f"From the usual start, tuned alike on {len(rows)} of {judging} judging problems, against the best of SAM and "
        f"three ASAMs: {counts}. Against SGD of as many epochs, half the passes, MSSAM {_counted(beside)}."
    )


def _counted(words: Sequence[str]) -> str:
    """Verdicts, counted."""
    better, worse, none = (words.count(word) for word in ("better", "worse", "no difference shown"))
    return f"is better on {better}, worse on {worse}, and no difference is shown on {none}"


def details(runs: Sequence[Run]) -> list[str]:
    """What every setting gave on held-out images.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    results = [trials.result_of(run) for run in runs if run["stage"] == "tuning"]
    lines = ["## The search", "", "Held-out accuracy, per cent, mean of the seeds; × where one diverged.", ""]
    lines += ["| row | method | scalar, lr, wd: accuracy |", "| --- | --- | --- |"]

    def words(setting: sweep.Setting) -> tuple[str, str]:
        value = CONTENDERS[setting.method].value(setting.settings)
        there = f"{value:g}, {setting.settings['lr']:.3g}, {setting.settings['weight_decay']:g}"
        return there, f"{100 * setting.mean('held_out')[0]:.1f}"

    return lines + trials.search_log(results, words)
