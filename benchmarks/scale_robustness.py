r"""Trained from rescaled but equal networks, over four orders of magnitude: whose accuracy and trajectory stay.

Every training has the same images and order, and starts from a network with the same function: as it is initialised,
and acted upon by a random element of the scale group, of layers or of single hidden units, whose factors span 1 to 4
decades.  ρ (or λ) and the learning rate are searched at the usual scale only, on held-out images with noisy labels, and
the weight decay is 5e-4 for all.  Measured are the test accuracy and the distance in function space,
‖p − q‖ / ‖q‖ of the probabilities of 500 held-out images, to the training from the usual start.  A training that
diverges is a result: it counts as one that guesses.

A further start has every weight perturbed by 10⁻⁶ of itself: floating-point arithmetic alone makes two trainings of
one network part, and nobody can be expected to stay closer than that.

A contender is *flat* if at every size, over the seeds, the mean difference of accuracy to the usual start is at most
half a point, its interval (95 % for all sizes together) contains 0, and the distance, at the end and on average over
the epochs, is at most twice that of the start with rounding (:mod:`benchmarks.flatness`).  In float32 rounding grows
until it hides small distances, so one seed of the MLP is trained in float64 as well, as it is and from the largest
size.

With BatchNorm the weights before a normaliser grow, and the function in training mode is unchanged up to ε over the
variance; the table says how far, and sizes where it changes by more than 10⁻³ are marked, and do not count.

Goal: MSSAM and MSRegularizedSGD ("move" and "rows"; with hidden units, granularity "neuron") are flat in networks
without BatchNorm.  These are development rows: test images may be looked at.

    MS_OPTIM_DATA=... python -m benchmarks.scale_robustness     about an hour of one core
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ms_optim import sweep
from ms_optim.errors import DivergedError
from ms_optim.sweep import Result, Trial

from . import trials
from .equivalent import DOUBLE, ROUNDING, compared, trajectory
from .figure import pyplot, save
from .flatness import DISTANCES, END, Curve, curve_of, verdict
from .harness import Run
from .problems import PROBLEMS, Problem, drawn, small_resnet, tiny
from .rows import Row as Line
from .training import accuracy, begun

FUNCTION = "benchmarks.scale_robustness:trained"
WEIGHT_DECAY, TUNING_SEED = 5e-4, 1_000
LAYERS, UNITS = "layer", "neuron"
ACTED = {LAYERS: "layers", UNITS: "hidden units"}

MLP, LENET = "MNIST 2,000, 20 % noise, MLP", "MNIST 2,000, 20 % noise, LeNet"
RESNET = "CIFAR-10 1,000, 20 % noise, BatchNorm ResNet"
#: A row of this claim's own: those with BatchNorm that others have are for judging.
OWN = {RESNET: Problem("cifar10", 1_000, 0.2, small_resnet, 7)}


@dataclass(frozen=True)
class Contender:
    """An optimizer and what is searched.

    Attributes:
        optimizer: ``"SGD"``, or a public name of the package.
        options: Its own.
        argument: What its radius is called; empty for none.
        radii: What is tried.
        acted: Rescalings that it is shown with.
        promised: Rescalings in which it is to be flat.
    """

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    argument: str = "rho"
    radii: tuple[float, ...] = (0.05, 0.1, 0.2)
    acted: tuple[str, ...] = (LAYERS, UNITS)
    promised: tuple[str, ...] = ()


_ADAPTIVE, _TRACE, _NOISE = (0.5, 1.0, 2.0), (3e-4, 1e-3, 3e-3), (1e-5, 1e-4, 1e-3)
_REGULARIZED = "MSRegularizedSGD"
_MOVE, _ROWS, _NOISY = {"rebalance": "move"}, {"rebalance": "rows"}, {"gradient": "noise"}
_SMALLEST, _FINE = {"gauge": 0.0}, {"rebalance": "move", "granularity": "neuron"}
CONTENDERS = {
    "SGD": Contender("SGD", argument="", radii=()),
    "SAM": Contender("SAM"),
    "ASAM, official": Contender("ASAM", {"operator": "official"}, radii=_ADAPTIVE),
    "ASAM, elementwise": Contender("ASAM", {"operator": "elementwise"}, radii=_ADAPTIVE),
    "ASAM, layer": Contender("ASAM", {"operator": "layer"}, radii=(0.005, 0.01, 0.02)),
    # The package's defaults first.
    "MSSAM, rows, κ = ½": Contender("MSSAM", {**_ROWS, "gauge": 0.5}, acted=(LAYERS,), promised=(LAYERS,)),
    "MSSAM, rows, κ = 0": Contender("MSSAM", {**_ROWS, **_SMALLEST}, acted=(LAYERS,), promised=(LAYERS,)),
    "MSSAM, move, κ = 0": Contender("MSSAM", {**_MOVE, **_SMALLEST}, promised=(LAYERS,)),
    "MSSAM, metric, κ = 0": Contender("MSSAM", {"rebalance": "metric", **_SMALLEST}, acted=(LAYERS,)),
    "MSRegularizedSGD, rows": Contender(_REGULARIZED, _ROWS, "strength", _TRACE, (LAYERS,), (LAYERS,)),
    "MSRegularizedSGD, move": Contender(_REGULARIZED, _MOVE, "strength", _TRACE, (LAYERS,), (LAYERS,)),
    "MSRegularizedSGD, noise, move": Contender(
        _REGULARIZED, {**_MOVE, **_NOISY}, "strength", _NOISE, (LAYERS,), (LAYERS,)
    ),
    "MSSAM, neurons": Contender("MSSAM", {**_FINE, **_SMALLEST}, acted=(UNITS,), promised=(UNITS,)),
    "MSRegularizedSGD, neurons": Contender(_REGULARIZED, _FINE, "strength", _TRACE, (UNITS,), (UNITS,)),
    "MSRegularizedSGD, noise, neurons": Contender(
        _REGULARIZED, {**_FINE, **_NOISY}, "strength", _NOISE, (UNITS,), (UNITS,)
    ),
}


#: Contenders at single hidden units → the same for layers.
_COARSE = {
    "MSSAM, neurons": "MSSAM, move, κ = 0",
    "MSRegularizedSGD, neurons": "MSRegularizedSGD, move",
    "MSRegularizedSGD, noise, neurons": "MSRegularizedSGD, noise, move",
}


@dataclass(frozen=True)
class Row:
    """What is trained on a problem.

    Attributes:
        sizes: What is rescaled → decades.
        epochs: A factor on those of the problem.
        seeds: Fresh ones.
        rates: Learning rates that are searched.
        normalised: Whether there is BatchNorm.
        double: Whether one seed is trained in float64 as well.
    """

    sizes: Mapping[str, tuple[float, ...]]
    epochs: float = 1.0
    seeds: int = 3
    rates: tuple[float, ...] = (0.02, 0.05, 0.1)
    normalised: bool = False
    double: bool = False


_ALL = (1.0, 2.0, 3.0, 4.0)
ROWS = {
    MLP: Row({LAYERS: _ALL, UNITS: _ALL}, epochs=0.4, double=True),
    LENET: Row({LAYERS: (2.0, 4.0)}, epochs=1 / 3, seeds=3, rates=(0.02, 0.05)),
    RESNET: Row({LAYERS: (2.0, 4.0)}, rates=(0.05, 0.1), normalised=True),
}
PANELS = tuple((row, granularity) for row, what in ROWS.items() for granularity in what.sizes)
# At the scale of seconds a LeNet is an MLP.
_ROWS_AT_SMOKE = (MLP, RESNET)
_AT_SMOKE = ("SGD", "MSSAM, move, κ = 0", "MSRegularizedSGD, neurons")


def problem_of(row: str, scale: str) -> Problem:
    """A problem, of this claim's own too.

    Args:
        row: Its name.
        scale: ``"smoke"`` or ``"cpu"``.

    Returns:
        The problem.
    """
    problem = {**PROBLEMS, **OWN}[row]
    return tiny(problem) if scale == "smoke" else problem


def trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train from the starts that settings name, or, where they name none, once at the usual scale.

    Args:
        settings: As of :func:`benchmarks.training.trained`; ``granularity``, ``starts``.

    Returns:
        Accuracy, shares of 1, and what there is to say of each start.

    Raises:
        DivergedError: If a training at the usual scale diverges whose settings are only tried.
    """
    problem = problem_of(settings["problem"], settings["scale"])
    data = drawn(problem, settings["seed"])
    if "starts" in settings:
        return compared(settings, problem, data)
    model, epochs = begun(problem, settings, data)
    if trajectory(model, settings, problem, data, epochs, None)[1]:
        raise DivergedError("the loss is not finite")
    return {"held_out": accuracy(model, *data.held_out)}


