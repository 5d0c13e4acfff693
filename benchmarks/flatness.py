r"""Flatness: whether a contender's accuracy and trajectory are the same from every equivalent start.

At every size d of the element, over the seeds,

    |mean (A_d − A_0)| ≤ ½ point,   0 ∈ its interval,   mean D_d ≤ 2 mean D_rounding ,

with A the test accuracy and D the distance in function space to the training from the usual start, at the end and on
average over the epochs.  The intervals of all sizes together have 95 % (Bonferroni).  They alone would call flat
whatever is noisy enough, half a point alone whatever is a little worse every time; the distance sees what accuracy does
not.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Difference, Result

from .equivalent import ROUNDING, UNCHANGED

#: Points of accuracy, and distances of the start with rounding, within which a contender is flat.
POINTS, FACTOR = 0.5, 2.0
#: The distance at the end, and its mean over the epochs.
DISTANCES = END, MEAN = "distance_end", "distance_mean"
Start = float | str


@dataclass(frozen=True)
class Curve:
    """A contender on a row, over the starts.

    Attributes:
        values: Start → quantity → a number per seed.
        diverged: Start → how many seeds have.
        settings: Those of one of its trainings.
    """

    values: Mapping[Start, Mapping[str, Sequence[float]]]
    diverged: Mapping[Start, int]
    settings: Mapping[str, Any]

    @property
    def sizes(self) -> tuple[float, ...]:
        """The decades of the rescaled starts."""
        return tuple(start for start in self.values if isinstance(start, float) and start)

    @property
    def counted(self) -> tuple[float, ...]:
        """Those that leave the function unchanged in training mode as well."""
        return tuple(size for size in self.sizes if max(self.values[size]["training_error"]) <= UNCHANGED)

    def mean(self, start: Start, quantity: str) -> float:
        """The mean over the seeds.

        Args:
            start: The start.
            quantity: Such as :data:`END`.

        Returns:
            The mean.
        """
        return statistics.fmean(self.values[start][quantity])

    def accuracy(self, start: Start) -> tuple[float, float]:
        """Test accuracy.

        Args:
            start: The start.

        Returns:
            Mean ± standard error over the seeds, per cent.
        """
        return mean_and_error([100 * value for value in self.values[start]["test"]])

    def difference(self, size: float, level: float = 0.95) -> Difference:
        """Points of test accuracy, from a rescaled start minus from the usual one.

        Args:
            size: The start.
            level: Of the interval.

        Returns:
            The difference, seed by seed.
        """
        pairs = zip(self.values[size]["test"], self.values[0.0]["test"], strict=True)
        return Difference.of([100 * (a - b) for a, b in pairs], level)


def curve_of(
    results: Sequence[Result], row: str, granularity: str, contender: str, stage: str = "fresh"
) -> Curve | None:
    """What came of a contender.

    Args:
        results: All.
        row: The problem.
        granularity: What is rescaled.
        contender: Who.
        stage: Which of its trainings.

    Returns:
        The curve; ``None`` if nothing came of it.
    """
    wanted = (row, contender, stage, granularity)
    mine = [
        result
        for result in results
        if (t := result.trial) and (t.problem, t.method, t.stage, t.settings.get("granularity")) == wanted
    ]
    values: dict[Start, dict[str, list[float]]] = {}
    diverged: dict[Start, int] = {}
    for line in (line for result in mine for line in result.outcome.get("starts", ())):
        start = line["start"] if line["start"] == ROUNDING else float(line["start"])
        diverged[start] = diverged.get(start, 0) + bool(line["diverged"])
        found = {name: line[name] for name in ("test", "function_error", "training_error")}
        found |= {END: line["distances"][-1], MEAN: statistics.fmean(line["distances"])}
        for quantity, value in found.items():
            values.setdefault(start, {}).setdefault(quantity, []).append(value)
    return Curve(values, diverged, mine[0].trial.settings) if values else None


def verdict(curve: Curve) -> str:
    """Whether accuracy and trajectory are those from the usual start.

    Args:
        curve: A contender's.

    Returns:
        ``"flat"``; or what is not.
    """
    if curve.diverged[0.0]:
        return "diverges as it is"
    if not curve.counted:
        return "no size counts"
    differences = [curve.difference(size, 1 - 0.05 / len(curve.counted)) for size in curve.counted]
    allowed = {quantity: FACTOR * curve.mean(ROUNDING, quantity) for quantity in DISTANCES}
    # (Without a spread over the seeds there is no interval: then the mean alone decides.)
    changes = {
        "accuracy": any(abs(d.mean) > POINTS or d.low > 0 or d.high < 0 for d in differences),
        "trajectory": any(curve.mean(size, q) > allowed[q] for size in curve.counted for q in DISTANCES),
    }
    changed = [what for what, does in changes.items() if does]
    return f"{' and '.join(changed)} change{'s' if len(changed) == 1 else ''}" if changed else "flat"
