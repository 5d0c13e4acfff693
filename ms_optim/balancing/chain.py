r"""Chains, where the representative has a closed form.

In a chain of D layers without biases or branches every rescaling that keeps the function is a vector of log-scales
with Σ_d a_d = 0.  By the inequality of arithmetic and geometric means

    MS = min Σ_d c_d α_d^{−2} = D (Π_d c_d)^{1/D} ,     α_d² = c_d / (Π c)^{1/D} ,

and the mirror image min Σ_d n_d α_d² has α_d² = (Π n)^{1/D} / n_d.  A parameter that no scale moves (the last bias)
adds a constant to either sum.  Everything is computed from logarithms, so a product of a thousand traces is no hazard.

Source: arXiv 2106.12612, Theorem 1 and Appendix C, whose printed α* is the one for α' = α^{−2}.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .program import Matrix, Program, Vector


def chain_log_scales(log_traces: Vector) -> Vector:
    """log α_d = ½ (log c_d − mean log c).

    Args:
        log_traces: log c_d, ``[D]``.

    Returns:
        ``[D]``, with sum 0.

    >>> chain_log_scales(np.log(np.array([16.0, 1.0]))) / np.log(2.0)  # α = 2, 1/2
    array([ 1., -1.])
    """
    return np.asarray(0.5 * (log_traces - log_traces.mean()), dtype=np.float64)


def chain_minimum(log_traces: Vector) -> float:
    """MS = D (Π c_d)^{1/D}.

    Args:
        log_traces: log c_d, ``[D]``.

    Returns:
        Minimum sharpness, in units of loss.

    >>> round(chain_minimum(np.log(np.array([16.0, 1.0]))), 12)  # 16 / 4 + 1 · 4
    8.0
    """
    return float(len(log_traces) * np.exp(log_traces.mean()))


def is_chain(rows: Matrix) -> bool:
    """Whether {B t} is {a : Σ a_d = 0}: D ≥ 2 classes, rank D − 1, and columns that sum to 0.

    Such a group has no scale-free class: nothing grows unless something shrinks.

    Args:
        rows: B, ``[D, G]``, of the classes that move.

    Returns:
        True or False.
    """
    if len(rows) < 2 or rows.sum(axis=0).any():
        return False
    return int(np.linalg.matrix_rank(rows)) == len(rows) - 1


def closed_form(program: Program) -> Vector | None:
    """The t of smallest norm at the minimum of J, where it is known in closed form.

    Args:
        program: J_κ.

    Returns:
        t, ``[G]``, for a chain with κ = 0 and positive traces, or κ = 1 and positive norms; else None.  In between the
        two softmaxes do not separate.
    """
    if program.gauge not in (0.0, 1.0):
        return None
    moving = program.rows.any(axis=1)
    logs = program.log_trace[moving] if program.gauge == 0 else -program.log_norm[moving]
    if not np.isfinite(logs).all():
        return None
    inverse = _chain_inverse(program.rows[moving].tobytes(), program.rows[moving].shape)
    return None if inverse is None else inverse @ chain_log_scales(logs)


@lru_cache(maxsize=64)
def _chain_inverse(rows: bytes, shape: tuple[int, int]) -> Matrix | None:
    matrix = np.frombuffer(rows, dtype=np.float64).reshape(shape)
    return np.linalg.pinv(matrix).astype(np.float64) if is_chain(matrix) else None
