r"""Noisy labels and few data: the universal class of sharpness measures, RSAM and MSSAM beside SAM, tuned alike.

Two settings of Tahmasebi et al., arXiv 2406.03682, at a small scale: 10,000 images of MNIST with 20 % of the training
labels redrawn, for 20 epochs, and a tenth of its images, for 30, each with the MLP 784-256-10.  It is also a test of
the gain of RSAM over SAM that arXiv 2510.07758 reports (0.2 to 2.6 points), whose ρ and order were chosen on the test
images, and SAM's ρ was not.

Protocol: 5,000 training images are held out, *with labels as noisy as the others*, and every optimizer gets the same
number of trials (nine settings, one seed) to be chosen by accuracy on them: ρ; ρ and λ; ρ and order; of SGD, which has
nothing else, the weight decay.  Learning rate, momentum, batch, epochs and cosine schedule are the same for all, and so
is the weight decay of all others.  Then the chosen setting is trained from five fresh seeds, each of which draws the
images, the noise, the held-out part, the weights and the order, the same for all optimizers, and the 10,000 test images
are looked at once.  The table has the mean ± standard error, and that of the paired difference to SAM; a difference
counts if it exceeds two standard errors.  A choice at the edge of its grid is marked.  (Passes per step: SGD, TraceSAM
1; SAM, ASAM, MSSAM, RSAM, DetSAM 2; FrobSAM 3.  Epochs are equal, not time.)  MSSAM is at the α*-representative itself
("move", κ = 0).

    MS_OPTIM_DATA=... python -m benchmarks.universal_class     about ten minutes on two idle cores
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ms_optim
from ms_optim import sweep
from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Difference, Result, Trial

from .harness import RESULTS, Run, environment, folder_name, record
from .problems import Problem, drawn, tiny
from .rows import NOTHING, Row, compared, found_difference, seed_by_seed
from .training import accuracy, descend, late_start

BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
BATCH = 128
TUNING_SEED, FRESH_SEEDS = 1_000, 5
_SETTINGS = ("problem", "optimizer", "setting", "seed", "full")
Grid = tuple[dict[str, float], ...]


def shallow() -> nn.Module:
    """The MLP 784-256-10."""
    return ms_optim.models.MLP((784, 256, 10))


PROBLEMS = {
    "20 % label noise": Problem("mnist", 10_000, 0.2, shallow, 20, BATCH),
    "a tenth of the data": Problem("mnist", 6_000, 0.0, shallow, 30, BATCH),
}


def line(name: str, *values: float) -> Grid:
    """One argument's values.

    Args:
        name: The argument.
        *values: In order.

    Returns:
        Settings.
    """
    return tuple({name: value} for value in values)


def cross(first: Grid, second: Grid) -> Grid:
    """All pairs of two arguments' values.

    Args:
        first: One.
        second: The other.

    Returns:
        Settings.
    """
    return tuple({**a, **b} for a, b in itertools.product(first, second))


def built(name: str, **fixed: Any) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer of the package with the base's settings.

    Args:
        name: Its public name.
        **fixed: What is not searched.

    Returns:
        Takes the model and a setting.
    """
    return lambda model, **setting: getattr(ms_optim, name)(model, torch.optim.SGD, **BASE, **fixed, **setting)


def sgd(model: nn.Module, **setting: float) -> torch.optim.Optimizer:
    """SGD with a weight decay of its own.

    Args:
        model: The model.
        **setting: The weight decay.

    Returns:
        The optimizer.
    """
    return torch.optim.SGD(model.parameters(), **{**BASE, **setting})


