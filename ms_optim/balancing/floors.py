r"""Degenerate traces and norms: what makes J run away, and the smallest covariant repair.

A dead layer has C_g = 0, a zero-initialised head N_g = 0, a saturated softmax traces of 10⁻³⁰.  Then J may have no
minimum (log α runs to ±∞) or many.  That is a question about directions: J is attained, and by one set of scales
only, if its growth along every direction d that moves anything is positive,

    r(d) = −2(1−κ) min_{C_g>0} a_g + 2κ max_{N_g>0} a_g + 2 Σ_{pinned} |a_g| ,   a = B d,  a_g ≤ 0 where pinned

(a pinned class that grows costs exponentially).  r is piecewise linear, so two small linear programs decide.

Whether a class is negligible must not depend on the representative: C_g N_g does not, C_g and N_g do.  Classes with
C_g N_g ≤ ε max_q C_q N_q are *weak*.  If J is attained without them, nothing is touched: their true values stay in
the program, where they are small (a bias of norm 10⁻²⁰ is harmless; a floor on it would explode).  Otherwise the
products of weak classes are raised to ε max_q C_q N_q, by raising C_g where N_g > 0 and N_g elsewhere: first those of
matrices and kernels, then those of vectors.  A plain floor on C_g, or keeping a scale as it is, would not be
covariant: equivalent networks would get different representatives.  If products cannot help because all are zero (a
zero head on a new network: only its own trace is positive, and its norm is zero), every class that has a norm is
pinned to unit-norm rows, as scale-free classes are, and a class of zeros to a trace of 1; that is always attained.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.optimize import linprog

from .program import Classes, Mask, Program, Vector

EPSILON = 1e-8


def attained(classes: Classes, trace: Mask, norm: Mask, pinned: Mask, alive: Mask, gauge: float) -> bool:
    """Whether J has a minimum, and every minimiser the same log-scales on the classes that are alive.

    Args:
        classes: The classes.
        trace: ``[M]``, which terms the first sum has.
        norm: ``[M]``, which terms the second sum has.
        pinned: ``[M]``, which classes are pinned.
        alive: ``[M]``, whose scales must be determined.
        gauge: κ.

    Returns:
        False if some direction lets J run away or leaves it flat while it moves a class that is alive.
    """
    return _attained(classes, trace.tobytes(), norm.tobytes(), pinned.tobytes(), alive.tobytes(), gauge)


@lru_cache(maxsize=256)
def _attained(classes: Classes, *masks_and_gauge: bytes | float) -> bool:
    *masks, gauge = masks_and_gauge
    assert isinstance(gauge, float)
    trace, norm, pinned, alive = (np.frombuffer(m, dtype=np.bool_) for m in masks if isinstance(m, bytes))
    rows = classes.rows
    dimension = rows.shape[1]
    # Variables: d, the smallest a_g of the first sum, the largest a_g of the second.
    lowest = np.zeros(dimension + 2)
    lowest[dimension] = 1.0 if trace.any() and gauge < 1 else 0.0
    highest = np.zeros(dimension + 2)
    highest[dimension + 1] = 1.0 if norm.any() and gauge > 0 else 0.0
    a = np.hstack([rows, np.zeros((len(rows), 2))])
    growth = (gauge * highest - (1 - gauge) * lowest - a[pinned].sum(axis=0))[None, :]
    constraints = [a[pinned], growth]
    if lowest.any():
        constraints.append(lowest - a[trace])
    if highest.any():
        constraints.append(a[norm] - highest)
    matrix = np.vstack(constraints)
    # A cone lies in the kernel of the live rows if and only if a generic functional of them vanishes on it: both signs.
    generic = np.sqrt(np.arange(2, 2 + len(rows))) % 1 + 1
    functional = (generic * alive) @ a
    bounds = [(-1.0, 1.0)] * dimension + [(None, None)] * 2
    for sign in (1.0, -1.0):
        solution = linprog(sign * functional, A_ub=matrix, b_ub=np.zeros(len(matrix)), bounds=bounds, method="highs")
        # d = 0 is feasible; a ray reaches the box, and HiGHS is exact to 1e-7.
        if solution.status != 0 or -solution.fun > 1e-5:
            return False
    return True


def floored(classes: Classes, traces: Vector, norms: Vector, gauge: float) -> tuple[Program, Mask, tuple[str, ...]]:
    """J_κ from the sums per class, repaired where it would have no minimum or more than one.

    Args:
        classes: The classes.
        traces: C_g ≥ 0, ``[M]``.
        norms: N_g ≥ 0, ``[M]``.
        gauge: κ.

    Returns:
        The program, the mask ``[M]`` of its pinned classes (F, unless everything had to be), and a note for each
        repair with the names of the parameters.
    """
    bounded = classes.moving & ~classes.free
    notes = []
    if gauge < 1 and bounded.any() and not traces[bounded].any():
        gauge = 1.0
        notes.append("every trace that could decide a scale is 0: norms are balanced instead, as with gauge=1")
    product = traces * norms
    level = EPSILON * float(product[classes.moving].max(initial=0.0))
    weak = (bounded & (norms == 0 if gauge == 1 else product <= level)) | (classes.free & (norms == 0))
    alive = classes.moving & ((traces > 0) | (norms > 0))

    def complete() -> bool:
        free = classes.free
        return attained(
            classes, ~free & (traces > 0) & ~weak, ~free & (norms > 0) & ~weak, free & (norms > 0) & ~weak, alive, gauge
        )

    if not weak.any() or complete():
        return _program(classes, traces, norms, classes.free, gauge), classes.free, tuple(notes)
    true_traces, true_norms = traces, norms
    traces, norms = traces.copy(), norms.copy()
    for kind in (classes.matrix, ~classes.matrix):
        for g in np.flatnonzero(weak & alive & kind).tolist():
            if level > 0 and norms[g] > 0:
                notes.append(_note("trace", classes, g, traces[g], level / norms[g]))
                traces[g] = max(traces[g], level / norms[g])
            elif level > 0 and (gauge > 0 or classes.free[g]):
                notes.append(_note("squared norm", classes, g, 0.0, level / traces[g]))
                norms[g] = level / traces[g]
            # With κ = 0 and norm 0 the trace is all there is to know, and counts as it is.
            weak[g] = False
        if complete():
            return _program(classes, traces, norms, classes.free, gauge), classes.free, tuple(notes)
    notes = [
        "traces and norms leave scales undetermined, and no product of them is positive enough to decide: parameters "
        "are set to unit-norm rows on average, parameters that are all zero to a trace of 1"
    ]
    # e^{2a} / C_g = 1 where there is no norm.
    substitutes = np.where(true_norms > 0, true_norms, classes.size / np.where(true_traces > 0, true_traces, 1.0))
    return _program(classes, true_traces, substitutes, alive, gauge, sums=False), alive, tuple(notes)


def _program(
    classes: Classes, traces: Vector, norms: Vector, pinned: Mask, gauge: float, sums: bool = True
) -> Program:
    with np.errstate(divide="ignore"):
        log_trace, log_norm = np.log(traces), np.log(norms)
    summed = ~pinned & sums
    return Program(
        rows=classes.rows,
        log_trace=np.where(summed, log_trace, -np.inf),
        log_norm=np.where(summed, log_norm, -np.inf),
        log_pin=np.where(pinned, log_norm - np.log(np.maximum(classes.size, 1.0)), -np.inf),
        gauge=gauge,
    )


def _note(what: str, classes: Classes, g: int, value: float, floor: float) -> str:
    return (
        f"{what} of {classes.label(g)} raised from {value:.3g} to {max(value, floor):.3g} in the program: "
        "its own value leaves the scale undetermined"
    )