def trial(row: str, contender: str, lr: float, radius: float | None, seed: int, scale: str, **more: Any) -> Trial:
    """A call of :func:`trained`.

    Args:
        row: Of :data:`ROWS`.
        contender: Of :data:`CONTENDERS`.
        lr: The learning rate.
        radius: ρ or λ; ``None`` for SGD.
        seed: The seed.
        scale: The scale.
        **more: ``granularity`` and ``starts``, and ``dtype`` if it is not float32; nothing for a search.

    Returns:
        The trial.
    """
    optimizer = CONTENDERS[contender]
    options = {**optimizer.options, **({} if radius is None else {optimizer.argument: radius})}
    settings = {"problem": row, "scale": scale, "optimizer": optimizer.optimizer, "options": options, "lr": lr}
    settings |= {"weight_decay": WEIGHT_DECAY, "seed": seed, "epochs": 1.0 if scale == "smoke" else ROWS[row].epochs}
    return Trial(settings | more, contender, row, more.get("dtype", "fresh") if more else "tuning")


def plan(run: trials.Trainings) -> None:
    """Search at the usual scale, then train from rescaled starts with fresh seeds.

    Args:
        run: The trainings.
    """
    full = run.scale != "smoke"
    for row in ROWS if full else _ROWS_AT_SMOKE:
        what = ROWS[row]
        for name, contender in CONTENDERS.items():
            acted = [each for each in contender.acted if each in what.sizes]
            if not acted or not (full or name in _AT_SMOKE):
                continue
            searched = [(lr, radius) for lr in what.rates for radius in contender.radii or (None,)]
            wanted = [trial(row, name, *each, TUNING_SEED, run.scale) for each in searched[: None if full else 1]]
            (choice,) = sweep.choose(run(wanted), "held_out")
            lr = choice.setting.settings["lr"]
            chosen = (row, name, lr, choice.setting.settings["options"].get(contender.argument))
            for granularity in acted:
                sizes = what.sizes[granularity] if full else what.sizes[granularity][-1:]
                starts: list[float | str] = [0.0, ROUNDING, *sizes]
                seeds = range(what.seeds if full else 1)
                wanted = [trial(*chosen, s, run.scale, granularity=granularity, starts=starts) for s in seeds]
                if what.double:
                    starts = [0.0, sizes[-1]]
                    wanted += [trial(*chosen, 0, run.scale, granularity=granularity, starts=starts, dtype=DOUBLE)]
                run(wanted)


