r"""The slow twin of balancing single units, for fully connected ReLU networks: formula, unit by unit, in dense arrays.

    f(u) = Σ_l Σ_{j,i} C_l,ji e^{−2 (u_l,j − u_{l−1},i)} + Σ_l Σ_j c_l,j e^{−2 u_l,j} ,     u_0 = u_D = 0,

C_l the diagonal of layer l's weight and c_l that of its bias.  Once with a general-purpose minimiser and derivatives by
automatic differentiation, once with Osborne's iteration as it is printed: one unit after the other,
e^{4 u} = incoming / outgoing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

Layers = Sequence[tuple[Tensor, Tensor | None]]


def reference_units(scales: Sequence[Tensor], layers: Layers) -> Tensor:
    """f(u), as printed.

    Args:
        scales: u_1, …, u_{D−1}.
        layers: C_l ``[out, in]`` and c_l ``[out]`` (or None), for every layer.

    Returns:
        A scalar.
    """
    fixed_in = torch.zeros(layers[0][0].shape[1], dtype=torch.float64)
    fixed_out = torch.zeros(layers[-1][0].shape[0], dtype=torch.float64)
    ends = [fixed_in, *scales, fixed_out]
    total = torch.zeros((), dtype=torch.float64)
    for (weight, bias), before, after in zip(layers, ends[:-1], ends[1:], strict=True):
        total = total + (weight * torch.exp(-2 * (after[:, None] - before[None, :]))).sum()
        if bias is not None:
            total = total + (bias * torch.exp(-2 * after)).sum()
    return total


def reference_unit_minimum(layers: Layers) -> tuple[list[Tensor], float]:
    """The minimiser and the minimum, by BFGS.

    Args:
        layers: As in :func:`reference_units`, all entries positive.

    Returns:
        u_1, …, u_{D−1}, and f there.
    """
    widths = [weight.shape[0] for weight, _ in layers[:-1]]

    def split(x: Tensor) -> list[Tensor]:
        return list(x.split(widths))

    def value_and_slope(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = reference_units(split(t), layers).log()
        (slope,) = torch.autograd.grad(value, t)
        return float(value.detach()), slope.numpy()

    run = minimize(value_and_slope, np.zeros(sum(widths)), jac=True, method="BFGS", options={"gtol": 1e-11})
    found = split(torch.tensor(run.x, dtype=torch.float64))
    return found, float(reference_units(found, layers))


def reference_osborne(layers: Layers, sweeps: int = 500) -> list[Tensor]:
    """The minimiser by Osborne's iteration, one unit at a time.

    Args:
        layers: As in :func:`reference_units`.
        sweeps: How often each unit is visited.

    Returns:
        u_1, …, u_{D−1}.
    """
    weights = [weight.clone() for weight, _ in layers]
    biases = [None if bias is None else bias.clone() for _, bias in layers]
    scales = [torch.zeros(weight.shape[0], dtype=torch.float64) for weight in weights[:-1]]
    for _ in range(sweeps):
        for layer, u in enumerate(scales):
            bias = biases[layer]
            for j in range(len(u)):
                incoming = weights[layer][j].sum() + (0.0 if bias is None else bias[j])
                outgoing = weights[layer + 1][:, j].sum()
                step = 0.25 * torch.log(incoming / outgoing)
                u[j] += step
                weights[layer][j] *= torch.exp(-2 * step)
                weights[layer + 1][:, j] *= torch.exp(2 * step)
                if bias is not None:
                    bias[j] *= torch.exp(-2 * step)
    return scales
