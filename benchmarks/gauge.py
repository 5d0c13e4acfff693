r"""What MSSAM leads by, or not: the representative, the metric, and how the descent there is tuned.  Development rows.

MSSAM climbs and descends at canonical representatives of the equivalent networks.  Which ones is a choice: of the
climb's ball κ (0 the smallest trace, ½ the smallest product of trace and squared norm, 1 the smallest norm); of the
descent whether it is from there ("move"), from rows of one size ("rows"), or from wherever the weights are ("metric").
So are the granularity (layers, single hidden units), a further factor in the metric (ASAM's |W| or ‖W‖), how often the
representatives are found anew, when the perturbation begins, and the length of the step (StableSAM's).  Every variant
has the same search: four values of its own scalar and three learning rates, two seeds, chosen by accuracy on held-out
images with noisy labels; what was chosen is trained from fresh seeds.  SAM and ASAM are searched in the same way.

This is an exploration: it may be looked at as often as one likes, what is best here is best by choice, and the
package's defaults are judged on other rows (:mod:`benchmarks.equal_budget`).  Frozen with it are "rows" and κ = ½,
found anew every 100 steps from two exact columns and a signed one: refreshes that are rarer, more frequent or exact, a
late beginning and a normalised step gave no more.  ASAM's layers at "rows", which gave most, are judged beside them.

    MS_OPTIM_DATA=... python -m benchmarks.gauge
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ms_optim import sweep
from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Difference, Trial

from . import trials
from .entrants import Contender
from .equal_budget_page import accuracies
from .harness import Run
from .rows import Row, compared, in_one_row, seed_by_seed

FUNCTION = "benchmarks.training:trained"
RATES = (0.01, 0.02, 0.05)
WEIGHT_DECAY = 5e-4
SEEDS, FRESH = (1_000, 1_001), range(6)
REFERENCE = "SAM"


_RADII = (0.04, 0.06, 0.09, 0.13)
_ELEMENTS, _LAYERS, _STRENGTHS = (0.5, 1.0, 2.0, 4.0), (0.003, 0.005, 0.007, 0.01), (1e-4, 3e-4, 1e-3, 3e-3)
_DEFAULT = {"rebalance": "rows", "gauge": 0.5}
VARIANTS: dict[str, Contender] = {
    REFERENCE: Contender("SAM", "rho", _RADII),
    "SGD": Contender("SGD", "momentum", (0.0, 0.8, 0.9, 0.95)),
    "ASAM, layer": Contender("ASAM", "rho", _LAYERS, {"operator": "layer"}),
    "MSSAM, move, κ = 0": Contender("MSSAM", "rho", _RADII, {"rebalance": "move", "gauge": 0.0}),
    "MSSAM, rows, κ = 0": Contender("MSSAM", "rho", _RADII, {"rebalance": "rows", "gauge": 0.0}),
    "MSSAM, rows, κ = 1": Contender("MSSAM", "rho", _RADII, {"rebalance": "rows", "gauge": 1.0}),
    "MSSAM, rows, κ = ½": Contender("MSSAM", "rho", _RADII, {"rebalance": "rows", "gauge": 0.5}),
    "MSSAM, move, κ = 1": Contender("MSSAM", "rho", _RADII, {"rebalance": "move", "gauge": 1.0}),
    "MSSAM, move, κ = ½": Contender("MSSAM", "rho", _RADII, {"rebalance": "move", "gauge": 0.5}),
    "ASAM, layer, at rows": Contender("ASAM", "rho", _LAYERS, {"operator": "layer", "rebalance": "rows"}),
    "ASAM, elementwise": Contender("ASAM", "rho", _ELEMENTS, {"operator": "elementwise"}),
    "ASAM, official": Contender("ASAM", "rho", _ELEMENTS, {"operator": "official"}),
    "ASAM, elementwise, at rows": Contender("ASAM", "rho", _ELEMENTS, {"operator": "elementwise", "rebalance": "rows"}),
    "MSRegularizedSGD, move": Contender("MSRegularizedSGD", "strength", _STRENGTHS, {"rebalance": "move"}),
    "MSRegularizedSGD, rows": Contender("MSRegularizedSGD", "strength", _STRENGTHS, {"rebalance": "rows"}),
    "MSSAM, metric, κ = 0": Contender("MSSAM", "rho", _RADII, {"rebalance": "metric", "gauge": 0.0}),
    "MSSAM, move, neurons": Contender(
        "MSSAM", "rho", _RADII, {"rebalance": "move", "gauge": 0.0, "granularity": "neuron"}
    ),
    # What follows varies the defaults, which are at κ = ½.
    "MSSAM, rows, κ = ½, every 10 steps": Contender("MSSAM", "rho", _RADII, {**_DEFAULT, "refresh_every": 10}),
    "MSSAM, rows, κ = ½, once": Contender("MSSAM", "rho", _RADII, {**_DEFAULT, "refresh_every": 10**9}),
    "MSSAM, rows, κ = ½, from step 100 on": Contender("MSSAM", "rho", _RADII, {**_DEFAULT, "start": 100}),
    "MSSAM, rows, κ = ½, exact traces": Contender("MSSAM", "rho", _RADII, {**_DEFAULT, "columns": None}),
    "step normalised (StableSAM), rows, κ = ½": Contender("StableSAM", "rho", _RADII, _DEFAULT),
}
#: The other development row, LeNet, where a training takes longer, is searched by equal_budget, a method each.
ROWS = {"MNIST 2,000, 20 % noise, MLP": tuple(VARIANTS)}


def trial(row: str, contender: str, lr: float, value: float, seed: int, scale: str, stage: str) -> Trial:
    """One training.

    Args:
        row: The problem.
        contender: Of :data:`VARIANTS`.
        lr: The learning rate.
        value: Of the variant's scalar.
        seed: The seed.
        scale: The scale.
        stage: What for.

    Returns:
        The trial.
    """
    variant = VARIANTS[contender]
    settings: dict[str, Any] = {"problem": row, "scale": scale, "optimizer": variant.optimizer}
    settings |= {"options": {**variant.options, variant.scalar: value}}
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
        for contender in contenders if full else (*contenders[:2], contenders[-1]):
            values = VARIANTS[contender].values
            wanted = [
                trial(row, contender, lr, value, seed, run.scale, "tuning")
                for lr in (RATES if full else RATES[-1:])
                for value in (values if full else values[:2])
                for seed in (SEEDS if full else SEEDS[:1])
            ]
            (choice,) = sweep.choose(run(wanted), "held_out")
            chosen = choice.setting.settings
            best = VARIANTS[contender].value(chosen)
            fresh = [trial(row, contender, chosen["lr"], best, seed, run.scale, "fresh") for seed in FRESH]
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
        "| row | variant | lr | ρ, λ or momentum | test accuracy | difference to SAM | n |",
        f"|{' --- |' * 7}",
    ]
    choices = {(c.setting.problem, c.setting.method): c for c in sweep.choose(results, "held_out")}
    for (row, contender), choice in choices.items():
        mine, reference = (
            accuracies(results, row, contender),
            accuracies(results, row, REFERENCE),
        )
        if not mine:
            continue
        mean, error = mean_and_error(list(mine.values()))
        apart = Difference.of(seed_by_seed(mine, reference))
        text = "" if contender == REFERENCE else f"{apart.mean:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}]"
        setting = choice.setting.settings
        own = _marked(VARIANTS[contender].value(setting), VARIANTS[contender].values)
        cells = [row, contender, _marked(setting["lr"], RATES), own]
        lines.append(f"| {' | '.join([*cells, f'{mean:.2f} ± {error:.2f}', text, str(len(mine))])} |")
    missing = [
        f"{contender} ({row})"
        for row, contenders in ROWS.items()
        for contender in contenders
        if not accuracies(results, row, contender)
    ]
    return lines + (["", f"Not measured: {'; '.join(missing)}."] if missing else [])


def _marked(value: float, tried: Sequence[float]) -> str:
    """A value, and whether it is at the edge of what was tried."""
    return f"{value:g}{' (edge)' if sweep.at_edge(value, tried) else ''}"


def summary(runs: Sequence[Run]) -> list[Row]:
    """Every variant against SAM.

    Args:
        runs: All lines of one run.

    Returns:
        Of each problem a row for those at the representative of rows, and a detail for the others.
    """
    results = [trials.result_of(run) for run in runs]
    made = []
    for row in ROWS:
        base = accuracies(results, row, REFERENCE)
        mine = {name: accuracies(results, row, name) for name in VARIANTS if name != REFERENCE}
        found = [(name, *compared(seed_by_seed(values, base))) for name, values in mine.items() if values]
        for detail in (False, True):
            some = [each for each in found if ("rows" not in each[0]) is detail]
            if some:
                claim = f"{row} (development): variants against SAM, in points"
                made.append(Row(claim, *in_one_row(some), detail=detail))
    return made


def details(runs: Sequence[Run]) -> list[str]:
    """The log: what every setting gave.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    results = [trials.result_of(run) for run in runs if run["stage"] == "tuning"]
    lines = ["The search: lr/scalar: held-out (test) accuracy, per cent, means of the seeds; × where one diverged.", ""]
    lines += ["| row | variant | settings |", "| --- | --- | --- |"]

    def words(setting: sweep.Setting) -> tuple[str, str]:
        held, test = (100 * setting.mean(metric)[0] for metric in ("held_out", "test"))
        return (
            f"{setting.settings['lr']:g}/{VARIANTS[setting.method].value(setting.settings):g}",
            f"{held:.1f} ({test:.1f})",
        )

    return lines + trials.search_log(results, words)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "gauge", FUNCTION, plan, arguments, scales=("smoke", "cpu"))


if __name__ == "__main__":
    main()
