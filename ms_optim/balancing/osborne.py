r"""Osborne: the minimum of a sum of exponentials over single units, by closed-form updates and Newton's method.

    f(t) = Σ_p Σ_{j,i} D_p,ji exp(−2 a_p,ji(t)) ,     a_p,ji = (R_p t)_j + (K_p t)_i ,

R and K sparse, one row for each row and column of a table D ≥ 0.  For a chain of layers this is matrix balancing: a
unit u has what comes in, A (the terms that fall as e^{−2u}), and what goes out, B (those that grow as e^{2u}), and
alone it is best at e^{4u} = A / B.  That is Osborne's iteration, unit after unit.  Two deviations:

1. All units at once.  With m the largest Σ_u |∂a/∂t_u| of any term, convexity gives
   e^{−2 Σ k_u δ_u} ≤ Σ_u (|k_u|/m) e^{−2 m sign(k_u) δ_u} + rest, so that e^{4 m δ_u} = A_u / B_u never increases f,
   for coefficients other than ±1, too, where A = Σ_{k>0} k T and B = Σ_{k<0} |k| T.  It is damped, but every sweep is
   two products with each table.
2. Near the minimum, Newton's method takes over, with conjugate gradients on the Hessian, of which only products with
   vectors are needed.

The measure of convergence is relative, unit by unit, |A_u − B_u| / (A_u + B_u): a unit with a millionth of the trace is
balanced as exactly as any other.

Source: Osborne, On pre-conditioning of matrices, J. ACM 7 (1960); Parlett and Reinsch, Numer. Math. 13 (1969).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .program import Matrix, Vector


@dataclass(frozen=True, eq=False)
class Terms:
    """One table of terms.

    Attributes:
        rows: R, sparse ``[m, U]``.
        columns: K, sparse ``[k, U]``.
        table: D ≥ 0, ``[m, k]``.
    """

    rows: Any
    columns: Any
    table: Matrix

    def at(self, t: Vector) -> Matrix:
        """The terms D e^{−2a}, ``[m, k]``."""
        return np.asarray(np.exp(-2 * (self.rows @ t))[:, None] * self.table * np.exp(-2 * (self.columns @ t)))


class Sum:
    """f, its derivatives and Osborne's update.

    Args:
        terms: The tables.
        count: U.
    """

    def __init__(self, terms: list[Terms], count: int) -> None:
        self.terms = [term for term in terms if term.table.any()]
        self.count = count
        self._signed = []  # for each table: R, K, their positive and negative parts, their squares, transposed
        most = 1.0
        for term in self.terms:
            sides = []
            reach = 0.0
            for side in (term.rows, term.columns):
                parts = (side.maximum(0), (-side).maximum(0), side.multiply(side))
                sides.append((side, *(part.T.tocsr() for part in parts)))
                reach += float(abs(side).sum(axis=1).max()) if side.nnz else 0.0
            self._signed.append(sides)
            most = max(most, reach)
        self.reach = most

    def weights(self, t: Vector) -> list[tuple[Matrix, Vector, Vector]]:
        """Of each table: the terms, and their sums over rows and columns."""
        values = [term.at(t) for term in self.terms]
        return [(value, value.sum(axis=1), value.sum(axis=0)) for value in values]

    def value(self, t: Vector) -> float:
        """f(t)."""
        return float(sum(term.at(t).sum() for term in self.terms))

    def flows(self, weights: list[tuple[Matrix, Vector, Vector]]) -> tuple[Vector, Vector]:
        """A and B, ``[U]`` each."""
        a, b = np.zeros(self.count), np.zeros(self.count)
        for sides, (_, *sums) in zip(self._signed, weights, strict=True):
            for (_, positive, negative, _), total in zip(sides, sums, strict=True):
                a += positive @ total
                b += negative @ total
        return a, b

    def curvature(self, weights: list[tuple[Matrix, Vector, Vector]]) -> tuple[Callable[[Vector], Vector], Vector]:
        """A quarter of the Hessian: its product with a vector, and its diagonal (nearly, where a unit meets itself)."""
        diagonal = np.zeros(self.count)
        for sides, (_, *sums) in zip(self._signed, weights, strict=True):
            for (_, _, _, square), total in zip(sides, sums, strict=True):
                diagonal += square @ total

        def times(v: Vector) -> Vector:
            result = np.zeros(self.count)
            for ((rows, *_), (columns, *_)), of_table in zip(self._signed, weights, strict=True):
                value, over_rows, over_columns = of_table
                x, y = rows @ v, columns @ v
                result += rows.T @ (over_rows * x + value @ y) + columns.T @ (over_columns * y + value.T @ x)
            return result

        return times, diagonal


def imbalance(a: Vector, b: Vector) -> float:
    """max_u |A_u − B_u| / (A_u + B_u), over units with any flow.

    Args:
        a: A, ``[U]``.
        b: B, ``[U]``.

    Returns:
        The residual, in [0, 1].
    """
    total = a + b
    return float((np.abs(a - b)[total > 0] / total[total > 0]).max(initial=0.0))


def minimise(
    terms: list[Terms], count: int, start: Vector | None = None, newton: bool = True, tolerance: float = 1e-13,
    sweeps: int = 10_000,
) -> tuple[Vector, float]:
    """The minimiser of f.

    Args:
        terms: The tables; every unit must have a term on both of its sides (the caller has seen to that).
        count: U.
        start: Where to begin; ``None``: 0.
        newton: Whether Newton's method takes over near the minimum; else Osborne's sweeps go on to the end.
        tolerance: Of the imbalance.
        sweeps: The most sweeps.

    Returns:
        t, ``[U]``, and the imbalance there: rounding, about 1e-15, if all went well.
    """  # fmt: skip
    total = Sum(terms, count)
    t = np.zeros(count) if start is None else start.copy()
    if not total.terms:
        return t, 0.0
    best, found, stalled = np.inf, t, 0
    for sweep in range(sweeps):
        weights = total.weights(t)
        a, b = total.flows(weights)
        residual = imbalance(a, b)
        if residual < 0.5 * best:
            stalled = 0
        else:
            stalled += 1
        if residual < best:
            best, found = residual, t
        near = newton and (residual < 0.3 or sweep >= 100)
        # Near rounding a few steps without progress are enough; far from it sweeps may be slow.
        if best <= tolerance or stalled > (8 if near and best < 1e-6 else 400):
            break
        step = _newton_step(total, t, weights, a, b) if near else None
        if step is None:
            step = np.zeros(count)
            moving = (a > 0) & (b > 0)
            step[moving] = np.log(a[moving] / b[moving]) / (4 * total.reach)
        t = t + step
    return found, best


def _newton_step(
    total: Sum, t: Vector, weights: list[tuple[Matrix, Vector, Vector]], a: Vector, b: Vector
) -> Vector | None:
    """−H⁻¹ ∇f, at most 1 in any unit, shortened until f does not grow; None if that fails."""
    times, diagonal = total.curvature(weights)
    # ∇f = −2 (A − B), and H is four times the product: H δ = 2 (A − B).
    direction = conjugate_gradients(times, diagonal, 0.5 * (a - b))
    largest = float(np.abs(direction).max(initial=0.0))
    if not np.isfinite(largest) or largest == 0.0:
        return None
    value = sum(float(w.sum()) for w, _, _ in weights)
    step = min(1.0, 1.0 / largest)
    for _ in range(20):
        if total.value(t + step * direction) <= value * (1 + 1e-14):
            return np.asarray(step * direction, dtype=np.float64)
        step *= 0.5
    return None


def conjugate_gradients(
    times: Callable[[Vector], Vector], diagonal: Vector, right: Vector, limit: int = 2000
) -> Vector:
    """Solve H x = right for a positive semidefinite H, in coordinates scaled to the diagonal 1.

    Args:
        times: The product with H.
        diagonal: Of H, or nearly.
        right: In the range of H.
        limit: The most iterations.

    Returns:
        x, to a relative residual of 1e-14 or as near as rounding lets it come.
    """
    scale = np.zeros_like(diagonal)
    np.divide(1.0, np.sqrt(diagonal), out=scale, where=diagonal > 0)
    x = np.zeros_like(right)
    r = right * scale
    p, square = r.copy(), float(r @ r)
    first = square
    for _ in range(min(limit, 10 * len(right) + 50)):
        if square <= 1e-28 * first or square == 0.0:
            break
        q = scale * times(scale * p)
        curvature = float(p @ q)
        if curvature <= 0.0:
            break
        x += square / curvature * p
        r -= square / curvature * q
        square, before = float(r @ r), square
        p = r + square / before * p
    return np.asarray(scale * x, dtype=np.float64)
