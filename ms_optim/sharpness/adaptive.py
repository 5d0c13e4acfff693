r"""Adaptive sharpness: how far the loss rises near the weights, where "near" is in units of the weights themselves.

    worst      mean_S  max_{‖T^{−1} ε‖_p ≤ ρ}  L_S(w + ε) − L_S(w)
    average    E_{ε ~ N(0, ρ² T²)}  L(w + ε) − L(w)

S runs over pieces of m samples, each with a perturbation of its own (m-sharpness), and T is diagonal:

    scale       T of an entry                                                     unchanged by rescaling
    None        1 (SAM)                                                           –
    "element"   |w_i| (ASAM)                                                      layers, filters, neurons: everything
    "filter"    ‖w_f‖ of its output unit's row or kernel; |w_i| in a vector       layers, and units as a whole
    "layer"     ‖W_p‖ of its tensor                                               layers

Under W_p → a W_p, T → a T, and the set of w + ε goes along: with a symmetry of the network the value is the same.  An
entry that is 0 does not move with "element", nor a tensor of zeros with any of the three.  There is no η added to T
(ASAM's paper has η = 0.01), since it would break the invariance.

Labels enter: unlike traces, a loss needs them.  The maximum is searched by projected gradient ascent (:mod:`.ascent`),
whose value is a lower bound; with one step in ℓ2 it is the rise of the loss at SAM's (ASAM's) perturbed point.

Source: SAM, arXiv 2010.01412, for m-sharpness; ASAM, arXiv 2102.11600, for T; both cases as in Andriushchenko et al.,
arXiv 2302.07011, and its code (tml-epfl/sharpness-vs-generalization: 20 steps, 1024 points in batches of 128, logits
normalised; definitions and the normalisation from memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature.operator import seeded
from ..curvature.risk import Loss, named_loss
from .ascent import Norm, Peak, climb
from .neighbourhood import Neighbourhood, Part, counted, neighbourhood, normal, positive
from .value import Sharpness

Scale = Literal["element", "filter", "layer"] | None
Case = Literal["worst", "average"]

# Names and weights → T, each broadcastable to its weight.
Metric = Callable[[Mapping[str, Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Search:
    """How the neighbourhood is searched; see :func:`adaptive_sharpness` for the fields."""

    rho: float
    norm: Norm = "l2"
    case: Case = "worst"
    steps: int = 20
    step_size: float | None = None
    samples: int = 20
    m: int | None = None
    loss: Loss = "cross_entropy"
    normalize_logits: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Refuse numbers and words that mean nothing."""
        positive("rho", self.rho, "it is the radius of the ball, or the noise's standard deviation, in units of T")
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"norm must be 'l2' or 'linf', got {self.norm!r}")
        if self.case not in ("worst", "average"):
            raise ValueError(f"case must be 'worst' or 'average', got {self.case!r}")
        counted("steps", self.steps, "each costs a forward and a backward pass; 1 is SAM's own step")
        counted("samples", self.samples, "each costs a forward pass; the error falls like 1/√samples")
        if self.step_size is not None:
            positive("step_size", self.step_size, "None begins with 2ρ")


