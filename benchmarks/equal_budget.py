r"""Accuracy at equal budget: SGD, SAM, three ASAMs, MSSAM, MSRegularizedSGD, RSAM and Frob-SAM, tuned alike.

*Search.*  Learning rate and weight decay are searched on SGD (three times two values).  At what is best there every
method searches its own scalar (five values: ρ; λ; momentum for SGD, which has no other), and then, at the best of
those, the other weight decay, and learning rates a factor 3 up and down, each also with the next scalar in the
direction in which the two go together.  Two seeds each, chosen by accuracy on 5,000 held-out images whose labels are as
noisy as the ones that are trained on.  A scalar or a learning rate at the edge of what the method has tried is marked;
of two weight decays either is at an edge.

*Judgement.*  The chosen setting is trained from six fresh seeds, each of which draws images, noise, held-out part,
weights and order, the same for all methods, and the test images are looked at once.  Differences are taken seed by seed
(paired t-test after Holm's correction over the methods of a row; flips of signs, uncorrected).  The reference of a row
is the best of SAM and the ASAMs *on the test images*, a choice in their favour.

*Rows.*  Two are for development: defaults and grids were chosen by looking at them.  On the other four nothing was.

*Budget.*  Epochs are equal.  SGD is there with twice the epochs as well, which is what SAM's two passes cost; the last
columns say what a step takes on this machine, by itself and in units of one of SGD's, how many gradients of the loss it
needs, and what memory it uses above model and images.

*Weight noise.*  What the networks of the fresh seeds withstand is a page of its own (:mod:`benchmarks.weight_noise`).

    MS_OPTIM_DATA=... python -m benchmarks.equal_budget
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ms_optim import sweep
from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Choice, Difference, Result, Trial

from . import cost, training, trials
from .figure import pyplot, save
from .harness import Run
from .problems import PAPER, PROBLEMS, problem_of
from .rows import Row, seed_by_seed

FUNCTION = "benchmarks.equal_budget:trained"
SCALES, DEVICES = trials.SCALES, ("cpu", "cuda")
RATES, DECAYS = (0.02, 0.05, 0.1), (5e-4, 5e-3)
SEEDS, FRESH = (1_000, 1_001), range(6)


@dataclass(frozen=True)
class Contender:
    """A method, and what it searches.

    Attributes:
        optimizer: Its name.
        scalar: The argument that it searches.
        values: Five of them, rising.
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


_RADII = (0.03, 0.06, 0.12, 0.24, 0.48)
_ADAPTIVE = (0.25, 0.5, 1.0, 2.0, 4.0)
_ELEMENTS = (0.5, 1.0, 2.0, 4.0, 8.0)
_LAYERS = (0.0025, 0.005, 0.01, 0.02, 0.04)
# Options in full, defaults included: a training is its settings, whatever the package's defaults will be.
_ROWS = {"rebalance": "rows", "refresh_every": 100, "columns": 2}
_TRACE = {**_ROWS, "gauge": 0.0, "gradient": "trace"}
SGD, LONGER, MSSAM = "SGD", "SGD, twice the epochs", "MSSAM"
#: Those that the report has a row for; the others are there if they did not work.
SHOWN = (LONGER, MSSAM, "MSSAM, κ = 0", "ASAM, layer, at rows", "MSRegularizedSGD, trace", "MSRegularizedSGD, noise")
#: Those of which the best one is the reference.
BASELINES = ("SAM", "ASAM, official", "ASAM, elementwise", "ASAM, layer")
#: Points below the reference up to which the figure goes.
_FURTHEST = -4.0
CONTENDERS: dict[str, Contender] = {
    SGD: Contender("SGD", "momentum", (0.0, 0.5, 0.8, 0.9, 0.95), shown="momentum"),
    LONGER: Contender("SGD", "momentum", (0.0, 0.5, 0.8, 0.9, 0.95), epochs=2, shown="momentum"),
    "SAM": Contender("SAM", "rho", _RADII),
    "ASAM, official": Contender("ASAM", "rho", _ADAPTIVE, {"operator": "official", "eta": 0.01}),
    "ASAM, elementwise": Contender("ASAM", "rho", _ELEMENTS, {"operator": "elementwise"}),
    "ASAM, layer": Contender("ASAM", "rho", _LAYERS, {"operator": "layer"}),
    # The package's defaults, in full; the best of the exploration (benchmarks.gauge); the ball of the smallest trace.
    MSSAM: Contender("MSSAM", "rho", _RADII, {**_ROWS, "gauge": 0.5}),
    "ASAM, layer, at rows": Contender("ASAM", "rho", _LAYERS, {"operator": "layer", **_ROWS, "gauge": 0.0}),
    "MSSAM, κ = 0": Contender("MSSAM", "rho", _RADII, {**_ROWS, "gauge": 0.0}),
    "MSRegularizedSGD, trace": Contender(
        "MSRegularizedSGD", "strength", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), _TRACE, shown="λ"
    ),
    "MSRegularizedSGD, noise": Contender(
        "MSRegularizedSGD", "strength", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), {**_TRACE, "gradient": "noise"}, shown="λ"
    ),
    "RSAM": Contender("RSAM", "rho", (0.1, 0.2, 0.4, 0.8, 1.6), {"order": 1.2}),
    "FrobSAM": Contender("FrobSAM", "strength", (1e-5, 1e-4, 1e-3, 3e-3, 1e-2), {"rho": 0.01, "samples": 2}, shown="λ"),
}


def trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train once, or take the time and memory of steps: the function of the sweep.

    Args:
        settings: As of :func:`benchmarks.training.trained`; or ``cost``, as of :func:`benchmarks.cost.measured`.

    Returns:
        What was found.
    """
    return cost.measured(settings) if "cost" in settings else training.trained(settings)


def trial(
    row: str, name: str, lr: float, weight_decay: float, value: float, seed: int, scale: str, stage: str = "tuning"
) -> Trial:
    """One training.

    Args:
        row: The problem.
        name: Of :data:`CONTENDERS`.
        lr: The learning rate.
        weight_decay: The weight decay.
        value: Of the method's scalar.
        seed: The seed.
        scale: The scale.
        stage: ``"tuning"`` or ``"fresh"``.

    Returns:
        The trial.
    """
    method = CONTENDERS[name]
    settings: dict[str, Any] = {"problem": row, "row": problem_of(row, scale).size, "scale": scale}
    settings |= {"optimizer": method.optimizer}
    settings |= {"options": {**method.options, method.scalar: value}, "lr": lr, "weight_decay": weight_decay}
    settings |= {"seed": seed, "own_stream": True} | ({"epochs": method.epochs} if method.epochs != 1 else {})
    settings |= {"test": True, "withstood": True} if stage == "fresh" else {}
    return Trial(settings, name, row, stage)


def plan(run: trials.Trainings) -> None:
    """Search, judge, and weigh: row by row.

    Args:
        run: The trainings.
    """
    rows = list(PAPER if run.scale == "paper" else PROBLEMS)
    # LeNet takes longest and comes last, so that a run that is stopped has the more rows.
    rows.sort(key=lambda row: "LeNet" in row)
    for row in rows if run.scale != "smoke" else rows[:4:2]:
        judged(run, row)


def judged(run: trials.Trainings, row: str) -> None:
    """All stages of a row.

    Args:
        run: The trainings.
        row: The problem.
    """
    full = run.scale != "smoke"
    seeds, fresh = (SEEDS, FRESH) if full else (SEEDS[:1], FRESH[:2])
    rates, decays = (RATES, DECAYS) if full else (RATES[-1:], DECAYS[:1])
    middle = 0.9
    first = run([trial(row, SGD, lr, wd, middle, seed, run.scale) for lr in rates for wd in decays for seed in seeds])
    start = sweep.choose(first, "held_out")[0].setting.settings
    lr, wd = start["lr"], start["weight_decay"]
    found = first + run(
        [
            trial(row, name, lr, wd, value, seed, run.scale)
            for name, method in CONTENDERS.items()
            for value in (method.values if full else method.values[2:4])
            for seed in seeds
        ]
    )
    wanted = []
    for choice in best_of(found) if full else ():
        name, best = choice.setting.method, scalar(choice)
        there = [(rate, wd, value) for rate, value in coupled(name, lr, best)]
        there += [(lr, other, best) for other in decays if other != wd]
        wanted += [trial(row, name, *point, seed, run.scale) for point in there for seed in seeds]
    found += run(wanted)
    chosen = []
    for choice in best_of(found):
        settings = choice.setting.settings
        point = (settings["lr"], settings["weight_decay"], scalar(choice))
        chosen += [trial(row, choice.setting.method, *point, seed, run.scale, "fresh") for seed in fresh]
    run(chosen)
    run([cost_trial(row, run.scale)])


def coupled(name: str, lr: float, best: float) -> list[tuple[float, float]]:
    """A third and three times the learning rate, each with the best scalar and with its neighbour.

    A larger step goes with a larger radius, or, of momentum, with a smaller one: searched one after the other, a method
    for which that matters would be worse off than one for which it does not.

    Args:
        name: The method.
        lr: The learning rate of the search so far.
        best: The scalar that was best there.

    Returns:
        Learning rates and scalars.
    """
    method = CONTENDERS[name]
    place = method.values.index(best)
    found = []
    for factor, step in ((1 / 3, -1), (3, 1)):
        neighbour = place + (-step if method.scalar == "momentum" else step)
        inside = 0 <= neighbour < len(method.values)
        found += [(lr * factor, value) for value in (best, *([method.values[neighbour]] if inside else []))]
    return found


def best_of(results: Sequence[Result]) -> list[Choice]:
    """The best setting of each method on held-out images, of those of which a training ended.

    Args:
        results: All.

    Returns:
        A choice for each method.
    """
    ended = {(r.trial.problem, r.trial.method) for r in results if r.value("held_out") is not None}
    return sweep.choose([r for r in results if (r.trial.problem, r.trial.method) in ended], "held_out")


def cost_trial(row: str, scale: str) -> Trial:
    """Time and memory of a step of every method.

    Args:
        row: The problem.
        scale: The scale.

    Returns:
        The trial.
    """
    methods = {
        name: [method.optimizer, {**method.options, method.scalar: method.values[2]}]
        for name, method in CONTENDERS.items()
        if name != LONGER
    }
    size = problem_of(row, scale).size
    return Trial({"cost": methods, "problem": row, "row": size, "scale": scale, "seed": 0}, "all", row, "cost")


def scalar(choice: Choice) -> float:
    """The value of the method's own argument."""
    value: float = choice.setting.settings["options"][CONTENDERS[choice.setting.method].scalar]
    return value


