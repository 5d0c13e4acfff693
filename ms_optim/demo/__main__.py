"""Command line of the demo: ``python -m ms_optim.demo --help``."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..machine import processor, software
from .report import figure, table
from .training import MODELS, OPTIMIZERS, STARTS, Run, relative_seconds, train_all


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ms_optim.demo",
        description="Train small networks on handwritten digits from two equivalent starts and compare optimizers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, choices in (("models", MODELS), ("optimizers", OPTIMIZERS)):
        keys = list(choices)
        parser.add_argument(f"--{name}", nargs="+", choices=keys, default=keys, metavar="NAME", help=", ".join(keys))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are counted from here")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training")
    parser.add_argument("--scale", type=float, default=2.0, help="standard deviation of t, of the rescaled start")
    parser.add_argument("--label-noise", type=float, default=0.2, help="share of the training labels that are redrawn")
    workers = min(2, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help="processes; 0 trains in this one")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder of figure, table and raw results")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs, short timing: only to see it work")
    options = parser.parse_args(argv)
    for name in ("seeds", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.workers < 0 or options.scale < 0 or not 0 <= options.label_noise <= 1:
        parser.error("--workers and --scale must not be negative, and --label-noise lies between 0 and 1")
    if options.quick:
        options.seeds, options.epochs = 1, 2
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print the table, and write table, figure and raw results.

    Args:
        argv: Command line; the process's own by default.
    """
    options = arguments(argv)
    missing = [name for name in ("sklearn", "matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"the demo needs {', '.join(missing)}, which ms_optim itself does not: pip install 'ms_optim[demo]'")
    begin = time.perf_counter()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = [
        Run(model, optimizer, start, seed, options.epochs, options.scale, options.label_noise)
        for model in options.models
        for optimizer in options.optimizers
        for start in STARTS
        for seed in seeds
    ]
    outcomes = train_all(runs, options.workers)
    # Only now, when no worker competes for the cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    length, blocks = (5, 1) if options.quick else (100, 3)
    seconds = {model: relative_seconds(model, options.optimizers, length, blocks) for model in options.models}
    torch.set_num_threads(threads)

    text = table(outcomes, seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "table.md").write_text(text + "\n", encoding="utf-8")
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    here = {"date": today, **software(), "cpu": processor(), "cores": os.cpu_count(), "workers": options.workers}
    results = {
        "environment": here,
        "seconds_per_step_relative_to_sgd": seconds,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure(outcomes, options.output / "figure.png")
    print(text)
    print(
        f"\n{options.seeds} seeds; accuracy is mean ± standard error, Tr H and MS (minimum sharpness) are medians. "
        "Both starts are the same function in eval mode:\nMS before is equal, and an optimizer that does not depend on "
        "the scaling has two equal rows, but for rounding, which training amplifies.\n"
        f"{len(runs)} trainings in {time.perf_counter() - begin:.0f} s; "
        f"figure, table and raw results are in {options.output}/"
    )


if __name__ == "__main__":
    main()
