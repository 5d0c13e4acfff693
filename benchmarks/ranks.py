r"""Kendall's τ-b and its confidence intervals, for runs that share seeds.

    τ_b = Σ_{i<j} s_ij t_ij / √( Σ_{i<j} s_ij² · Σ_{i<j} t_ij² ) ,    s_ij = sign(x_i − x_j) ,  t_ij = sign(y_i − y_j)

Runs of one seed share images, weights and order, so they are no independent sample; seeds are.  The interval is the
jackknife's over S seeds: with τ_(k) the value without seed k,

    τ ± t_{S−1} √( (S−1)/S Σ_k (τ_(k) − mean τ_(k))² ) ,    cut at −1 and 1 .

The bootstrap of seeds does worse here: a seed that is drawn twice is tied with itself, which favours the pairs of
different ratios and lifts τ.  On made data like ours (ten seeds × 11 ratios, five × five; noise of the run and of the
seed) its percentiles of 95 % covered the truth in 43 to 80 % of 200 cases, and the jackknife in 90 to 94 %; within one
ratio the two are alike, 91 to 98 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Rank:
    """A rank correlation, or a mean of some.

    Attributes:
        value: τ-b; NaN where it is not defined: fewer than two runs, or all tied.
        low: Lower end of the interval; NaN where there is none: fewer than three seeds, or all values the same.
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
        return f"{self.value:.2f}" + ("" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]")


def kendall(x: Sequence[float], y: Sequence[float], weights: Tensor | None = None) -> Tensor:
    """τ-b of weighted runs.

    Args:
        x: One quantity, of n runs.
        y: The other.
        weights: ``[R, n]``, not negative: how often each run counts (with itself it is tied); ``None``: once.

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
    """τ-b over all runs, with its interval.

    Args:
        x: One quantity, of n runs.
        y: The other.
        seeds: The seed of each run.

    Returns:
        The correlation.
    """
    return mean_correlation([(x, y, seeds)])


def mean_correlation(groups: Sequence[tuple[Sequence[float], Sequence[float], Sequence[int]]]) -> Rank:
    """The mean of τ-b within groups of runs, with its interval; a seed is left out of all groups at once.

    Args:
        groups: For each ``x``, ``y`` and seeds, as in :func:`correlation`; one in which τ is not defined is left out.

    Returns:
        The mean.
    """
    names = sorted({seed for *_, seeds in groups for seed in seeds})
    n, count = sum(len(x) for x, *_ in groups), len(names)
    if not names:
        return Rank(math.nan, math.nan, math.nan, n)
    kept = 1.0 - torch.eye(count, dtype=torch.float64)
    value = float(torch.cat([kendall(x, y) for x, y, _ in groups]).nanmean())
    without = torch.stack([kendall(x, y, kept[:, [names.index(s) for s in seeds]]) for x, y, seeds in groups])
    means = without.nanmean(0)
    error = math.sqrt((count - 1) / count * float((means - means.mean()).square().sum()))
    # In perfect order no seed makes a difference, and nothing is known of the spread.
    if count < 3 or math.isnan(error) or error == 0.0:
        return Rank(value, math.nan, math.nan, n)
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Rank(value, max(value - reach, -1.0), min(value + reach, 1.0), n)