def body(runs: Sequence[Run]) -> list[str]:
    """The goal, and a table for each row.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    results = [trials.result_of(run) for run in runs]
    tables, found = [], []
    for row, granularity in PANELS:
        curves = curves_of(results, row, granularity)
        if curves:
            where = f"{row}; {ACTED[granularity]} rescaled"
            exact = {name: curve_of(results, row, granularity, name, DOUBLE) for name in curves}
            tables += ["", f"**{where}**", "", *_table(curves, exact)]
            promised = [
                name for name in curves if granularity in CONTENDERS[name].promised and not ROWS[row].normalised
            ]
            found += [(f"{name} ({where})", verdict(curves[name])) for name in promised]
    missed = [f"{name}: {word}" for name, word in found if word != "flat"]
    reached = f"**missed**: {'; '.join(missed)}" if missed else "reached" if found else "not measured"
    return [
        "Goal: MSSAM and MSRegularizedSGD are flat where there is no BatchNorm. "
        f"{len(found) - len(missed)} of {len(found)} comparisons are flat; {reached}. (Of contenders that are, "
        f"{0.05 * len(found):.2g} of {len(found)} would miss by chance, at intervals of 95 %.)",
        "",
        "Test accuracy in per cent by the decades that the factors span, mean ± standard error over n seeds, and how "
        "many diverged, if any did (×); the difference of the largest size that counts to the usual start, with its "
        "95 % interval; the distance in function space at the end (its mean over the epochs), means over the seeds. † "
        "The function in training mode is changed by more than 10⁻³: does not count.",
        *tables,
    ]


def curves_of(results: Sequence[Result], row: str, granularity: str) -> dict[str, Curve]:
    """What there is on a row.

    Args:
        results: All.
        row: The problem.
        granularity: What is rescaled.

    Returns:
        Contender → its curve.
    """
    found = {name: curve_of(results, row, granularity, name) for name in CONTENDERS}
    return {name: curve for name, curve in found.items() if curve is not None}


def _table(curves: Mapping[str, Curve], exact: Mapping[str, Curve | None]) -> list[str]:
    """The contenders of one row."""
    sizes = next(iter(curves.values())).sizes
    heads = ["contender", "usual", *(f"{size:g}" for size in sizes), "difference", "distance: rounding"]
    heads += ["distance: largest", *(["the same in float64"] if any(exact.values()) else []), "n", "verdict"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, curve in curves.items():
        largest = max(curve.counted, default=0.0)
        apart = curve.difference(largest)
        interval = "" if math.isnan(apart.low) else f" [{apart.low:+.2f}, {apart.high:+.2f}]"
        cells = [name, *(_accuracy(curve, start) for start in (0.0, *sizes))]
        cells += [f"{apart.mean:+.2f}{interval}", *(_distance(curve, start) for start in (ROUNDING, largest))]
        if any(exact.values()):
            double = exact[name]
            cells.append("" if double is None else _distance(double, max(double.sizes)))
        lines.append(f"| {' | '.join([*cells, str(apart.n), verdict(curve)])} |")
    return lines


def _accuracy(curve: Curve, start: float) -> str:
    """A cell: per cent, and what diverged."""
    mean, error = curve.accuracy(start)
    mark = "†" if start and start not in curve.counted else ""
    lost = f", {curve.diverged[start]}×" if curve.diverged[start] else ""
    return f"{mean:.2f}{'' if math.isnan(error) else f' ± {error:.2f}'}{mark}{lost}"


def _distance(curve: Curve, start: float | str) -> str:
    """A cell: at the end, and on average over the epochs."""
    end, mean = (curve.mean(start, quantity) for quantity in DISTANCES)
    return f"{end:.1e} ({mean:.1e})"


def summary(runs: Sequence[Run]) -> list[Line]:
    """Who stays where they promise it, and what the others come to.

    Args:
        runs: All lines of one run.

    Returns:
        Two rows of the report for each panel.
    """
    results = [trials.result_of(run) for run in runs]
    made = []
    for row, granularity in PANELS:
        promised, others, missed = [], [], []
        curves = curves_of(results, row, granularity)
        for name, curve in curves.items():
            largest = max(curve.counted, default=0.0)
            text = f"{name} {curve.accuracy(0.0)[0]:.1f} → {curve.accuracy(largest)[0]:.1f}"
            ours = granularity in CONTENDERS[name].promised
            (promised if ours else others).append(text)
            if ours and verdict(curve) != "flat":
                missed.append(f"{name}: {verdict(curve)}")
        if promised:
            where = f"{row}; {ACTED[granularity]} rescaled by up to {max(ROWS[row].sizes[granularity]):g} decades"
            word = f"**missed**: {'; '.join(missed)}" if missed else "all flat"
            made.append(Line(f"{where}: ours stay, test accuracy in per cent", "; ".join(promised), word))
            made.append(Line(f"{where}: the others", "; ".join(others), "for comparison"))
    return made


def in_short(runs: Sequence[Run]) -> str:
    """Ours and the others in one sentence.

    Args:
        runs: All lines of one run.

    Returns:
        A sentence of the report.
    """
    results = [trials.result_of(run) for run in runs]
    ours: list[bool] = []
    without: list[bool] = []
    others: list[bool] = []
    for row, granularity in PANELS:
        for name, curve in curves_of(results, row, granularity).items():
            method = CONTENDERS[name]
            theirs = others if method.optimizer in ("SGD", "SAM", "ASAM") else without
            (ours if granularity in method.promised else theirs).append(verdict(curve) == "flat")
    return (
        "From networks that are one function, rescaled by factors that span up to four decades, those variants of "
        "MSSAM and MSRegularizedSGD that promise it reach the same accuracy on the same trajectory in "
        f"{sum(ours)} of {len(ours)} comparisons (networks, layers or hidden units, variants), those that do not "
        f"(metric; layers alone where hidden units are rescaled) in {sum(without)} of {len(without)}, and SGD, SAM and "
        f"ASAM in {sum(others)} of {len(others)}."
    )


def details(runs: Sequence[Run]) -> list[str]:
    """What was chosen, and what rescaling changed of the functions.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    results = [trials.result_of(run) for run in runs]
    lines = ["Largest relative change of the logits by rescaling, over seeds: evaluation mode, training mode.", ""]
    lines += ["| row | rescaled | decades: changes |", "| --- | --- | --- |"]
    for row, granularity in PANELS:
        for curve in list(curves_of(results, row, granularity).values())[:1]:  # the same starts for all
            changes = [
                [max(curve.values[size][of]) for of in ("function_error", "training_error")] for size in curve.sizes
            ]
            cells = [f"{size:g}: {f:.1e}, {t:.1e}" for size, (f, t) in zip(curve.sizes, changes, strict=True)]
            lines.append(f"| {row} | {ACTED[granularity]} | {'; '.join(cells)} |")
    lines += ["", "The search at the usual scale: lr/radius: held-out accuracy, per cent; × where it diverged.", ""]
    lines += ["| row | contender | chosen | settings |", "| --- | --- | --- | --- |"]
    for choice in sweep.choose(results, "held_out"):
        name, row = choice.setting.method, choice.setting.problem
        tried = [s for s in sweep.settings_of(results) if (s.problem, s.method, s.stage) == (row, name, "tuning")]
        cells = [f"{_named(s.settings, name)}: {_held_out(s)}" for s in tried]
        edge = f" (edge: {', '.join(e.removeprefix('options.') for e in choice.edges)})" if choice.edges else ""
        lines.append(f"| {row} | {name} | {_named(choice.setting.settings, name)}{edge} | {'; '.join(cells)} |")
    return lines