_RADII = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
GRIDS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Grid]] = {
    "SGD": (sgd, line("weight_decay", 0.0, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "SAM": (built("SAM"), line("rho", *_RADII)),
    "ASAM": (built("ASAM"), line("rho", *(5 * rho for rho in _RADII))),
    "MSSAM": (built("MSSAM", rebalance="move", gauge=0.0), line("rho", *_RADII)),
    "TraceSAM": (built("TraceSAM"), line("rho", 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12)),
    "FrobSAM": (built("FrobSAM"), cross(line("rho", 0.005, 0.01, 0.03), line("strength", 0.005, 0.05, 0.5))),
    "DetSAM": (built("DetSAM"), cross(line("rho", 0.01, 0.03, 0.1), line("strength", 0.3, 1.0, 3.0))),
    "RSAM": (built("RSAM"), cross(line("rho", 0.1, 0.3, 0.9), line("order", 1.05, 1.2, 1.5))),
}


def trained(settings: Mapping[str, Any]) -> dict[str, float]:
    """Train once: the function of the sweep.

    Args:
        settings: ``problem``, ``optimizer``, ``setting``, ``seed`` and ``full``, whether at full size.

    Returns:
        Accuracy on each part. The test images are looked at from fresh seeds alone.
    """
    name, optimizer_name, setting, seed, full = (settings[key] for key in _SETTINGS)
    torch.set_num_threads(1)
    problem = PROBLEMS[name] if full else tiny(PROBLEMS[name])
    data = drawn(problem, seed)
    torch.manual_seed(seed)
    model = problem.build()
    # RSAM's authors begin with 5 of 200 epochs of plain SGD.
    late = {"start": late_start(problem, data)} if optimizer_name == "RSAM" else {}
    optimizer = GRIDS[optimizer_name][0](model, **setting, **late)
    descend(model, optimizer, data.train, problem.epochs, problem.batch, seed)
    found = {"train": data.train, "held_out": data.held_out}
    if seed != TUNING_SEED:
        found["test"] = data.test
    return {part: accuracy(model, *images) for part, images in found.items()}


def line_of(result: Result) -> Run:
    """What is kept of a trial.

    Args:
        result: Of the sweep.

    Returns:
        One line.
    """
    trial = result.trial
    shared = {"network": trial.problem, "contender": trial.method, "round": trial.seed, "stage": trial.stage}
    found = {"failed": result.error} if result.error else dict(result.outcome)
    return {**shared, "setting": trial.settings["setting"], **found}


def at_edge(optimizer: str, setting: dict[str, float]) -> bool:
    """Whether an argument of the setting is the smallest or the largest of its grid.

    Args:
        optimizer: The optimizer.
        setting: The setting.

    Returns:
        Whether it is.
    """
    return any(sweep.at_edge(value, [each[name] for each in GRIDS[optimizer][1]]) for name, value in setting.items())


def body(runs: Sequence[Run]) -> list[str]:
    """Test accuracy with the chosen setting, and the difference to SAM.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = [
        "Test accuracy in per cent, mean ± standard error over fresh seeds; difference to SAM, seed by seed.",
        "",
        "| setting | optimizer | chosen on held-out images | test accuracy | difference to SAM | n | verdict |",
        f"|{' --- |' * 7}",
    ]
    for problem, optimizer in itertools.product(PROBLEMS, GRIDS):
        mine = fresh(runs, problem, optimizer)
        if not mine:
            continue
        setting = next(run["setting"] for run in runs if run["stage"] == "fresh" and key(run) == (problem, optimizer))
        text = ", ".join(f"{name} = {value:g}" for name, value in setting.items())
        edge = " (edge of its grid)" if at_edge(optimizer, setting) else ""
        mean, error = mean_and_error(list(mine.values()))
        sam = fresh(runs, problem, "SAM")
        apart = Difference.of(seed_by_seed(mine, sam))
        word = "the reference" if optimizer == "SAM" else found_difference(apart.mean, apart.error)
        signed = "" if optimizer == "SAM" else f"{apart.mean:+.2f} ± {apart.error:.2f}"
        cells = (problem, optimizer, text + edge, f"{mean:.2f} ± {error:.2f}", signed, str(len(mine)), word)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def key(run: Run) -> tuple[str, str]:
    """Problem and optimizer of a line."""
    return run["network"], run["contender"]


def fresh(runs: Sequence[Run], problem: str, optimizer: str) -> dict[int, float]:
    """Test accuracy of the chosen setting.

    Args:
        runs: All lines.
        problem: The problem.
        optimizer: The optimizer.

    Returns:
        Seed → per cent.
    """
    mine = [run for run in runs if key(run) == (problem, optimizer) and "test" in run]
    return {run["round"]: 100 * run["test"] for run in mine}


def summary(runs: Sequence[Run]) -> list[Row]:
    """The differences to SAM, MSSAM's and RSAM's for the report, the others' if they did not work.

    Args:
        runs: All lines of one run.

    Returns:
        Rows.
    """
    rows = []
    for problem, optimizer in itertools.product(PROBLEMS, GRIDS):
        mine, sam = fresh(runs, problem, optimizer), fresh(runs, problem, "SAM")
        if not mine or optimizer == "SAM":
            continue
        rows.append(
            Row(
                f"MNIST, {problem}: {optimizer}'s test accuracy over SAM's, in points, both tuned alike",
                *compared(seed_by_seed(mine, sam)),
                # Quoted from others who had read the paper; its table was not at hand.
                "0.2 to 2.6 on other data (arXiv 2510.07758, quoted)" if optimizer == "RSAM" else NOTHING,
                detail=optimizer not in ("MSSAM", "RSAM"),
            )
        )
    return rows


def details(runs: Sequence[Run]) -> list[str]:
    """All trials.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = ["Trials: held-out accuracy (train accuracy), per cent.", ""]
    lines += ["| setting | optimizer | trials |", "| --- | --- | --- |"]
    for problem, optimizer in itertools.product(PROBLEMS, GRIDS):
        cells = [
            f"{'/'.join(f'{value:g}' for value in run['setting'].values())}: "
            + ("failed" if "failed" in run else f"{100 * run['held_out']:.2f} ({100 * run['train']:.1f})")
            for run in runs
            if key(run) == (problem, optimizer) and run["stage"] == "tuning"
        ]
        if cells:
            lines.append(f"| {problem} | {optimizer} | {'; '.join(cells)} |")
    return lines


def measure(full: bool, workers: int, folder: Path, keep: Callable[[list[Run]], object]) -> list[Run]:
    """Tune, then train from fresh seeds.

    Args:
        full: At full size, or a trial.
        workers: Processes; 0: this one.
        folder: Of the sweep's records.
        keep: Is given all lines whenever there are more.

    Returns:
        The lines.
    """
    trials = [
        Trial(dict(zip(_SETTINGS, (problem, optimizer, setting, TUNING_SEED, full), strict=True)), optimizer, problem)
        for problem, optimizer in itertools.product(PROBLEMS, GRIDS)
        for setting in (GRIDS[optimizer][1] if full else GRIDS[optimizer][1][:1])
    ]
    runs: list[Run] = []

    def listener(result: Result, count: int, total: int) -> None:
        runs.append(line_of(result))
        keep(runs)

    results = sweep.choose_and_report(
        trials,
        range(FRESH_SEEDS if full else 2),
        "benchmarks.universal_class:trained",
        folder,
        sweep.Resources(workers, trials_per_process=math.inf),  # a training takes seconds, as does a new process
        metric="held_out",
        listener=listener,
    )
    return [line_of(result) for result in results]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["cpu", "smoke"], default="cpu", help="smoke: tiny, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch in this process; workers have one each")
    parser.add_argument("--workers", type=int, help="processes (default: 2, none for smoke)")
    parser.add_argument("--out", type=Path, help="folder of results/<claim>/ (default: here for cpu, none for smoke)")
    parser.add_argument("--records", type=Path, help="folder of the sweep, to go on where it stopped (default: none)")
    options = parser.parse_args(arguments)
    full = options.scale == "cpu"
    torch.set_num_threads(options.threads)
    described = environment(options.threads)
    out = options.out or (RESULTS if full else None)

    def keep(runs: list[Run]) -> None:
        described["load_average_after"] = round(os.getloadavg()[0], 2)
        if out is not None:
            record(out / "universal_class" / folder_name(described), described, runs)

    workers = options.workers if options.workers is not None else 2 if full else 0
    with tempfile.TemporaryDirectory() as nowhere:
        runs = measure(full, workers, options.records or Path(nowhere), keep)
    keep(runs)

    from .render import table  # the renderer imports the scripts, whose tables it prints

    print(table("universal_class", described, runs))


if __name__ == "__main__":
    main()
