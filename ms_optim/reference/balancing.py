r"""The slow twin of balancing: the printed formula, one term per parameter, and a general-purpose minimiser.

    J_κ(t) = (1−κ) log Σ_{p∉F} c_p e^{−2a_p} + κ log Σ_{p∉F} n_p e^{2a_p} + Σ_{g∈F} ( (N_g/R_g) e^{2a_g} − 2a_g )

with a = B t, F = {g : max (B d)_g > 0 over B d ≥ 0} one linear program per parameter, and no repair of anything:
traces and norms have to be positive.  Derivatives by automatic differentiation, several starts, the best wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize
from torch import Tensor


def reference_free(generators: Tensor) -> list[bool]:
    """Which parameters are scale-free: p is if some d has B d ≥ 0 and (B d)_p > 0.

    Args:
        generators: Bᵀ, ``[G, P]``.

    Returns:
        One answer for each parameter.
    """
    b = generators.numpy().T
    free = []
    for row in b:
        best = linprog(-row, A_ub=-b, b_ub=np.zeros(len(b)), bounds=[(-1.0, 1.0)] * b.shape[1], method="highs")
        free.append(bool(-best.fun > 1e-6))
    return free


def reference_objective(
    t: Tensor,
    traces: Tensor,
    norms: Tensor,
    rows: Sequence[int],
    generators: Tensor,
    free: Sequence[bool],
    gauge: float,
) -> Tensor:
    """J_κ(t), as printed.

    Args:
        t: ``[G]``.
        traces: c_p, ``[P]``.
        norms: n_p, ``[P]``.
        rows: rows(p), ``[P]``.
        generators: Bᵀ, ``[G, P]``.
        free: F, ``[P]``.
        gauge: κ.

    Returns:
        A scalar.
    """
    a = t @ generators
    trace, norm, pins = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    groups: dict[tuple[float, ...], list[int]] = {}
    for p in range(len(free)):
        if free[p]:
            groups.setdefault(tuple(generators[:, p].tolist()), []).append(p)
        else:
            trace = trace + traces[p] * torch.exp(-2 * a[p])
            norm = norm + norms[p] * torch.exp(2 * a[p])
    for members in groups.values():
        ratio = norms[members].sum() / sum(rows[p] for p in members)
        pins = pins + ratio * torch.exp(2 * a[members[0]]) - 2 * a[members[0]]
    if all(free):
        return pins
    value = pins
    if gauge < 1:
        value = value + (1 - gauge) * torch.log(trace)
    if gauge > 0:
        value = value + gauge * torch.log(norm)
    return value


def reference_balance(
    traces: Tensor, norms: Tensor, rows: Sequence[int], generators: Tensor, gauge: float = 0.0, starts: int = 3
) -> tuple[Tensor, float]:
    """The log-scales a_p of the representative, and Σ_p c_p e^{−2a_p} there.

    Args:
        traces: c_p > 0, ``[P]``.
        norms: n_p > 0, ``[P]``.
        rows: rows(p), ``[P]``.
        generators: Bᵀ, ``[G, P]``.
        gauge: κ.
        starts: How many starting points: 0 and random ones.

    Returns:
        ``[P]``, and the value.
    """
    free = reference_free(generators)

    def value_and_slope(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = reference_objective(t, traces, norms, rows, generators, free, gauge)
        (slope,) = torch.autograd.grad(value, t, allow_unused=True)
        return float(value.detach()), np.zeros_like(x) if slope is None else slope.numpy()

    random = np.random.default_rng(0)
    points = [random.standard_normal(len(generators)) * (start > 0) for start in range(starts)]
    runs = [minimize(value_and_slope, x, jac=True, method="BFGS", options={"gtol": 1e-11}) for x in points]
    a = torch.tensor(min(runs, key=lambda run: run.fun).x, dtype=torch.float64) @ generators
    return a, float((traces * torch.exp(-2 * a)).sum())
