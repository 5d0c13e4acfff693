r"""PAC-Bayes flatness: how much Gaussian noise the weights stand before the training error rises by a tenth.

    flatness = 1 / σ² ,      σ = sup { σ : E_u[err(w + u)] − err(w) ≤ 0.1 }

    plain             u ~ N(0, σ² I)
    magnitude-aware   u_i ~ N(0, σ² w_i² + ε²)

err is the fraction of wrong predictions, u covers all trainable parameters.  1/σ² is the term that noise of this size
leaves in a PAC-Bayes bound beside the weights' norm.

*Invariance.*  With ε = 0 the magnitude-aware noise scales with every weight, and its flatness is unchanged by every
rescaling that keeps the function.  ε > 0 (the paper's 10⁻³) breaks it, and so does the plain noise.

*The search.*  All σ see the same draws (common random numbers), so that the rise is one function of σ: σ is bracketed
by doubling and then bisected.  An error that falls again further out is not looked for: what is found is the first
crossing that doubling brackets.  The standard error comes from the scatter of the draws and the slope of the rise.

Source: Jiang, Neyshabur, Mobahi, Krishnan, Bengio, arXiv 1912.02178, appendix on PAC-Bayes measures: flatness and its
magnitude-aware form, deviation 0.1, ε = 10⁻³.  All of it from memory, none of it checked against the text.  Differs:
(1) the measures there are 1/σ²; whether biases and normalisers are perturbed too is not remembered, here they are;
(2) the search there is of its own kind, with its own tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.operator import seeded
from ..errors import DataError
from .adaptive import mean_and_error
from .neighbourhood import Neighbourhood, counted, neighbourhood, normal, positive
from .value import Sharpness

# How far σ is looked for: up to 2^20 times the weights, where nothing of a network is left, and down to 2^-40.
_DOUBLINGS = 20
_HALVINGS = 40

# Half the width, in log σ, of the difference that the slope of the rise is taken from.
_SLOPE_STEP = 0.1


def pac_bayes_flatness(
    model: nn.Module,
    data: Any,
    magnitude_aware: bool = False,
    *,
    deviation: float = 0.1,
    epsilon: float = 1e-3,  # ε
    samples: int = 10,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""PAC-Bayes flatness, :math:`1/\sigma^2` for the largest noise that costs at most a tenth of the training error.

    Costs about 15 to 25 values of σ, each ``samples`` forward passes over the data.

    Args:
        model: Called in evaluation mode; weights, buffers and random streams are as before on leaving. The weights are
            written to meanwhile.
        data: ``(inputs, classes)``, or an iterable of those, which is read once and kept.
        magnitude_aware: Noise in proportion to every weight, in place of the same for all.
        deviation: The rise of the error that is allowed, in (0, 1).
        epsilon: ε ≥ 0, added to magnitude-aware noise; 0 makes it invariant.
        samples: Draws of the noise.
        tolerance: Relative precision of σ in the search.
        generator: Draws the noise; by default a fresh one with a fixed seed.

    Returns:
        1/σ², in units of 1/weight² (plain) or without a unit; with a standard error over the draws from two draws on.
        0 if the error never rises by so much, infinite if it does so at once. ``details`` holds ``sigma``, the
        ``error`` at the weights and the ``rise`` at σ.

    Raises:
        CurvatureError: If no parameter is trainable.
        DataError: If a batch has no targets, or they are not a class per sample.
        UnsupportedError: If a parameter is not float32 or float64.
        ValueError: If an argument is out of range.

    Source: arXiv 1912.02178 (from memory).
    """
    if not 0.0 < deviation < 1.0:
        raise ValueError(f"deviation must be between 0 and 1, got {deviation!r}; a rise of the error, usually 0.1")
    if not (epsilon >= 0.0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be >= 0 and finite, got {epsilon!r}; 0 makes the noise proportional to weights")
    counted("samples", samples, "each costs a forward pass over the data for every σ that is tried")
    positive("tolerance", tolerance, "it is the relative precision of σ")
    with neighbourhood(model, data, error_rate) as near:
        generator = seeded(generator)
        noise = _Noise(near, magnitude_aware, epsilon, samples, generator, generator.get_state(), near.total())
        below, above = _bracket(noise, deviation)
        while below > 0.0 and math.isfinite(above) and above / below > 1.0 + tolerance:
            middle = math.sqrt(below * above)
            below, above = (middle, above) if noise.rise(middle)[0] <= deviation else (below, middle)
        return _presented(noise, below, above, deviation)


def error_rate(logits: Tensor, targets: Any) -> Tensor:
    """The fraction of samples whose largest logit is not their class.

    Args:
        logits: ``[N, K]``.
        targets: Classes, ``[N]``.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: If the targets are not a class per sample.
    """
    classes = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == logits.shape[:-1]
    if not classes or logits.ndim < 2 or logits.shape[-1] < 2:
        what = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"targets are {what} beside logits {tuple(logits.shape)}; an error rate needs logits [N, K] with "
            "K >= 2 and a class per sample, integers of shape [N]"
        )
    return (logits.argmax(-1) != targets).double().mean()


