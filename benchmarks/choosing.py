r"""Choosing ρ and λ: test accuracy against the one number that an optimizer of the package adds.

Handwritten digits with 20% of the training labels redrawn, the demo's networks, batches and base settings (1,000 images
for training, 797 held out, 30 epochs, SGD 0.1 with momentum 0.9, weight decay 5e-4, cosine), the same for all.  A value
is trained from as many seeds as the table says; a seed fixes split, noise, weights and order of batches, so a column is
paired.  The held-out images are used to *compare values*, not to report an optimizer's accuracy: for that the table of
the demo has its own seeds.

    python -m benchmarks.choosing            about ten minutes on two cores; writes results/choosing/
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

import ms_optim
from ms_optim.demo import training

from .harness import RESULTS, Run, environment, folder_name, record
from .rows import Row, compared, mean, seed_by_seed

LABEL_NOISE = 0.2
RHO = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
STRENGTH = (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

Build = Callable[[nn.Module, float], torch.optim.Optimizer]


def moved(model: nn.Module, rho: float, gauge: float) -> torch.optim.Optimizer:
    """MSSAM at the representative itself: ``rebalance="move"``.

    Args:
        model: The network.
        rho: ρ.
        gauge: κ.

    Returns:
        The optimizer.
    """
    return ms_optim.MSSAM(model, rho=rho, rebalance="move", gauge=gauge, **training.BASE)


SWEEPS: dict[str, tuple[str, tuple[float, ...], Build]] = {
    "SAM": ("ρ", RHO, lambda model, rho: ms_optim.SAM(model, rho=rho, **training.BASE)),
    "MSSAM, κ = 0": ("ρ", RHO, lambda model, rho: moved(model, rho, 0.0)),
    "MSSAM, κ = ½": ("ρ", RHO, lambda model, rho: moved(model, rho, 0.5)),
    "MSSAM, κ = 1": ("ρ", RHO, lambda model, rho: moved(model, rho, 1.0)),
    "MSRegularizedSGD, trace": (
        "λ",
        STRENGTH,
        lambda model, strength: ms_optim.MSRegularizedSGD(model, strength=strength, rebalance="move", **training.BASE),
    ),
    "MSRegularizedSGD, noise": (
        "λ",
        STRENGTH,
        lambda model, strength: ms_optim.MSRegularizedSGD(
            model, strength=strength, gradient="noise", rebalance="move", **training.BASE
        ),
    ),
}


def accuracy(job: tuple[str, str, float, int, int]) -> Run:
    """Train once.

    Args:
        job: Network, sweep, value, seed, epochs.

    Returns:
        One line: the job and the accuracy on the held-out images.
    """
    network, sweep, value, seed, epochs = job
    torch.set_num_threads(1)
    data = training.digits(seed, LABEL_NOISE)
    torch.manual_seed(seed)
    model = training.MODELS[network]()
    optimizer = SWEEPS[sweep][2](model, value)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for batches in itertools.islice(training.epochs(data, seed), epochs):
        for x, y in batches:
            training.step(model, optimizer, x, y)
        scheduler.step()
    found = training.accuracy(model, data.x_test, data.y_test)
    return {"network": network, "sweep": sweep, "value": value, "seed": seed, "test_accuracy": found}


def body(runs: Sequence[Run]) -> list[str]:
    """Mean ± standard error per value, the best of each row in bold.

    Args:
        runs: All lines.

    Returns:
        Lines of Markdown.
    """
    lines = ["Test accuracy in per cent, mean ± standard error over the seeds; the best value of a row in bold."]
    for symbol in ("ρ", "λ"):
        values = sorted({run["value"] for run in runs if SWEEPS[run["sweep"]][0] == symbol})
        if not values:
            continue
        lines += ["", f"| network | optimizer | {' | '.join(f'{symbol} = {value:g}' for value in values)} | seeds |"]
        lines += ["| --- | --- |" + " --- |" * (len(values) + 1)]
        for network, sweep in dict.fromkeys((run["network"], run["sweep"]) for run in runs):
            if SWEEPS[sweep][0] != symbol:
                continue
            found = accuracies(runs, network, sweep)
            cells = {value: mean(list(found[value].values()), 1) for value in values}
            cells[best(found)] = f"**{cells[best(found)]}**"
            lines.append(f"| {network} | {sweep} | {' | '.join(cells.values())} | {len(found[values[0]])} |")
    return lines


def accuracies(runs: Sequence[Run], network: str, sweep: str) -> dict[float, dict[int, float]]:
    """Accuracy for each value and seed.

    Args:
        runs: All lines.
        network: The network.
        sweep: The optimizer.

    Returns:
        Value → seed → per cent.
    """
    found: dict[float, dict[int, float]] = {}
    for run in runs:
        if (run["network"], run["sweep"]) == (network, sweep):
            found.setdefault(run["value"], {})[run["seed"]] = 100 * run["test_accuracy"]
    return found


def best(found: Mapping[float, Mapping[int, float]]) -> float:
    """The value with the largest mean.

    Args:
        found: Value → seed → accuracy.

    Returns:
        The value.
    """
    return max(found, key=lambda value: statistics.fmean(found[value].values()))


def summary(runs: Sequence[Run]) -> list[Row]:
    """MSSAM beside SAM, each at its best ρ.

    Args:
        runs: All lines.

    Returns:
        A row for each network.
    """
    rows = []
    for network in dict.fromkeys(run["network"] for run in runs):
        sam, ours = (accuracies(runs, network, sweep) for sweep in ("SAM", "MSSAM, κ = 0"))
        if not sam or not ours:
            continue
        theirs, mine = sam[best(sam)], ours[best(ours)]
        ours_is = "MSSAM (move, κ = 0)"
        claim = f"digits with noisy labels, {network}: {ours_is}, accuracy over SAM's, in points, each at its best ρ"
        rows.append(Row(claim, *compared(seed_by_seed(mine, theirs))))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep, write, and print the table.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["cpu", "smoke"], default="cpu", help="smoke: tiny, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch in this process; workers have one each")
    parser.add_argument("--workers", type=int, help="processes; 0 trains in this one (default: 2, none for smoke)")
    parser.add_argument("--out", type=Path, help="folder of results/<claim>/ (default: here for cpu, none for smoke)")
    options = parser.parse_args(arguments)
    smoke = options.scale == "smoke"
    workers = options.workers if options.workers is not None else 0 if smoke else 2
    seeds = {"mlp": 1 if smoke else 4, "resnet": 0 if smoke else 2}
    jobs = [
        (network, sweep, value, seed, 1 if smoke else 30)
        for network, count in seeds.items()
        for sweep, (_, values, _) in SWEEPS.items()
        for value in (values[3:4] if smoke else values)
        for seed in range(count)
    ]
    torch.set_num_threads(options.threads)
    described = environment(options.threads)
    if workers == 0:
        runs = [accuracy(job) for job in jobs]
    else:
        # Not by fork: a process forked after torch has started its threads can hang.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            runs = list(pool.map(accuracy, jobs))
    described["load_average_after"] = round(os.getloadavg()[0], 2)
    out = options.out or (None if smoke else RESULTS)
    if out is not None:
        record(out / "choosing" / folder_name(described), described, runs)

    from .render import table  # the renderer imports the scripts, whose tables it prints

    print(table("choosing", described, runs))


if __name__ == "__main__":
    main()