def adaptive_sharpness(
    model: nn.Module,
    data: Any,
    rho: float = 0.5,  # ρ
    norm: Norm = "l2",  # p
    case: Case = "worst",
    scale: Scale = "element",  # T
    *,
    steps: int = 20,
    step_size: float | None = None,
    samples: int = 20,
    m: int | None = None,
    loss: Loss = "cross_entropy",
    normalize_logits: bool = False,
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""Rise of the loss in units of the weights, :math:`\max_{\|T^{-1}\epsilon\|_p \le \rho} L(w+\epsilon) - L(w)`.

    Args:
        model: Called in evaluation mode; weights, buffers, ``.grad`` and random streams are as before on leaving. The
            weights are written to meanwhile: not to be called between a forward pass and its backward.
        data: ``(inputs, targets)``, or an iterable of those (a DataLoader), which is read once and kept.
        rho: ρ > 0. Over all trainable parameters together; a ρ for "element" in ℓ2 is about √(number of weights) times
            the relative change of each.
        norm: ``"l2"`` or ``"linf"``, of T^{−1} ε; the average case has Gaussian noise and no norm.
        case: ``"worst"``: the largest rise. ``"average"``: the mean rise under noise.
        scale: T: ``"element"``, ``"filter"``, ``"layer"``, or ``None`` for 1 (see the module).
        steps: Gradient steps of the search, per piece of data: so many forward+backward passes over the data and one
            forward pass.
        step_size: The first step, in units of T; ``None`` is 2ρ, which reaches the sphere at once.
        samples: Draws of the noise in the average case, one forward pass over the data each.
        m: The most samples that share a worst perturbation; ``None``: those of a batch.
        loss: ``"cross_entropy"``, ``"bce_with_logits"``, ``"mse"`` or any ``loss(logits, targets)`` that returns the
            mean over its batch.
        normalize_logits: Divide each sample's logits by their standard deviation over the classes, so that a network
            cannot become flat by large logits alone.
        generator: Draws the noise, and a direction where a gradient vanishes; by default a fresh one with a fixed
            seed.

    Returns:
        The rise, in units of loss: in the worst case at least 0, a mean over pieces weighted by their samples; in the
        average case with its standard error over the noise. ``details`` holds the ``loss`` at the weights and, in the
        worst case, the number of ``pieces`` and the ``largest`` of their rises.

    Raises:
        CurvatureError: If no parameter is trainable, or the loss is not finite or not in autograd's graph.
        DataError: If a batch has no targets or cannot be cut into pieces, or data is not batches.
        UnsupportedError: If the loss has an unknown name, or a parameter is not float32 or float64.
        ValueError: If an argument is out of range.

    Source: arXiv 2102.11600 for T; arXiv 2302.07011 for both cases (from memory).
    """
    if scale not in (None, "element", "filter", "layer"):
        raise ValueError(f"scale must be 'element', 'filter', 'layer' or None, got {scale!r}")
    search = Search(rho, norm, case, steps, step_size, samples, m, loss, normalize_logits, generator)
    return searched(model, data, search, lambda weights: [metric(w, scale) for w in weights.values()])


def sam_sharpness(
    model: nn.Module,
    data: Any,
    rho: float = 0.05,  # ρ
    norm: Norm = "l2",
    case: Case = "worst",
    *,
    steps: int = 20,
    step_size: float | None = None,
    samples: int = 20,
    m: int | None = None,
    loss: Loss = "cross_entropy",
    normalize_logits: bool = False,
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""SAM's m-sharpness, the mean over pieces of :math:`\max_{\|\epsilon\|_p \le \rho} L(w+\epsilon) - L(w)`.

    It is :func:`adaptive_sharpness` with ``scale=None``, and changes under every rescaling of the network. With one
    step in ℓ2 it is what SAM itself sees: L(w + ρ g/‖g‖) − L(w), if that is positive.

    Args:
        model: As in :func:`adaptive_sharpness`, and so are the other arguments.
        data: As there.
        rho: ρ > 0, in the weights' own units.
        norm: As there.
        case: As there.
        steps: As there.
        step_size: As there.
        samples: As there.
        m: As there.
        loss: As there.
        normalize_logits: As there.
        generator: As there.

    Returns:
        As there.

    Raises:
        CurvatureError: As there.
        DataError: As there.
        UnsupportedError: As there.
        ValueError: As there.

    Source: arXiv 2010.01412, section 3 (sharpness) and its m-sharpness.
    """
    options: dict[str, Any] = {"steps": steps, "step_size": step_size, "samples": samples, "m": m, "loss": loss}
    return adaptive_sharpness(
        model, data, rho, norm, case, None, normalize_logits=normalize_logits, generator=generator, **options
    )


def metric(weight: Tensor, scale: Scale) -> Tensor:
    """T of one parameter, broadcastable to it.

    Args:
        weight: The parameter's value.
        scale: As in :func:`adaptive_sharpness`.

    Returns:
        T ≥ 0.
    """
    if scale is None:
        return torch.ones((), dtype=weight.dtype, device=weight.device)
    if scale == "layer":
        return torch.linalg.vector_norm(weight)
    if scale == "element" or weight.ndim < 2:
        return weight.abs()
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


def searched(model: nn.Module, data: Any, search: Search, metric_of: Metric) -> Sharpness:
    """Sharpness in any diagonal metric.

    Args:
        model: As in :func:`adaptive_sharpness`.
        data: As there.
        search: How to search.
        metric_of: Makes T from the weights.

    Returns:
        As there.
    """
    plain = named_loss(search.loss)

    def after_normalization(logits: Tensor, targets: Any) -> Tensor:
        return plain(normalized(logits), targets)

    loss = after_normalization if search.normalize_logits else plain
    with neighbourhood(model, data, loss, search.m) as near:
        t = metric_of(dict(zip(near.risk.parameters, near.weights, strict=True)))
        generator = seeded(search.generator)
        return _average(near, t, search, generator) if search.case == "average" else _worst(near, t, search, generator)


def normalized(logits: Tensor) -> Tensor:
    """Each sample's logits over their standard deviation across the classes (1/K, not 1/(K − 1)).

    Args:
        logits: ``[N, K]``.

    Returns:
        The same shape; logits that are all equal stay as they are.
    """
    spread = logits.var(-1, correction=0, keepdim=True)
    return logits / torch.where(spread > 0, spread, 1.0).sqrt()


def peak(near: Neighbourhood, part: Part, t: Sequence[Tensor], search: Search, generator: torch.Generator) -> Peak:
    """The worst perturbation z = T^{−1} ε of one piece of data.

    Args:
        near: The neighbourhood.
        part: The piece.
        t: T.
        search: How to search.
        generator: Draws a direction where the gradient vanishes.

    Returns:
        The best point found.
    """

    def objective(z: Sequence[Tensor], wanted: bool) -> tuple[float, list[Tensor] | None]:
        near.move([scale * x for scale, x in zip(t, z, strict=True)])
        if not wanted:
            return near.loss(part), None
        value, gradient = near.slope(part)
        return value, [scale * g for scale, g in zip(t, gradient, strict=True)]

    centre = [torch.zeros_like(weight) for weight in near.weights]
    support = [(scale != 0).to(weight.dtype) for scale, weight in zip(t, near.weights, strict=True)]
    found = climb(objective, centre, search.rho, search.norm, search.steps, search.step_size, support, generator)
    near.require_finite(found.start)
    return found


def _worst(near: Neighbourhood, t: Sequence[Tensor], search: Search, generator: torch.Generator) -> Sharpness:
    """The mean over pieces of their largest rise."""
    peaks = [peak(near, part, t, search, generator) for part in near.parts]
    rises = [found.value - found.start for found in peaks]
    shares = [part.share for part in near.parts]
    return Sharpness(
        math.fsum(share * rise for share, rise in zip(shares, rises, strict=True)),
        details={
            "loss": math.fsum(share * found.start for share, found in zip(shares, peaks, strict=True)),
            "pieces": float(len(peaks)),
            "largest": max(rises),
        },
    )


def _average(near: Neighbourhood, t: Sequence[Tensor], search: Search, generator: torch.Generator) -> Sharpness:
    """The mean rise under noise, the same noise for all pieces: the mean over pieces is linear."""
    clean = near.require_finite(near.total())
    rises = []
    for _ in range(search.samples):
        noise = normal(near.weights, generator)
        near.move([search.rho * scale * x for scale, x in zip(t, noise, strict=True)])
        rises.append(near.total() - clean)
    mean, error = mean_and_error(rises)
    return Sharpness(mean, standard_error=error, details={"loss": clean})


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent draws and its standard error, which one draw does not show."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