@dataclass(frozen=True)
class _Noise:
    """The rise of the error as a function of σ, with the same draws for all σ."""

    near: Neighbourhood
    magnitude_aware: bool
    epsilon: float
    samples: int
    generator: torch.Generator
    start: Tensor
    clean: float

    @property
    def unit(self) -> float:
        """Where the search begins: σ of the weights' own size."""
        if self.magnitude_aware:
            return 1.0
        count = sum(w.numel() for w in self.near.weights)
        square = math.fsum(float(w.double().square().sum()) for w in self.near.weights)
        return math.sqrt(square / count) or 1.0

    def rise(self, sigma: float) -> tuple[float, float | None]:
        """E_u[err(w + u)] − err(w) over the draws, and its standard error."""
        self.generator.set_state(self.start)
        deviations = [self._deviation(w, sigma) for w in self.near.weights]
        return mean_and_error([self._draw(deviations) - self.clean for _ in range(self.samples)])

    def _draw(self, deviations: Sequence[Tensor | float]) -> float:
        drawn = normal(self.near.weights, self.generator)
        self.near.move([scale * x for scale, x in zip(deviations, drawn, strict=True)])
        return self.near.total()

    def _deviation(self, weight: Tensor, sigma: float) -> Tensor | float:
        if not self.magnitude_aware:
            return sigma
        # (Without ε it is σ |w| to the last bit, and so covariant.)
        return torch.hypot(sigma * weight, weight.new_tensor(self.epsilon)) if self.epsilon else sigma * weight.abs()


def _bracket(noise: _Noise, deviation: float) -> tuple[float, float]:
    """Two σ, a factor of 2 apart, with the crossing between them; 0 or ∞ where there is none."""
    sigma = noise.unit
    if noise.rise(sigma)[0] <= deviation:
        for _ in range(_DOUBLINGS):
            if noise.rise(2.0 * sigma)[0] > deviation:
                return sigma, 2.0 * sigma
            sigma *= 2.0
        return sigma, math.inf
    for _ in range(_HALVINGS):
        sigma *= 0.5
        if noise.rise(sigma)[0] <= deviation:
            return sigma, 2.0 * sigma
    return 0.0, sigma


def _presented(noise: _Noise, below: float, above: float, deviation: float) -> Sharpness:
    """The measure from the largest σ that is known to be allowed."""
    if not math.isfinite(above):
        note = f"the error rises by less than {deviation} under noise of any size that was tried (σ up to {below:.3g})"
        return Sharpness(0.0, notes=(note,), details={"sigma": math.inf, "error": noise.clean})
    if below == 0.0:
        what = "ε alone" if noise.magnitude_aware and noise.epsilon else f"σ = {above:.3g}"
        note = f"{what} raises the error by more than {deviation}"
        return Sharpness(math.inf, notes=(note,), details={"sigma": 0.0, "error": noise.clean})
    value = below**-2
    rise, scatter = noise.rise(below)
    ahead, behind = (noise.rise(below * math.exp(sign * _SLOPE_STEP))[0] for sign in (1.0, -1.0))
    slope = (ahead - behind) / (2.0 * _SLOPE_STEP)
    error = 2.0 * value * scatter / slope if scatter is not None and slope > 0.0 else None  # d(σ⁻²) = −2 σ⁻² d(log σ)
    return Sharpness(value, error, details={"sigma": below, "error": noise.clean, "rise": rise})
