r"""Rényi sharpness: minus the Rényi entropy of the normalised spectrum of the curvature.

    RS_a = −(1/(1−a)) log( Tr |H|^a / (Tr H)^a ) ,   a > 0, a ≠ 1 ;     RS_1 = Σ_i p_i log p_i ,  p_i = |λ_i| / Tr |H|

It says how unevenly the curvature is spread over the directions, from −log d (evenly) to 0 (one direction), and nothing
about its size.  So a layer's value does not change under rescalings of layers, which multiply its block by a number;
that of the whole network does, since they multiply each block by its own.

Negative eigenvalues enter the power as |λ| and the trace with their sign, as in the authors' code; where there are
some, the value may leave that range, and at a = 1 the limit does not exist, so that the sum there is normalised by Tr
|H|.  (For a positive semidefinite H the two agree and RS_1 is the limit.)

Both traces are from the same probes, and the error of the logarithm of their quotient is by the delta method:

    (1/|a−1|) · standard error over probes of  x_v / X − a y_v / Y ,   X = mean x_v ≈ Tr |H|^a ,  Y = mean y_v ≈ Tr H .

Source: arXiv 2510.07758 (definition and Prop. 2.2, through notes on it), and its code (QiaozheZhang/RSAM) for the
signs, the probes and the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature.operator import seeded, whole_number
from ..curvature.products import Matrix, curvature_of
from ..curvature.risk import Loss
from ..curvature.spectrum import Spectrum, spectrum
from .value import Sharpness


def renyi_sharpness(
    model: nn.Module,
    data: Any,
    order: float = 1.2,  # a
    parameters: Sequence[str] | Literal["all"] | None = None,
    matrix: Matrix = "hessian",
    probes: int = 100,  # m
    steps: int = 15,  # k
    loss: Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""Rényi sharpness, :math:`-\frac{1}{1-a}\log\frac{\operatorname{Tr}|H|^a}{(\operatorname{Tr}H)^a}`, by layer.

    Unchanged by rescalings of layers: each value in ``layers``. Not: the value itself, which is of all parameters
    together (unless one is named).

    Cost: m·k products with the matrix for the value and again for each layer, each of the time of 3 to 9 gradients; for
    d ≤ m·k parameters (and at most 2048) d products, from which the spectrum is exact.

    Args:
        model: Measured in evaluation mode, unchanged.
        data: ``(inputs, targets)`` or an iterable of those, as in :func:`ms_optim.hessian_trace`; the Gauss-Newton
            matrix needs no targets.
        order: a > 0; at 1 the Shannon entropy. The paper's grid is 0.0001 to 3.
        parameters: ``None``: the value is of all trainable parameters together, the layers are those of at least two
            dimensions, as in the paper. ``"all"``: every trainable parameter is a layer. Names: these are the layers,
            and the value is of their common block.
        matrix: ``"hessian"``, or ``"gauss-newton"``, which has no negative eigenvalues.
        probes: m; 100 in the paper.
        steps: k; 15 in the paper.
        loss: As in :func:`ms_optim.curvature.approximations.hutchinson_diagonal`.
        generator: Draws the probes; by default a fresh one with a fixed seed.

    Returns:
        The value, without unit. ``standard_error``, ``layers``, and in ``details``: ``trace`` and ``power_trace`` (Tr H
        and Tr |H|^a), ``negative_share`` (the part of Tr |H| that is of negative eigenvalues), ``steps_error`` (the
        change from half of the steps, for orders below 1 the larger error), ``dimension``, ``products``, and
        ``standard_error of NAME`` for each layer. A value is NaN, and the notes say so, where the trace is not
        positive.

    Raises:
        CurvatureError: If no parameter is trainable, or a product is not finite.
        DataError: If data is not batches, or lacks targets.
        UnsupportedError: If the loss is not supported.
        ValueError: If a number or a name is out of range.

    Source: arXiv 2510.07758.

    >>> net = torch.nn.Linear(3, 1, bias=False)  # the mean square of w·x for one x: rank 1, one direction
    >>> round(renyi_sharpness(net, (torch.ones(1, 3), torch.ones(1, 1)), 2.0, loss="mse"), 6) + 0.0
    0.0
    """
    if not (order > 0.0 and math.isfinite(order)):
        raise ValueError(f"order must be > 0 and finite, got {order}; the paper's grid is 0.0001 to 3")
    whole_number("probes", probes)
    whole_number("steps", steps)
    generator = seeded(generator)
    with curvature_of(model, data, loss, matrix) as curvature:
        names = curvature.chosen(None if parameters == "all" else parameters)
        layers = [name for name in names if parameters is not None or curvature.parameters[name].ndim >= 2]
        whole = spectrum(curvature.block(names), probes, steps, generator)
        found: dict[str, tuple[float, float]] = {}
        notes = []
        for name in layers:
            own = whole if names == (name,) else spectrum(curvature.block([name]), probes, steps, generator)
            own_value, own_error, note = renyi_of(own, order)
            found[name] = (own_value, own_error)
            notes += [f"{name}: {note}"] if note else []
        value, error, note = renyi_of(whole, order)
        size, trace = whole.trace(torch.abs)[0], whole.trace(lambda x: x)[0]
        coarse = math.nan if whole.coarse is None else renyi_of(whole.coarse, order)[0]
        return Sharpness(
            value,
            standard_error=error,
            layers={name: pair[0] for name, pair in found.items()},
            notes=[note, *notes] if note else notes,
            details={
                "trace": trace,
                "negative_share": 0.5 * (1.0 - trace / size) if size > 0.0 else 0.0,
                "power_trace": whole.trace(lambda x: x.abs() ** order)[0],
                "steps_error": 0.0 if whole.exact else abs(value - coarse),
                "dimension": whole.dimension,
                "products": curvature.products,
                **{f"standard_error of {name}": pair[1] for name, pair in found.items()},
            },
        )


def renyi_of(measure: Spectrum, order: float) -> tuple[float, float, str]:
    """Rényi sharpness of a spectral measure.

    Args:
        measure: The spectrum.
        order: a > 0.

    Returns:
        The value, its standard error, and why it is NaN, if it is.
    """
    if order == 1.0:
        return _shannon(measure)
    power, trace = measure.samples(lambda x: x.abs() ** order), measure.samples(lambda x: x)
    x, y = float(power.mean()), float(trace.mean())
    if not y > 0.0:
        return math.nan, math.nan, f"the trace is {y:.3g}, not positive, and has no logarithm; use 'gauss-newton'"
    value = (math.log(x) - order * math.log(y)) / (order - 1.0)
    return value, measure.standard_error((power / x - order * trace / y) / (order - 1.0)), ""


def _shannon(measure: Spectrum) -> tuple[float, float, str]:
    """Σ p log p = X / N − log N with X = Tr |H| log |H|, N = Tr |H|."""
    product: Tensor = measure.samples(lambda x: torch.special.xlogy(x.abs(), x.abs()))
    size = measure.samples(torch.abs)
    x, n = float(product.mean()), float(size.mean())
    if not n > 0.0:
        return math.nan, math.nan, "the matrix is 0, which has no normalised spectrum"
    return x / n - math.log(n), measure.standard_error(product / n - (x / n + 1.0) * size / n), ""
