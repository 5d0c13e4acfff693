r"""Paired differences: what two methods differ by, seed by seed.

A seed fixes the data that are drawn, the initial weights and the order, so two methods are compared within it:
:math:`d_s = a_s - b_s`.  Of the differences of n seeds,

    mean d ± s/√n,  mean d ± t_{n-1} s/√n,  p_t = P(|t_{n-1}| ≥ |mean d| √n / s)        if they are normal
    p = #{σ ∈ {-1, 1}^n : |Σ σ_s d_s| ≥ |Σ d_s|} / 2^n                                   if each could as well be -d_s

The second needs no distribution, and cannot be below 2 / 2^n: with five seeds nothing is below 0.0625.  Against k
methods, a p-value counts after Holm's correction: the i-th smallest times k - i + 1, and never less than one before it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..demo.report import mean_and_error

#: More seeds than this have their signs drawn, not enumerated.
EXACT = 20
_DRAWS = 2**20
_CHUNK = 2**14


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    Attributes:
        n: Seeds that both have.
        mean: Its mean; NaN without seeds.
        error: Its standard error; NaN for one seed.
        low: Lower end of the confidence interval.
        high: Upper end.
        p_t: Of the paired t-test, two-sided; NaN where it is not defined: for one seed, or equal differences.
        p_signs: Of the signs, two-sided.
    """

    n: int
    mean: float = math.nan
    error: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_t: float = math.nan
    p_signs: float = math.nan

    @classmethod
    def of(cls, differences: Sequence[float], level: float = 0.95) -> Difference:
        """Summarise differences.

        Args:
            differences: One per seed.
            level: Of the confidence interval.

        Returns:
            The summary.
        """
        n = len(differences)
        if n == 0:
            return cls(0)
        mean, error = mean_and_error(differences)
        signs = sign_flips(differences)
        # Differences that are all alike say nothing of their spread: as when accuracies of few images coincide.
        if n == 1 or statistics.pvariance(differences) <= (1e-12 * max(map(abs, differences))) ** 2:
            return cls(n, mean, error, p_signs=signs)
        from scipy import stats  # a second, which runs of a single trial need not pay for

        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
        return cls(n, mean, error, mean - half, mean + half, p, signs)


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p-value of the mean under all choices of signs.

    Args:
        differences: One per pair; at least one.

    Returns:
        Exact for at most :data:`EXACT` of them; else of about a million choices, the actual one among them, drawn from
        a seed of their own.

    >>> sign_flips([1.0, 2.0, 3.0, 4.0, 5.0])  # 2 of 32
    0.0625
    """
    d = np.asarray(differences, dtype=np.float64)
    # Sums in another order differ by rounding; equal ones have to count as equal.
    least = abs(d.sum()) - 1e-9 * np.abs(d).sum()
    hits = total = 0
    for signs in _choices(len(d)):
        hits += int((np.abs(signs @ d) >= least).sum())
        total += len(signs)
    return hits / total


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction.

    Args:
        p_values: One per hypothesis; NaN, where there is none, counts as a hypothesis that is not rejected.

    Returns:
        The corrected ones, in the same order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: math.inf if math.isnan(p_values[i]) else p_values[i])
    corrected, before = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        if not math.isnan(p_values[index]):
            before = max(before, min(1.0, (len(p_values) - rank) * p_values[index]))
            corrected[index] = before
    return corrected


def _choices(n: int) -> Iterator[NDArray[np.float64]]:
    """Rows of signs: all, or drawn ones."""
    if n <= EXACT:
        every = itertools.product((1.0, -1.0), repeat=n)
        while rows := list(itertools.islice(every, _CHUNK)):
            yield np.array(rows)
        return
    draw = np.random.default_rng(0)
    yield np.ones((1, n))
    for _ in range(_DRAWS // _CHUNK):
        yield draw.choice(np.array([1.0, -1.0]), (_CHUNK, n))
