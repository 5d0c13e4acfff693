"""The linear system on log-scales: exact elimination over the rationals, and a sparse integer basis of its null space.

Every constraint is homogeneous and short (s_out = s_in + a_W), so the system is solved as it is written: a new equation
is reduced by what is known and then solved for one of its variables.  Parameters and running statistics are solved for
first, so that they end up expressed in the scales of activations, each of which appears only where it is made and
where it is read.  That is why the basis found is sparse without a search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogScale:
    """A linear combination of log-scale variables; without terms it is the scale 0 of a constant.

    Attributes:
        terms: Variable -> non-zero coefficient.
    """

    terms: Mapping[int, Fraction]

    def __add__(self, other: LogScale) -> LogScale:
        terms = dict(self.terms)
        for variable, c in other.terms.items():
            terms[variable] = terms.get(variable, Fraction(0)) + c
        return LogScale({variable: c for variable, c in terms.items() if c})

    def __mul__(self, factor: Fraction | int) -> LogScale:
        return LogScale({variable: c * factor for variable, c in self.terms.items()} if factor else {})

    def __neg__(self) -> LogScale:
        return self * -1

    def __sub__(self, other: LogScale) -> LogScale:
        return self + other * -1


#: The log-scale of what no rescaling changes: inputs, constants, integers, logits.
FIXED = LogScale({})


class LinearSystem:
    """Homogeneous linear equations between log-scales, solved one by one as they arrive."""

    def __init__(self) -> None:
        self._solved: dict[int, LogScale] = {}
        self._solve_first: list[bool] = []

    def variable(self, solve_first: bool = False) -> LogScale:
        """A new log-scale.

        Args:
            solve_first: Solve equations for this variable in preference to the others (parameters, statistics).

        Returns:
            The variable as a linear combination.
        """
        self._solve_first.append(solve_first)
        return LogScale({len(self._solve_first) - 1: Fraction(1)})

    @property
    def count(self) -> int:
        """The number of variables."""
        return len(self._solve_first)

    def solution(self, scale: LogScale) -> LogScale:
        """Express a log-scale in variables that are still free.

        Args:
            scale: Any linear combination of variables.

        Returns:
            The same log-scale, in free variables only.
        """
        result = FIXED
        for variable, c in scale.terms.items():
            if variable in self._solved:
                # What was free then may be solved by now; the answer is kept, so that chains stay short.
                self._solved[variable] = self.solution(self._solved[variable])
                result = result + self._solved[variable] * c
            else:
                result = result + LogScale({variable: c})
        return result

    def equal(self, first: LogScale, *others: LogScale) -> None:
        """Add the equations first = other.

        Args:
            first: A log-scale.
            others: Log-scales that must have the same value.
        """
        for other in others:
            residual = self.solution(first - other)
            if residual.terms:
                # The newest of equals: what was there first keeps its name.
                pivot = max(residual.terms, key=lambda v: (self._solve_first[v], v))
                self._solved[pivot] = residual * (-1 / residual.terms[pivot]) + LogScale({pivot: Fraction(1)})

    def null_space(self, watched: Iterable[LogScale]) -> list[dict[int, Fraction]]:
        """How the watched log-scales move with each free variable.

        Args:
            watched: Log-scales, in an order that numbers them.

        Returns:
            One sparse vector per free variable that moves any: position in ``watched`` -> coefficient.
        """
        columns: dict[int, dict[int, Fraction]] = {}
        for position, scale in enumerate(watched):
            for variable, c in self.solution(scale).terms.items():
                columns.setdefault(variable, {})[position] = c
        return [columns[variable] for variable in sorted(columns)]


def integer_basis(system: LinearSystem, watched: Sequence[LogScale], leading: int) -> Tensor:
    """The null space of a system, seen in some log-scales, as a matrix of integers.

    Args:
        system: The equations.
        watched: W log-scales: parameters, then what moves along with them.
        leading: P, the number of parameters among them.

    Returns:
        float64 ``[G, W]``, with the rows of :func:`sparse_basis`.
    """
    basis = sparse_basis(system.null_space(watched), leading)
    matrix = torch.zeros(len(basis), len(watched), dtype=torch.float64)
    for g, vector in enumerate(basis):
        for position, c in vector.items():
            matrix[g, position] = c
    return matrix


def sparse_basis(vectors: Iterable[Mapping[int, Fraction]], leading: int) -> list[dict[int, int]]:
    """An integer, primitive and sparse basis of the span of vectors, seen in their first ``leading`` positions.

    Args:
        vectors: Sparse vectors, position -> coefficient.
        leading: P: positions 0, ..., P − 1 decide independence, sparsity, sign and order; later ones are carried along.

    Returns:
        Vectors with integer coefficients without a common divisor, their first positive, ordered by first position.
    """
    candidates = [_primitive(vector, leading) for vector in vectors]
    # Taking the sparsest first and dropping what depends on them gives the sparsest basis among the candidates.
    candidates.sort(key=lambda v: (_count(v, leading), sorted(v.items())))
    basis: list[dict[int, int]] = []
    echelon: dict[int, dict[int, Fraction]] = {}
    for vector in candidates:
        rest = {position: Fraction(c) for position, c in vector.items() if position < leading}
        while rest and (pivot := min(rest)) in echelon:
            rest = _combine(rest, echelon[pivot], -rest[pivot])
        if rest:
            echelon[min(rest)] = {position: c / rest[min(rest)] for position, c in rest.items()}
            basis.append(vector)
    improved = True
    while improved:
        improved = False
        for i, vector in enumerate(basis):
            for j, other in enumerate(basis):
                if i == j or vector.keys().isdisjoint(other):
                    continue
                for sign in (-1, 1):
                    trial = _combine(vector, other, sign)
                    if _count(trial, leading) < _count(vector, leading):
                        vector = basis[i] = _primitive(trial, leading)
                        improved = True
    return sorted(basis, key=lambda v: [(position, -v[position]) for position in sorted(v)])


def _count(vector: Mapping[int, Fraction | int], leading: int) -> int:
    return sum(position < leading for position in vector)


def _combine(
    vector: Mapping[int, Fraction | int], other: Mapping[int, Fraction | int], factor: Fraction | int
) -> dict[int, Fraction]:
    """vector + factor · other."""
    result = {p: Fraction(vector.get(p, 0)) + factor * other.get(p, 0) for p in {*vector, *other}}
    return {position: c for position, c in result.items() if c}


def _primitive(vector: Mapping[int, Fraction | int], leading: int) -> dict[int, int]:
    """Clear denominators and common divisors; the first entry becomes positive."""
    if not vector:
        return {}
    denominator = math.lcm(*(Fraction(c).denominator for c in vector.values()))
    integers = {position: int(c * denominator) for position, c in vector.items()}
    divisor = math.gcd(*integers.values())
    if integers[min(integers)] < 0:
        divisor = -divisor
    return {position: c // divisor for position, c in integers.items()}
