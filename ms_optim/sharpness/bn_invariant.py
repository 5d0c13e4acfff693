r"""BN-invariant sharpness: a perturbation is measured in units of the weight where a normaliser makes its scale free.

    max_{‖V^{−1} ε‖_p ≤ ρ}  L(w + ε) − L(w) ,      V = ‖w_f‖ for the filters in front of a normaliser, else 1

A filter w_f followed by BatchNorm may have any norm: the function is the same, and every sharpness in absolute units
goes to 0 as it grows.  Here its perturbation grows along.  Which weights these are is read off the network's scale
group: those of a class that can grow while nothing shrinks.  That includes the biases there, and γ and β where they
reach the logits through other normalisers only; of a vector each entry is a unit, V = |w_i|.  All other weights keep
absolute units, so what is *not* undone is a scale that one layer gives to the next (the last γ and β against the layer
behind); :mod:`.adaptive` does that too.

Three cases: the ``"worst"`` rise; the ``"average"`` one under noise N(0, ρ² V²); and along a line

    integral   ( 1/(2ρ) ∫_{−ρ}^{ρ} |L(w + t V v) − L(w)|^q dt )^{1/q} ,      v the unit direction of the worst rise.

Source: Yi, Zhang, Chen, Ma, Liu, "BN-invariant sharpness regularizes the training model to better generalization",
arXiv 2101.02944.  From memory: sharpness there is tied to the scale of the parameters, and computed as an integral in
one dimension along the sharpest direction; none of it was checked against the text.  Differs, as far as remembered:
(1) the sharpest direction is found by gradient ascent, not by one gradient; (2) the largest rise is a case of its own,
and the default; (3) which weights are scale-free is read off the graph, also in front of LayerNorm and the like, and
not only kernels and matrices are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from ..balancing.program import classes
from ..batch import peek
from ..curvature.operator import seeded
from ..curvature.parallel import unwrapped
from ..curvature.risk import Loss, named_loss
from ..errors import NoEffectWarning, SymmetryError
from ..symmetry import ScaleGroup, scale_symmetries
from .adaptive import Search, metric, peak, searched
from .ascent import Norm
from .neighbourhood import Neighbourhood, Part, neighbourhood, positive
from .value import Sharpness

# Nodes of the Gauss-Legendre rule on each side of the weights, where the integrand has a kink.
_NODES = 8


def bn_invariant_sharpness(
    model: nn.Module,
    data: Any,
    rho: float = 0.05,  # ρ
    norm: Norm = "l2",  # p
    case: Literal["worst", "average", "integral"] = "worst",
    *,
    power: float = 1.0,  # q
    steps: int = 20,
    step_size: float | None = None,
    samples: int = 20,
    m: int | None = None,
    loss: Loss = "cross_entropy",
    group: ScaleGroup | None = None,
    generator: Any = None,
) -> Sharpness:
    r"""Sharpness with own units for scale-free weights, :math:`\max_{\|V^{-1}\epsilon\| \le \rho} L(w+\epsilon)-L(w)`.

    Args:
        model: As in :func:`ms_optim.adaptive_sharpness`, and so are the arguments that are not described here.
        data: As there.
        rho: ρ > 0: for the weights in front of normalisers relative to the norms of their filters, for all others in
            their own units.
        norm: As there.
        case: ``"worst"``, ``"average"``, or ``"integral"`` along the worst direction.
        power: q > 0 of the integral.
        steps: As there.
        step_size: As there.
        samples: As there.
        m: As there.
        loss: As there.
        group: The scale group; discovered on the first batch if ``None``.
        generator: As there.

    Returns:
        As there; ``notes`` says so if no weight is scale-free, where the measure is :func:`ms_optim.sam_sharpness`.

    Raises:
        CurvatureError: As there.
        DataError: As there.
        SymmetryError: If the model cannot be read, or the group is another model's.
        UnsupportedError: As there.
        ValueError: As there.

    Source: arXiv 2101.02944 (from memory).
    """
    if case not in ("worst", "average", "integral"):
        raise ValueError(f"case must be 'worst', 'average' or 'integral', got {case!r}")
    positive("power", power, "it is q in the integral's mean of |rise|^q")
    # (The average of a function on a line needs that line: the search for the worst point.)
    kind: Literal["worst", "average"] = "average" if case == "average" else "worst"
    search = Search(rho, norm, kind, steps, step_size, samples, m, loss, False, generator)
    model = unwrapped(model)
    if isinstance(data, Iterator):
        data = list(data)  # looking ahead at an iterator's first batch would lose its targets
    if group is None:
        example = peek(data, model)[0].to(next(model.parameters()).device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)  # of balancing; what it means here is a note
            group = scale_symmetries(model, example)
    free = scale_free_names(model, group)

    def unit(weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [metric(w, "filter" if name in free else None) for name, w in weights.items()]

    if case == "integral":
        with neighbourhood(model, data, named_loss(loss), m) as near:
            value = _integral(near, unit(dict(zip(near.risk.parameters, near.weights, strict=True))), search, power)
    else:
        value = searched(model, data, search, unit)
    if not free:
        value.notes += ("no normaliser makes a weight scale-free: all perturbations are in absolute units",)
    return value


def scale_free_names(model: nn.Module, group: ScaleGroup) -> set[str]:
    """The parameters whose scale means nothing: of a class that can grow while none shrinks.

    Args:
        model: The model.
        group: Its scale group.

    Returns:
        Their names.

    Raises:
        SymmetryError: If the group is another model's.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if shapes.keys() != set(group.parameters):
        raise SymmetryError(
            f"the group has {len(group.parameters)} parameters that are not those of {type(model).__name__}; rebuild "
            "it with scale_symmetries(model, example_inputs)"
        )
    found = classes(
        group.parameters,
        tuple(shapes[name] for name in group.parameters),
        group.generators.detach().cpu().double().numpy().tobytes(),
    )
    return {name for name, g in zip(group.parameters, found.member, strict=True) if found.free[g]}


def _integral(near: Neighbourhood, t: Sequence[Tensor], search: Search, power: float) -> Sharpness:
    """The mean over pieces of the integral along their worst direction."""
    generator = seeded(search.generator)
    values, losses = [], []
    for part in near.parts:
        found = peak(near, part, t, search, generator)
        values.append(part.share * _along(near, part, t, found.point, found.start, search, power))
        losses.append(part.share * found.start)
    return Sharpness(math.fsum(values), details={"loss": math.fsum(losses), "pieces": float(len(values))})


def _along(
    near: Neighbourhood,
    part: Part,
    t: Sequence[Tensor],
    point: Sequence[Tensor],
    clean: float,
    search: Search,
    power: float,
) -> float:
    """( 1/(2ρ) ∫ |L(w + t V v) − L(w)|^q dt )^{1/q} along one direction; 0 where no direction rises."""
    length = _norm(point, search.norm)
    if length == 0.0:
        return 0.0
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    total = 0.0
    for side in (-1.0, 1.0):
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            distance = side * search.rho * 0.5 * (node + 1.0) / length
            near.move([distance * scale * z for scale, z in zip(t, point, strict=True)])
            total += 0.25 * weight * abs(near.loss(part) - clean) ** power
    return total ** (1.0 / power)


def _norm(point: Sequence[Tensor], norm: Norm) -> float:
    """‖z‖_p over all tensors."""
    if norm == "linf":
        return max(float(z.abs().max()) for z in point)
    return math.hypot(*(float(z.double().norm()) for z in point))