def chosen_text(choice: Choice) -> str:
    """What was chosen, with marks at the edges of the grids.

    Args:
        choice: Of a method.

    Returns:
        Words.
    """
    settings, method = choice.setting.settings, CONTENDERS[choice.setting.method]
    mark = " (edge)" if sweep.at_edge(scalar(choice), method.values) else ""
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
    mine = [r for r in results if (r.trial.problem, r.trial.method, r.trial.stage) == (row, name, "fresh")]
    found = {}
    for result in mine:
        value = result.value("test")
        if value is not None or result.status == "diverged":
            found[int(result.trial.seed)] = 10.0 if value is None else 100 * value
    return found


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


def differences(results: Sequence[Result], row: str) -> dict[str, Difference]:
    """Every method minus the reference, seed by seed.

    Args:
        results: All.
        row: The problem.

    Returns:
        Method → difference, in points.
    """
    best = reference(results, row)
    if best is None:
        return {}
    base = accuracies(results, row, best)
    found = {}
    for name in CONTENDERS:
        mine = accuracies(results, row, name)
        if mine and name != best:
            found[name] = Difference.of(seed_by_seed(mine, base))
    return found


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
        "exact test that flips signs, uncorrected: of six seeds it cannot be below 0.031, which no correction leaves.",
    ]
    choices = sweep.choose(results, "held_out")
    for row, problem in {**PROBLEMS, **PAPER}.items():
        mine = {choice.setting.method: choice for choice in choices if choice.setting.problem == row}
        if not mine:
            continue
        lines += ["", f"## {row} ({'judging' if problem.judging else 'development'})", ""]
        lines += [
            "| method | chosen | test accuracy (n) | difference | p (t), p (signs) | verdict "
            "| ms a step | ÷ SGD's | gradients | MiB |"
        ]
        lines += [f"|{' --- |' * 10}", *row_lines(results, row, mine)]
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
    best, apart = reference(results, row), differences(results, row)
    by_t = dict(zip(apart, sweep.holm([each.p_t for each in apart.values()]), strict=True))
    costs = next((r.outcome for r in results if (r.trial.problem, r.trial.stage) == (row, "cost")), {})
    lines = []
    for name in CONTENDERS:
        values = list(accuracies(results, row, name).values())
        if name not in choices or not values:
            continue
        mean, error = mean_and_error(values)
        cells = [name, chosen_text(choices[name]), f"{mean:.2f} ± {error:.2f} ({len(values)})"]
        if name == best:
            cells += ["", "", "the reference"]
        elif name in apart:
            found = apart[name]
            cells += [f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"]
            cells += [f"{by_t[name]:.3f}, {found.p_signs:.3f}", verdict(found, by_t[name])]
        else:
            cells += ["", "", ""]
        mine = costs.get("methods", {}).get(SGD if name == LONGER else name, {})
        # (Of a step, whichever the number of epochs is; the traces of a refresh or of a penalty are in its time alone.)
        shown = {"seconds": "{:.1f}", "ratio": "{:.2f}", "gradients": "{:g}", "mib": "{:.1f}"}
        ours = {**mine, "seconds": 1000 * mine["seconds"]} if "seconds" in mine else mine
        cells += [text.format(ours[key]) if key in ours else "" for key, text in shown.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(runs: Sequence[Run], path: Any) -> None:
    """Differences to the best of SAM and the ASAMs: a panel per row, a line per method, 95 % intervals.

    Args:
        runs: All lines of one run.
        path: Where the figure is written.
    """
    results = [trials.result_of(run) for run in runs]
    rows = [row for row in {**PROBLEMS, **PAPER} if differences(results, row)]
    if not rows:
        return
    figure, panels = pyplot().subplots(
        1, len(rows), figsize=(2.6 + 2.6 * len(rows), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for row, axis in zip(rows, panels[0], strict=True):
        apart = differences(results, row)
        axis.axvline(0.0, color="grey", linewidth=0.8)
        for place, name in enumerate(CONTENDERS):
            found = apart.get(name)
            if found is None:
                continue
            colour = "C3" if "MS" in name or "rows" in name else "C0" if name in BASELINES else "C7"
            if found.mean < _FURTHEST:  # what did not train would leave nothing to see of the others
                axis.text(_FURTHEST, place, f"◂ {found.mean:.1f}", color=colour, va="center", fontsize=8)
            else:
                bars = [[found.mean - found.low], [found.high - found.mean]]
                axis.errorbar([found.mean], [place], xerr=bars, fmt="o", color=colour, markersize=4)
        axis.set_xlim(_FURTHEST, -_FURTHEST / 2)
        axis.set_title(f"{row}\nagainst {reference(results, row)}", fontsize=8)
        axis.set_xlabel("points", fontsize=8)
    panels[0][0].set_yticks(range(len(CONTENDERS)), list(CONTENDERS), fontsize=8)
    panels[0][0].set_ylim(len(CONTENDERS) - 0.5, -0.5)
    save(figure, path)


def summary(runs: Sequence[Run]) -> list[Row]:
    """MSSAM and the regularised SGDs against the best of SAM and the ASAMs, row by row; and all against SGD's budget.

    Args:
        runs: All lines of one run.

    Returns:
        Rows of the report.
    """
    results = [trials.result_of(run) for run in runs]
    made = []
    for row, problem in {**PROBLEMS, **PAPER}.items():
        best, apart = reference(results, row), differences(results, row)
        corrected = dict(zip(apart, sweep.holm([each.p_t for each in apart.values()]), strict=True))
        for name, found in apart.items():
            ours = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] points (n = {found.n})"
            kind = "judging" if problem.judging else "development"
            claim = f"{row} ({kind}): {name} against {best}, the best of SAM and the ASAMs"
            made.append(Row(claim, ours, verdict(found, corrected[name]), detail=name not in SHOWN))
    return made


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
        value = setting.settings["options"][CONTENDERS[setting.method].scalar]
        there = f"{value:g}, {setting.settings['lr']:.3g}, {setting.settings['weight_decay']:g}"
        return there, f"{100 * setting.mean('held_out')[0]:.1f}"

    return lines + trials.search_log(results, words)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "equal_budget", FUNCTION, plan, arguments, SCALES)


if __name__ == "__main__":
    main()
