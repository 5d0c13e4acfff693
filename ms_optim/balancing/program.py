r"""The convex program whose minimiser is the canonical representative of a network's scale class.

Under W_p → e^{a_p} W_p with a = B t, a trace c_p becomes c_p e^{−2a_p} and a squared norm n_p becomes n_p e^{2a_p}.
Parameters with the same row of B always move together and form one class g, with

    C_g = Σ c_p ,     N_g = Σ n_p ,     R_g = Σ rows(p) ,

rows being output units, or entries for a vector.  A class is *scale-free* if some d has B d ≥ 0 and (B d)_g > 0: it
can grow while nothing shrinks (a weight in front of a normaliser), so that its trace has infimum 0 and its scale means
nothing.  The set F of these is one linear program (the 0/1 optimum of max Σ z, 0 ≤ z ≤ 1, z ≤ B d), and they are
pinned to unit-norm rows on average, N_g e^{2a_g} = R_g.  For a gauge κ in [0, 1] the representative minimises

    J_κ(t) = (1−κ) log Σ_{g∉F} C_g e^{−2a_g} + κ log Σ_{g∉F} N_g e^{2a_g} + Σ_{g∈F} ( (N_g/R_g) e^{2a_g} − 2a_g ) .

Every term is convex, and shifts by a constant when the network is rescaled: equivalent networks get one representative.
κ = 0 is the α* of the paper, κ = 1 balances norms and needs no trace.  The class of what no scale moves (a = 0) stays
in both sums: it shifts neither, and with 0 < κ < 1 it decides what a relative change of either sum is worth.

Source: arXiv 2106.12612, Theorem 1, for chains (κ = 0, F empty); the rest generalises it.  Differs from the paper:
(1) norms of gradients are squared, as its derivation needs; (2) biases and residual sums take the scale of their
output, so there is no closed form; (3) Newton on the logarithm: 10,000 steps of SGD stop short of the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv
from scipy.optimize import linprog

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]

# exp(±600) is finite with room for a product; only a trial step far outside of the trust region comes here.
_EXPONENT = 600.0


@dataclass(frozen=True, eq=False)
class Classes:
    """Parameters that always scale together; compared by identity, so that caches can hang on it.

    Attributes:
        parameters: The P names.
        member: ``[P]``, the class of each parameter.
        rows: B, ``[M, G]``, integer-valued and distinct; a row of zeros is the class that never moves.
        size: R_g, ``[M]``.
        matrix: ``[M]``, whether the class holds a tensor with two or more dimensions.
        moving: ``[M]``, whether any generator moves the class.
        free: F, ``[M]``, the scale-free classes.
    """

    parameters: tuple[str, ...]
    member: NDArray[np.intp]
    rows: Matrix
    size: Vector
    matrix: Mask
    moving: Mask
    free: Mask

    def total(self, values: Vector) -> Vector:
        """Sum a quantity per parameter ``[P]`` over each class ``[M]``."""
        return np.bincount(self.member, weights=values, minlength=len(self.rows)).astype(np.float64)

    def label(self, index: int) -> str:
        """The names of a class, for a message."""
        return ", ".join(name for name, g in zip(self.parameters, self.member, strict=True) if g == index)


@lru_cache(maxsize=64)
def classes(parameters: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], generators: bytes) -> Classes:
    """Gather the parameters of a group into classes; cached, because an optimizer asks again at every refresh.

    Args:
        parameters: The P names.
        shapes: Their shapes.
        generators: The float64 matrix ``[G, P]`` as bytes, which is what a cache can compare.

    Returns:
        The classes, in the order of their first parameter.
    """
    columns = np.frombuffer(generators, dtype=np.float64).reshape(-1, len(parameters)).T
    index: dict[tuple[int, ...], int] = {}
    member = np.array([index.setdefault(tuple(c), len(index)) for c in columns.astype(int).tolist()], dtype=np.intp)
    rows = np.array(list(index), dtype=np.float64).reshape(len(index), columns.shape[1])
    # Output units of a matrix or a kernel; the entries of a vector, and the one entry of a scalar.
    units = [shape[0] if len(shape) >= 2 else int(np.prod(shape)) for shape in shapes]
    matrix = np.zeros(len(rows), dtype=np.bool_)
    matrix[member[[len(shape) >= 2 for shape in shapes]]] = True
    return Classes(
        parameters=parameters,
        member=member,
        rows=rows,
        size=np.bincount(member, weights=units, minlength=len(rows)).astype(np.float64),
        matrix=matrix,
        moving=np.asarray(rows.any(axis=1)),
        free=scale_free(rows),
    )


def scale_free(rows: Matrix) -> Mask:
    """F = {g : some d has B d ≥ 0 and (B d)_g > 0}, by max Σ z subject to 0 ≤ z ≤ 1 and z ≤ B d.

    Directions add up, so one d serves all of F and the optimum is 0 or 1 in every entry.

    Args:
        rows: B, ``[M, G]``.

    Returns:
        ``[M]``.
    """
    count, dimension = rows.shape
    if dimension == 0:
        return np.zeros(count, dtype=np.bool_)
    solution = linprog(
        c=np.concatenate([np.zeros(dimension), -np.ones(count)]),
        A_ub=np.hstack([-rows, np.eye(count)]),
        b_ub=np.zeros(count),
        bounds=[(None, None)] * dimension + [(0.0, 1.0)] * count,
        method="highs",
    )
    assert solution.status == 0, f"the scale-free set is always feasible and bounded: {solution.message}"
    mask: Mask = solution.x[dimension:] > 0.5
    return mask


@dataclass(frozen=True, eq=False)
class Program:
    """J_κ with its numbers; a class that is absent from a sum has −∞ there.

    Attributes:
        rows: B, ``[M, G]``.
        log_trace: log C_g, ``[M]``, of the first sum.
        log_norm: log N_g, ``[M]``, of the second sum.
        log_pin: log N_g/R_g, ``[M]``, of the pinned classes.
        gauge: κ.
    """

    rows: Matrix
    log_trace: Vector
    log_norm: Vector
    log_pin: Vector
    gauge: float

    @property
    def active(self) -> Mask:
        """The classes that J depends on, ``[M]``."""
        trace = self.log_trace > -np.inf if self.gauge < 1 else np.zeros(len(self.rows), dtype=np.bool_)
        norm = self.log_norm > -np.inf if self.gauge > 0 else np.zeros(len(self.rows), dtype=np.bool_)
        return trace | norm | (self.log_pin > -np.inf)

    def shifted(self, a: Vector) -> Program:
        """The program of the same network after every class was scaled by e^{a_g}, a ``[M]``."""
        return Program(self.rows, self.log_trace - 2 * a, self.log_norm + 2 * a, self.log_pin + 2 * a, self.gauge)

    def value(self, a: Vector) -> float:
        """J at the log-scales a, ``[M]``."""
        pinned = self.log_pin > -np.inf
        value = float(np.sum(_exp(self.log_pin + 2 * a) - 2 * np.where(pinned, a, 0.0)))
        for weight, exponents in ((1 - self.gauge, self.log_trace - 2 * a), (self.gauge, self.log_norm + 2 * a)):
            peak = exponents.max(initial=-np.inf)
            if weight > 0 and peak > -np.inf:
                value += weight * float(peak + np.log(np.exp(exponents - peak).sum()))
        return value

    def derivatives(self, a: Vector, rows: Matrix) -> tuple[Vector, Matrix]:
        """Gradient ``[D]`` and Hessian ``[D, D]`` of J in coordinates y with a = rows y.

        With q and r the softmaxes of the two sums and x_g = (N_g/R_g) e^{2a_g}, as derivatives in a:
        ∇J = −2(1−κ) q + 2κ r + 2(x − 1) and ∇²J = 4(1−κ)(diag q − q qᵀ) + 4κ(diag r − r rᵀ) + 4 diag x.

        Args:
            a: ``[M]``.
            rows: ``[M, D]``.

        Returns:
            The gradient and the Hessian.
        """
        x = _exp(self.log_pin + 2 * a)
        slope = 2 * (x - (self.log_pin > -np.inf))
        diagonal = 4 * x
        outer = []
        for weight, sign, exponents in (
            (1 - self.gauge, -1, self.log_trace - 2 * a),
            (self.gauge, 1, self.log_norm + 2 * a),
        ):
            peak = exponents.max(initial=-np.inf)
            if weight > 0 and peak > -np.inf:
                share = np.exp(exponents - peak)
                share /= share.sum()
                slope += 2 * sign * weight * share
                diagonal += 4 * weight * share
                outer.append(2 * np.sqrt(weight) * (share @ rows))
        hessian = (rows.T * diagonal) @ rows
        for vector in outer:
            hessian -= np.outer(vector, vector)
        return slope @ rows, hessian

    def residual(self, t: Vector) -> float:
        """The largest entry of |∇J| at t, ``[G]``."""
        gradient, _ = self.derivatives(self.rows @ t, self.rows)
        return float(np.abs(gradient).max(initial=0.0))


def minimise(program: Program, radius: float = 2.0, iterations: int = 500) -> tuple[Vector, bool]:
    """The t of smallest norm among the minimisers of J, by Newton's method with a bound on the step.

    Deviations from the textbook: (1) it runs in independent generators, not in an orthonormal basis, and scales each
    by its curvature, because a branch that holds 10⁻²⁰ of the trace is invisible in J but not in its own coordinates;
    (2) for the same reason a step is judged by the slope at its end, not by the difference of two values of J;
    (3) the bound is on log-scales, doubles whenever it binds and the step is good, and shrinks with the step; (4) it
    stops when the log-scales stop, which is stricter than a small gradient.

    Args:
        program: J, attained (the caller has seen to that).
        radius: The first bound on max_g |Δa_g|, in natural logarithms.
        iterations: A guard; a trained network takes two to six.

    Returns:
        t, ``[G]``, and whether it arrived (where norms of dependent pinned classes disagree by e^{50}, it may not).
    """
    columns, lift = _coordinates(program.rows.tobytes(), program.rows.shape, program.active.tobytes())
    if not columns:
        return np.zeros(program.rows.shape[1]), True
    rows = program.rows[:, columns]
    y = _start(program, rows)
    a = rows @ y
    value = program.value(a)
    gradient, hessian = program.derivatives(a, rows)
    arrived = False
    for _ in range(iterations):
        direction = _descent(gradient, hessian, rows, radius)
        slope = float(gradient @ direction)
        length = float(np.abs(rows @ direction).max(initial=0.0))
        if length < 1e-8 or slope >= 0.0:
            # Newton converges quadratically: after this step what is left is rounding.
            y, arrived = y + direction, True
            break
        step = min(1.0, radius / length)
        for _ in range(60):
            trial = y + step * direction
            a = rows @ trial
            new_value = program.value(a)
            new_gradient, new_hessian = program.derivatives(a, rows)
            end = float(new_gradient @ direction)
            # Slope still negative: J fell all the way, by convexity.  Else the step went past the minimum along the
            # line, and both how far and whether J fell decide.
            if end <= 0.0 or (end <= -0.5 * slope and new_value <= value + 1e-13 * max(1.0, abs(value))):
                break
            step *= min(0.5, max(0.1, slope / (slope - end)))
        else:
            break
        bound = step * length >= 0.5 * radius
        radius = 2 * radius if bound else max(2.0, step * length)
        y, value, gradient, hessian = trial, new_value, new_gradient, new_hessian
    # Shortest among the equal minimisers: what moves no class is left out.
    return (y if len(columns) == program.rows.shape[1] else lift @ (rows @ y)), arrived


def _exp(exponents: Vector) -> Vector:
    return np.exp(np.minimum(exponents, _EXPONENT))


def _descent(gradient: Vector, hessian: Matrix, rows: Matrix, radius: float) -> Vector:
    """−(H + λ diag H)⁻¹ ∇J with the smallest λ of a ladder that Cholesky and the bound accept.

    The bound here is loose, since shortening a Newton step keeps its direction; but where one nearly flat coordinate
    asks for a huge step, shortening would stop all others.
    """
    diagonal = np.diag(hessian)
    scale = 1 / np.sqrt(np.maximum(diagonal, max(1e-300, 1e-60 * diagonal.max(initial=0.0))))
    scaled = hessian * scale[:, None] * scale
    right = -gradient * scale
    direction = right * scale
    for damping in (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        matrix = scaled.copy()
        matrix.flat[:: len(matrix) + 1] += damping
        _, solution, info = dposv(matrix, right)
        if info == 0 and np.isfinite(solution).all() and right @ solution > 0:
            direction = np.asarray(solution * scale, dtype=np.float64)
            if np.abs(rows @ direction).max() <= 30 * radius:
                break
    return direction


def _start(program: Program, rows: Matrix) -> Vector:
    """Zero, or the point that equalises the terms of each sum in least squares, whichever has the smaller J."""
    zero = np.zeros(rows.shape[1])
    gradient, _ = program.derivatives(np.zeros(len(rows)), rows)
    if np.abs(gradient).max(initial=0.0) < 0.1:
        return zero
    moves = rows.any(axis=1)
    blocks = []
    for weight, sign, logs in ((1 - program.gauge, 1, program.log_trace), (program.gauge, -1, program.log_norm)):
        use = moves & (logs > -np.inf)
        if weight > 0 and use.any():
            # sign · 2 a_g + level = log of the term; centring removes the unknown level.
            centred = rows[use] - rows[use].mean(axis=0)
            blocks.append((2 * sign * centred, logs[use] - logs[use].mean()))
    pinned = program.log_pin > -np.inf
    blocks.append((2 * rows[pinned], -program.log_pin[pinned]))
    matrix, right = np.vstack([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks])
    guess = np.asarray(np.linalg.lstsq(matrix, right, rcond=None)[0], dtype=np.float64)
    return guess if program.value(rows @ guess) < program.value(rows @ zero) else zero


@lru_cache(maxsize=256)
def _coordinates(rows: bytes, shape: tuple[int, int], active: bytes) -> tuple[list[int], Matrix]:
    """Generators that are independent on the active classes, and the map from log-scales to the shortest t."""
    used = np.frombuffer(rows, dtype=np.float64).reshape(shape) * np.frombuffer(active, dtype=np.bool_)[:, None]
    columns: list[int] = []
    for g in range(shape[1]):
        if np.linalg.matrix_rank(used[:, [*columns, g]]) > len(columns):
            columns.append(g)
    lift = np.linalg.pinv(used) * np.frombuffer(active, dtype=np.bool_)
    return columns, lift.astype(np.float64)
