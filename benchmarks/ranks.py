r"""Kendall's τ-b and its confidence intervals, for runs that share seeds.

    τ_b = Σ_{i<j} s_ij t_ij / √( Σ_{i<j} s_ij² · Σ_{i<j} t_ij² ) ,    s_ij = sign(x_i − x_j) ,  t_ij = sign(y_i − y_j)

Runs of one seed share images, weights and order, so they are no independent sample, and the bootstrap draws seeds and
not runs.  A resample is a weight w_i for each run, the number of times its seed was drawn, and each sum becomes one of
terms times w_i w_j: a run that was drawn twice is tied with itself and counts for nothing in that pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES, LEVEL = 2_000, 0.95


@dataclass(frozen=True)
class Rank:
    """A rank correlation, or a mean of some.

    Attributes:
        value: τ-b; NaN where it is not defined: fewer than two runs, or all tied.
        low: Lower end of the interval.
        high: Upper end.
        n: The number of runs.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "—"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def kendall(x: Sequence[float], y: Sequence[float], weights: Tensor | None = None) -> Tensor:
    """τ-b of weighted runs.

    Args:
        x: One quantity, of n runs.
        y: The other.
        weights: ``[R, n]``, not negative; ``None``: every run counts once.

    Returns:
        ``[R]`` (or ``[1]``); NaN where all pairs are tied.

    >>> kendall([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]).item()  # one of six pairs is the other way round
    0.6666666666666666
    """
    s, t = (
        torch.sign(values[:, None] - values[None, :])
        for values in (torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    )
    w = torch.ones(1, len(s), dtype=torch.float64) if weights is None else weights

    def total(pairs: Tensor) -> Tensor:
        return ((w @ pairs) * w).sum(1)

    return total(s * t) / (total(s * s) * total(t * t)).sqrt()  # 0 / 0 is NaN


def correlation(x: Sequence[float], y: Sequence[float], seeds: Sequence[int]) -> Rank:
    """τ-b over all runs, with a percentile interval.

    Args:
        x: One quantity, of n runs.
        y: The other.
        seeds: The seed of each run.

    Returns:
        The correlation.
    """
    return mean_correlation([(x, y, seeds)])


def mean_correlation(groups: Sequence[tuple[Sequence[float], Sequence[float], Sequence[int]]]) -> Rank:
    """The mean of τ-b within groups of runs, with a percentile interval; a seed is drawn for all groups at once.

    Args:
        groups: For each ``x``, ``y`` and seeds, as in :func:`correlation`; one in which τ is not defined is left out.

    Returns:
        The mean.
    """
    names = sorted({seed for *_, seeds in groups for seed in seeds})
    if not names:
        return Rank(math.nan, math.nan, math.nan, 0)
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(names), (RESAMPLES, len(names)), generator=draw)
    counts = torch.zeros(RESAMPLES, len(names), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    values, resampled = [], []
    for x, y, seeds in groups:
        places = [names.index(seed) for seed in seeds]
        values.append(kendall(x, y))
        resampled.append(kendall(x, y, counts[:, places]))
    value = float(torch.cat(values).nanmean())
    means = torch.stack(resampled).nanmean(0)
    known = means[~means.isnan()]
    if not len(known):
        return Rank(value, math.nan, math.nan, sum(len(x) for x, *_ in groups))
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = known.quantile(ends).tolist()
    return Rank(value, low, high, sum(len(x) for x, *_ in groups))