def _named(settings: Mapping[str, Any], contender: str) -> str:
    """Learning rate and radius."""
    radius = settings["options"].get(CONTENDERS[contender].argument)
    return f"{settings['lr']:g}" + ("" if radius is None else f"/{radius:g}")


def _held_out(setting: sweep.Setting) -> str:
    """Per cent."""
    values = list(setting.values("held_out").values())
    return f"{100 * statistics.fmean(values):.1f}" if values else "×"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Accuracy and distance against decades, a column for each row and what is rescaled.

    Args:
        runs: All lines of one run.
        path: Where to write the figure.
    """
    results = [trials.result_of(run) for run in runs]
    size = (4 * len(PANELS), 8)
    figure, panels = pyplot().subplots(2, len(PANELS), figsize=size, sharex="col", squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    # One colour for an optimizer, whatever it rescales: ten, which matplotlib has, and black and gold.
    tones = [*(f"C{i}" for i in range(10)), "black", "gold"]
    colours = dict(zip((name for name in CONTENDERS if name not in _COARSE), tones, strict=True))
    for column, (row, granularity) in enumerate(PANELS):
        upper, lower = panels[0][column], panels[1][column]
        curves = curves_of(results, row, granularity)
        for name, curve in curves.items():
            style = {"color": colours[_COARSE.get(name, name)], "marker": "o", "markersize": 4, "label": name}
            style["linestyle"] = "-" if granularity in CONTENDERS[name].promised else "--"
            places = [0.0, *curve.sizes]
            means, errors = zip(*(curve.accuracy(start) for start in places), strict=True)
            upper.errorbar(places, means, errors, capsize=3, **style)
            # The usual start is at no distance from itself: in its place, the one with rounding.
            lower.plot(places, [curve.mean(ROUNDING, END), *(curve.mean(size, END) for size in curve.sizes)], **style)
        if ROWS[row].normalised and curves:
            curve = next(iter(curves.values()))
            changes = [max(curve.values[size]["training_error"]) for size in curve.sizes]
            lower.plot(curve.sizes, changes, "k:", marker="x", label="the function in training mode, at the start")
        upper.set_title(f"{row}\n{ACTED[granularity]} rescaled", fontsize=9)
        lower.set(yscale="log", xlabel="decades (0 in the lower panel: rounding)")
        upper.grid(alpha=0.3)
        lower.grid(alpha=0.3)
        handles |= dict(zip(*reversed(lower.get_legend_handles_labels()), strict=True))
    panels[0][0].set_ylabel("test accuracy, %")
    panels[1][0].set_ylabel("distance to the usual trajectory, at the end")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "scale_robustness", FUNCTION, plan, arguments, scales=("smoke", "cpu"))


if __name__ == "__main__":
    main()
