r"""What MSSAM leads by, or not: the representative, the metric, and how the descent there is tuned.  Development rows.

MSSAM climbs and descends at one canonical representative of the equivalent networks.  Which one is a choice (κ: 0 the
smallest trace, ½ the smallest product of trace and squared norm, 1 the smallest norm), as are the granularity (layers,
single hidden units), what is moved (the weights, or the metric alone), the metric there (the identity, or ASAM's
|W|), how often the representative is found anew, and when the perturbation begins.  Every variant has the same search:
five radii and three learning rates, two seeds, chosen by accuracy on held-out images with noisy labels; what was chosen
is trained from fresh seeds.  SAM and ASAM are searched in the same way.

This is an exploration: it may be looked at as often as one likes, what is best here is best by choice, and the
package's defaults are judged on other rows (:mod:`benchmarks.equal_budget`).

    MS_OPTIM_DATA=... python -m benchmarks.gauge
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ms_optim import sweep
from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Difference, Result, Trial

from . import trials
from .harness import Run
from .rows import Row, compared

FUNCTION = "benchmarks.training:trained"
RATES = (0.02, 0.05, 0.1)
WEIGHT_DECAY = 5e-4
SEEDS, FRESH = (1_000, 1_001), range(6)
REFERENCE = "SAM"

_RADII = (0.03, 0.06, 0.12, 0.24, 0.48)
#: Contender → optimizer, its options, its radii.
VARIANTS: dict[str, tuple[str, Mapping[str, Any], tuple[float, ...]]] = {
    "SGD": ("SGD", {}, ()),
    REFERENCE: ("SAM", {}, _RADII),
    "ASAM, official": ("ASAM", {"operator": "official"}, (0.25, 0.5, 1.0, 2.0, 4.0)),
    "ASAM, elementwise": ("ASAM", {"operator": "elementwise"}, (0.25, 0.5, 1.0, 2.0, 4.0)),
    "ASAM, layer": ("ASAM", {"operator": "layer"}, (0.01, 0.02, 0.04, 0.08, 0.16)),
    **{f"MSSAM, κ = {kappa:g}": ("MSSAM", {"gauge": kappa}, _RADII) for kappa in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "MSSAM, metric": ("MSSAM", {"rebalance": "metric"}, _RADII),
    "MSSAM, metric, κ = 1": ("MSSAM", {"rebalance": "metric", "gauge": 1.0}, _RADII),
    "MSSAM, neurons": ("MSSAM", {"granularity": "neuron"}, _RADII),
    "MSSAM, neurons, κ = 1": ("MSSAM", {"granularity": "neuron", "gauge": 1.0}, _RADII),
    "MSSAM, refresh every 10 steps": ("MSSAM", {"refresh_every": 10}, _RADII),
    "MSSAM, refresh once": ("MSSAM", {"refresh_every": 10**9}, _RADII),
    "MSSAM, κ = 1, refresh once": ("MSSAM", {"gauge": 1.0, "refresh_every": 10**9}, _RADII),
    "MSSAM, exact traces": ("MSSAM", {"columns": None}, _RADII),
    "MSSAM, from step 100 on": ("MSSAM", {"start": 100}, _RADII),
    "MSSAM, κ = 1, from step 100 on": ("MSSAM", {"gauge": 1.0, "start": 100}, _RADII),
    "|W| (elementwise ASAM) at κ = 0": ("ASAM", {"operator": "elementwise", "rebalance": "move"}, (0.25, 0.5, 1, 2, 4)),
    "|W| (elementwise ASAM) at κ = 1": (
        "ASAM",
        {"operator": "elementwise", "rebalance": "move", "gauge": 1.0},
        (0.25, 0.5, 1, 2, 4),
    ),
    "‖W‖ (layer ASAM) at κ = 0": ("ASAM", {"operator": "layer", "rebalance": "move"}, (0.01, 0.02, 0.04, 0.08, 0.16)),
    "‖W‖ (layer ASAM) at κ = 1": (
        "ASAM",
        {"operator": "layer", "rebalance": "move", "gauge": 1.0},
        (0.01, 0.02, 0.04, 0.08, 0.16),
    ),
}
#: Those that are searched on the second row as well, where a training takes longer.
ON_LENET = (
    *("SGD", REFERENCE, "ASAM, elementwise", "ASAM, layer", "MSSAM, κ = 0", "MSSAM, κ = 0.5", "MSSAM, κ = 1"),
    "‖W‖ (layer ASAM) at κ = 1",
)
ROWS = {"MNIST 2,000, 20 % noise, MLP": tuple(VARIANTS), "MNIST 2,000, 20 % noise, LeNet": ON_LENET}


def trial(row: str, contender: str, lr: float, radius: float | None, seed: int, scale: str, stage: str) -> Trial:
    """One training.

    Args:
        row: The problem.
        contender: Of :data:`VARIANTS`.
        lr: The learning rate.
        radius: ρ; ``None`` for SGD.
        seed: The seed.
        scale: The scale.
        stage: What for.

    Returns:
        The trial.
    """
    optimizer, options, _ = VARIANTS[contender]
    radii = {} if radius is None else {"rho": radius}
    settings = {"problem": row, "scale": scale, "optimizer": optimizer, "options": {**options, **radii}}
    # The rows are for development: test images may be looked at, and say more than as few held-out ones.
    settings |= {"lr": lr, "weight_decay": WEIGHT_DECAY, "seed": seed, "test": True}
    return Trial(settings, contender, row, stage)


def plan(run: trials.Trainings) -> None:
    """Search, then train the chosen from fresh seeds.

    Args:
        run: The trainings.
    """
    full = run.scale != "smoke"
    for row, contenders in ROWS.items():
        for contender in contenders if full else (*list(contenders)[:2], contenders[-1]):
            radii = VARIANTS[contender][2] or (None,)
            wanted = [
                trial(row, contender, lr, radius, seed, run.scale, "tuning")
                for lr in (RATES if full else RATES[:1])
                for radius in (radii if full else radii[:2])
                for seed in (SEEDS if full else SEEDS[:1])
            ]
            (choice,) = sweep.choose(run(wanted), "held_out")
            chosen = choice.setting.settings
            radius = chosen["options"].get("rho")
            fresh = [trial(row, contender, chosen["lr"], radius, s, run.scale, "fresh") for s in FRESH]
            run(fresh if full else fresh[:2])


def body(runs: Sequence[Run]) -> list[str]:
    """What was chosen, what it gave, and the difference to SAM.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    results = [trials.result_of(run) for run in runs]
    lines = [
        "Test accuracy in per cent, mean ± standard error over fresh seeds; difference to SAM, seed by seed, with its "
        "95 % interval. Nothing is corrected for the number of variants: what is best here is a candidate.",
        "",
        "| row | variant | lr | ρ | test accuracy | difference to SAM | n |",
        f"|{' --- |' * 7}",
    ]
    choices = {(c.setting.problem, c.setting.method): c for c in sweep.choose(results, "held_out")}
    for (row, contender), choice in choices.items():
        mine, reference = fresh_accuracy(results, row, contender), fresh_accuracy(results, row, REFERENCE)
        if not mine:
            continue
        mean, error = mean_and_error(list(mine.values()))
        apart = Difference.of([mine[seed] - reference[seed] for seed in mine if seed in reference])
        text = "" if contender == REFERENCE else f"{apart.mean:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}]"
        setting = choice.setting.settings
        radius = setting["options"].get("rho")
        cells = [row, contender, _marked(setting["lr"], RATES)]
        cells += ["" if radius is None else _marked(radius, VARIANTS[contender][2])]
        lines.append(f"| {' | '.join([*cells, f'{mean:.2f} ± {error:.2f}', text, str(len(mine))])} |")
    return lines


