"""Progress: how far a sweep is, on a terminal and in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .choice import described
from .pool import Listener
from .trial import FINISHED, Result, Trial, flat


@contextmanager
def progress(trials: Sequence[Trial], metrics: Sequence[str]) -> Iterator[Listener]:
    """Say what comes of each trial: with a bar on a terminal, if tqdm is there; else a line each, on stderr.

    Args:
        trials: What is run; a trial is named by what differs between them.
        metrics: The numbers that are shown, where an outcome has them; else the first two.

    Yields:
        What is told of each result.
    """
    points = [flat(trial.setting) for trial in trials]
    names = dict.fromkeys(name for point in points for name in point if name != "opt")  # the method is said anyway
    varied = [name for name in names if len({str(point.get(name)) for point in points}) > 1]
    bar: Any = None
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm

            bar = tqdm(unit="trial", file=sys.stderr)
        except ImportError:
            pass

    def say(result: Result, count: int, total: int) -> None:
        numbers = {name: value for name, value in result.outcome.items() if isinstance(value, (int, float))}
        shown = [name for name in metrics if name in numbers] or list(numbers)[:2]
        what = (
            ", ".join(f"{name} {numbers[name]:.4g}" for name in shown)
            if result.status == FINISHED
            else f"{result.status.upper()}: {result.error}"
        )
        setting = described(result.trial.setting, varied)
        name = ", ".join(part for part in (result.trial.problem, result.trial.method, setting) if part)
        line = f"{name}, seed {result.trial.seed}: {what} ({result.seconds:.1f} s)"
        if bar is None:
            print(f"[{count}/{total}] {line}", file=sys.stderr, flush=True)
            return
        if bar.total != total:
            bar.reset(total)
        bar.n = count
        if result.status != FINISHED:
            bar.write(line, file=sys.stderr)
        bar.set_postfix_str(name)

    try:
        yield say
    finally:
        if bar is not None:
            bar.close()
