r"""Choosing ρ and λ: test accuracy against the one number that an optimizer of the package adds.

Handwritten digits with 20 % of the training labels redrawn: the demo's networks, batches, base settings and epochs
(1,000 images for training, 797 held out, 20 epochs, SGD 0.1 with momentum 0.9, weight decay 5e-4, cosine), the same for
all.  A seed fixes split, noise, weights and order of batches, so a column is paired.  The held-out images are used to
*compare values*, not to report an optimizer's accuracy: the demo's table has its own seeds, and the values that are
best here for what it trains.

    python -m benchmarks.choosing            13 minutes of one core, in all
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ms_optim.demo import training
from ms_optim.sweep import Trial

from . import trials
from .entrants import ROWS, TRACE, Contender
from .harness import Run
from .rows import Row, compared, mean, seed_by_seed
from .training import optimizer_of

FUNCTION = "benchmarks.choosing:trained"
SCALES = ("smoke", "cpu")
LABEL_NOISE, EPOCHS = 0.2, 20
#: The demo's own are 0, 1 and 2.
SEEDS = {"mlp": (100, 101, 102), "resnet": (100, 101)}


_RADII, _STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8), (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_ADAPTIVE = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
SWEEPS: dict[str, Contender] = {
    "SAM": Contender("SAM", "rho", _RADII),
    # ASAM's radii are no lengths, and have a table of their own.
    "ASAM": Contender("ASAM", "rho", _ADAPTIVE, {"operator": "official", "eta": 0.01}, shown="ρ of ASAM"),
    "MSSAM": Contender("MSSAM", "rho", _RADII, {**ROWS, "gauge": 0.5}),
    "MSSAM, κ = 0": Contender("MSSAM", "rho", _RADII, {**ROWS, "gauge": 0.0}),
    "MSSAM, κ = 1": Contender("MSSAM", "rho", _RADII, {**ROWS, "gauge": 1.0}),
    "MSSAM, move, κ = 0": Contender("MSSAM", "rho", _RADII, {**ROWS, "rebalance": "move", "gauge": 0.0}),
    "MSRegularizedSGD": Contender("MSRegularizedSGD", "strength", _STRENGTHS, TRACE, shown="λ"),
    "MSRegularizedSGD, noise": Contender(
        "MSRegularizedSGD", "strength", _STRENGTHS, {**TRACE, "gradient": "noise"}, shown="λ"
    ),
    "MSRegularizedSGD, antithetic": Contender(
        "MSRegularizedSGD", "strength", _STRENGTHS, {**TRACE, "gradient": "antithetic"}, shown="λ"
    ),
}


def trial(network: str, name: str, value: float, seed: int, epochs: int = EPOCHS) -> Trial:
    """One training.

    Args:
        network: Of the demo's.
        name: Of :data:`SWEEPS`.
        value: Of the scalar.
        seed: The seed.
        epochs: How often.

    Returns:
        The trial.
    """
    sweep = SWEEPS[name]
    settings: dict[str, Any] = {"network": network, "optimizer": sweep.optimizer}
    settings |= {"options": {**sweep.options, sweep.scalar: value}, "base": training.BASE}
    settings |= {"epochs": epochs, "label_noise": LABEL_NOISE, "seed": seed}
    return Trial(settings, name, network)


def trained(settings: Mapping[str, Any]) -> dict[str, float]:
    """Train once.

    Args:
        settings: As of :func:`trial`.

    Returns:
        ``held_out``: the accuracy on the held-out images, a share of 1.
    """
    base, seed = settings["base"], settings["seed"]
    data = training.digits(seed, settings["label_noise"])
    torch.manual_seed(seed)
    model = training.MODELS[settings["network"]]()
    own = {**settings["options"], "momentum": base["momentum"]}
    optimizer = optimizer_of(model, settings["optimizer"], base["lr"], base["weight_decay"], own)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["epochs"])
    for batches in itertools.islice(training.epochs(data, seed), settings["epochs"]):
        for x, y in batches:
            training.step(model, optimizer, x, y)
        scheduler.step()
    return {"held_out": training.accuracy(model, data.x_test, data.y_test)}


def plan(run: trials.Trainings) -> None:
    """Every value from every seed.

    Args:
        run: The trainings.
    """
    if run.scale == "smoke":
        run([trial("mlp", name, sweep.values[3], 100, epochs=1) for name, sweep in SWEEPS.items()])
        return
    for network, seeds in SEEDS.items():
        wanted = ((name, value) for name, sweep in SWEEPS.items() for value in sweep.values)
        run([trial(network, name, value, seed) for name, value in wanted for seed in seeds])


def body(runs: Sequence[Run]) -> list[str]:
    """Mean ± standard error per value, the best of each row in bold.

    Args:
        runs: All lines.

    Returns:
        Lines of Markdown.
    """
    lines = ["Accuracy in per cent on the held-out images, mean ± standard error over seeds; a row's best in bold."]
    for symbol in dict.fromkeys(sweep.shown for sweep in SWEEPS.values()):
        mine = [run for run in runs if SWEEPS[run["contender"]].shown == symbol]
        if not mine:
            continue
        values = sorted({value_of(run) for run in mine})
        lines += ["", f"| network | optimizer | {' | '.join(f'{symbol} = {value:g}' for value in values)} | seeds |"]
        lines += ["| --- | --- |" + " --- |" * (len(values) + 1)]
        for network, name in dict.fromkeys((run["network"], run["contender"]) for run in mine):
            found = accuracies(runs, network, name)
            cells = {value: mean(list(found[value].values()), 1) if value in found else "" for value in values}
            cells[best(found)] = f"**{cells[best(found)]}**"
            seeds = max(len(each) for each in found.values())
            lines.append(f"| {network} | {name} | {' | '.join(cells.values())} | {seeds} |")
    return lines


def value_of(run: Run) -> float:
    """The value of a line's scalar."""
    return SWEEPS[run["contender"]].value(run["settings"])


def accuracies(runs: Sequence[Run], network: str, name: str) -> dict[float, dict[int, float]]:
    """Accuracy for each value and seed.

    Args:
        runs: All lines.
        network: The network.
        name: Of :data:`SWEEPS`.

    Returns:
        Value → seed → per cent.
    """
    found: dict[float, dict[int, float]] = {}
    for run in runs:
        if (run["network"], run["contender"]) == (network, name) and "held_out" in run:
            found.setdefault(value_of(run), {})[run["round"]] = 100 * run["held_out"]
    return found


def best(found: Mapping[float, Mapping[int, float]]) -> float:
    """The value with the largest mean; the smallest of equal ones.

    Args:
        found: Value → seed → accuracy.

    Returns:
        The value.
    """
    return max(sorted(found), key=lambda value: statistics.fmean(found[value].values()))


def summary(runs: Sequence[Run]) -> list[Row]:
    """MSSAM beside SAM, each at its best ρ.

    Args:
        runs: All lines.

    Returns:
        A row for each network.
    """
    rows = []
    for network in dict.fromkeys(run["network"] for run in runs):
        sam, ours = (accuracies(runs, network, name) for name in ("SAM", "MSSAM"))
        if not sam or not ours:
            continue
        theirs, mine = sam[best(sam)], ours[best(ours)]
        claim = f"digits with noisy labels, {network}: MSSAM, accuracy over SAM's, in points, each at its best ρ"
        rows.append(Row(claim, *compared(seed_by_seed(mine, theirs))))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "choosing", FUNCTION, plan, arguments, SCALES)


if __name__ == "__main__":
    main()