def _marked(value: float, tried: Sequence[float]) -> str:
    """A value, and whether it is at the edge of what was tried."""
    return f"{value:g}{' (edge)' if sweep.at_edge(value, tried) else ''}"


def fresh_accuracy(results: Sequence[Result], row: str, contender: str) -> dict[int, float]:
    """Test accuracy from fresh seeds.

    Args:
        results: All.
        row: The problem.
        contender: The variant.

    Returns:
        Seed → per cent.
    """
    mine = [r for r in results if (r.trial.problem, r.trial.method, r.trial.stage) == (row, contender, "fresh")]
    return {int(r.trial.seed): 100 * value for r in mine if (value := r.value("test")) is not None}


def summary(runs: Sequence[Run]) -> list[Row]:
    """Every variant against SAM.

    Args:
        runs: All lines of one run.

    Returns:
        A row for the best of the variants on each problem, and details for the others.
    """
    results = [trials.result_of(run) for run in runs]
    made = []
    for row in ROWS:
        base = fresh_accuracy(results, row, REFERENCE)
        for contender in VARIANTS:
            mine = fresh_accuracy(results, row, contender)
            if mine and contender != REFERENCE:
                ours, word = compared([value - base[seed] for seed, value in mine.items() if seed in base])
                claim = f"{row} (development): {contender} against SAM"
                made.append(Row(claim, f"{ours} points", word, detail=not contender.startswith("MSSAM, κ")))
    return made


def details(runs: Sequence[Run]) -> list[str]:
    """The log: what every setting gave.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    results = [trials.result_of(run) for run in runs if run["stage"] == "tuning"]
    lines = ["The search: lr/ρ: held-out (test) accuracy, per cent, means of the seeds; × where one diverged.", ""]
    lines += ["| row | variant | settings |", "| --- | --- | --- |"]
    cells: dict[tuple[str, str], list[str]] = {}
    for setting in sweep.settings_of(results):
        held, test = (100 * setting.mean(metric)[0] for metric in ("held_out", "test"))
        lost = "×" if setting.count("finished") < len(setting.results) else f"{held:.1f} ({test:.1f})"
        radius = setting.settings["options"].get("rho", "–")
        cells.setdefault((setting.problem, setting.method), []).append(f"{setting.settings['lr']:g}/{radius}: {lost}")
    return lines + [f"| {row} | {contender} | {'; '.join(found)} |" for (row, contender), found in cells.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "gauge", FUNCTION, plan, arguments, scales=("smoke", "cpu"))


if __name__ == "__main__":
    main()
