r"""Approximations of DIAG[H] from random probes of the true loss: the baselines that an exact diagonal is measured by.

Each probe e is a random vector over all parameters with E e eᵀ = I, and e ⊙ H e has mean DIAG[H].  Two choices make the
baselines, the law of e and how H e is obtained:

    Hutchinson                    e ⊙ H e                                                    ±1, exact second derivative
    Tsuzuku et al., 2019 (arXiv)  e ⊙ (∇L(w + r e) − ∇L(w − r e)) / (2 r)                    Gaussian
    Tsuzuku et al., 2020 (ICML)   s ⊙ (∇L(w + u) − ∇L(w − u)) / (2 r |w| + ε) ,  then max(·, 0)      ±1

Per probe, on all the data: two forward and two backward passes for the differences; for Hutchinson one backward pass
through the graph of the gradient (about two ordinary ones), and the graph itself, a forward and a backward pass, once.
The error of m probes falls like 1/√m and no faster.

What the differences converge to.  By Stein's identity the mean of the 2019 estimator is, for every r, exactly the
diagonal of the Hessian of the smoothed loss E L(w + r e): H_ii + (r²/2) Σ_k ∂²H_ii/∂w_k² + O(r⁴) where L is smooth,
while a kink of ReLU or max-pooling within about r of w adds its jump in slope as curvature, of order 1/r if one datum
has it.  Small r meets no kink, but rounding grows like (unit roundoff)·|∇L|/r: use float64, or float32 without TF32.

What is known of the 2020 estimator.  Found: the code published with arXiv 2106.12612 (ibayashi-hikaru/
minimum-sharpness, ``tsuzuku_icml``), which drew that paper's Fig. 3, has s = ±1, r = 1e-5, the divisor 2 r |w| + ε
with ε = 1e-8, the positive part of the average, and the *uniform* step u = r s.  With that step the mean is
H_ii / (|w_i| + ε/2r), which is not DIAG[H]; its archived errors stand still at 47–78 in the FCNN runs with n = 10 that
meet no kink, where that bias is 37–64 for five other networks of the same initialisation and ‖DIAG[H]‖ is 0.36.
Inferred, since the text of the ICML paper was not available: the step that the divisor belongs to is *relative*,
u = r |w| ⊙ s, with mean H_ii |w_i| / (|w_i| + ε/2r).  Both are here; a comparison should say which it shows.

Source: Tsuzuku, Sato, Sugiyama, arXiv 1901.04653 and ICML 2020 (PMLR 119:9636); arXiv 2106.12612, Fig. 3 and App. H;
Hutchinson 1989 for traces, Bekas, Kokiopoulou, Saad 2007 for diagonals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .evaluation import evaluation
from .operator import seeded
from .risk import Loss, Risk, read_risk, weights_restored

Distribution = Literal["rademacher", "gaussian"]
Step = Literal["relative", "uniform"]

def tsuzuku2019_diagonal(
    model: nn.Module,
    data: Any,
    loss: Loss = "cross_entropy",
    probes: int = 100,  # m
    radius: float = 1e-5,  # r
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Estimate :math:`\operatorname{diag} H` by :math:`E_e[e \odot (\nabla L(w + re) - \nabla L(w - re)) / 2r]`.

    e is a standard Gaussian over all parameters together.  The mean is the diagonal for the loss smoothed by Gaussian
    noise of standard deviation r, the variance of one probe Σ_j H_ij² + H_ii² as r → 0; two forward+backward passes
    over the data a probe.  Estimates may be negative where the diagonal is not.

    Args:
        model: Called in evaluation mode; weights, buffers, ``.grad`` and random streams are as before on leaving. The
            weights are written to meanwhile: not to be called between a forward pass and its backward.
        data: ``(inputs, targets)``, or an iterable of those (a DataLoader), which is read once and kept.
        loss: ``"cross_entropy"``, ``"bce_with_logits"``, ``"mse"`` or any ``loss(logits, targets)`` that returns the
            mean over its batch. Batches are averaged with their numbers of samples as weights.
        probes: m ≥ 1, the number of Gaussian vectors.
        radius: r > 0, the size of the step; 1e-5 in the code of arXiv 2106.12612.
        generator: Draws the vectors; by default a fresh one with a fixed seed, so that the same call gives the same
            numbers.

    Returns:
        Parameter name → estimate, shaped as the parameter, in units of loss per squared weight.

    Raises:
        CurvatureError: If no parameter is trainable, the loss is not in autograd's graph, or a result is not finite.
        DataError: If a batch has no targets, or data is not batches.
        UnsupportedError: If the loss has an unknown name, or a parameter is not float32 or float64.
        ValueError: If ``probes`` or ``radius`` is out of range, or the loss is not a mean.

    Source: arXiv 1901.04653, as in arXiv 2106.12612 and its code.
    """
    _require_probes(probes)
    _require_positive("radius", radius)
    with evaluation(model):
        risk = read_risk(model, data, loss)
        unit = [torch.ones((), dtype=p.dtype, device=p.device) for p in risk.parameters.values()]
        scales, divisors = [radius * one for one in unit], [2.0 * radius * one for one in unit]
        return risk.named(_mean_quotients(risk, "gaussian", probes, scales, divisors, generator))


def tsuzuku2020_diagonal(
    model: nn.Module,
    data: Any,
    loss: Loss = "cross_entropy",
    probes: int = 100,  # m
    radius: float = 1e-5,  # r
    floor: float = 1e-8,  # ε
    step: Step = "relative",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Estimate :math:`\operatorname{diag} H` by :math:`(E_s[s \odot (\nabla L(w+u) - \nabla L(w-u)) / (2r|w|+ε)])_+`.

    s is a vector of random signs over all parameters together.  With a = |w| + ε/2r, as r → 0 and before the positive
    part, which is taken once, of the average:

        step         u           mean             variance of one probe
        relative     r |w| ⊙ s   H_ii |w_i|/a_i   Σ_{j≠i} H_ij² w_j² / a_i²
        uniform      r s         H_ii / a_i       Σ_{j≠i} H_ij² / a_i²

    Two forward+backward passes over the data a probe.  Relative: a weight of 0 is never moved and gets 0, and small
    weights have large variances.  Uniform: *not* the diagonal, whatever m and r are.

    Args:
        model: As in :func:`tsuzuku2019_diagonal`.
        data: As there.
        loss: As there.
        probes: m ≥ 1, the number of sign vectors.
        radius: r > 0; 1e-5 in the code of arXiv 2106.12612.
        floor: ε > 0; 1e-8 in that code.
        step: ``"uniform"``, as in that code and its Fig. 3. ``"relative"``, inferred: the step that the divisor
            belongs to. The module's docstring gives the evidence.
        generator: As in :func:`tsuzuku2019_diagonal`.

    Returns:
        Parameter name → estimate, shaped as the parameter, never negative.

    Raises:
        CurvatureError: As in :func:`tsuzuku2019_diagonal`.
        DataError: As there.
        UnsupportedError: As there.
        ValueError: If ``probes``, ``radius``, ``floor`` or ``step`` is out of range, or the loss is not a mean.

    Source: ICML 2020 (PMLR 119:9636) through the code of arXiv 2106.12612.
    """
    _require_probes(probes)
    _require_positive("radius", radius)
    _require_positive("floor", floor)
    if step not in ("relative", "uniform"):
        raise ValueError(f"step must be 'relative' or 'uniform', got {step!r}")
    with evaluation(model):
        risk = read_risk(model, data, loss)
        sizes = [p.detach().abs() for p in risk.parameters.values()]
        scales = [radius * size if step == "relative" else torch.full_like(size, radius) for size in sizes]
        divisors = [2.0 * radius * size + floor for size in sizes]
        means = _mean_quotients(risk, "rademacher", probes, scales, divisors, generator)
        return risk.named([mean.clamp_min(0.0) for mean in means])


def hutchinson_diagonal(
    model: nn.Module,
    data: Any,
    loss: Loss = "cross_entropy",
    probes: int = 100,  # m
    distribution: Distribution = "rademacher",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Unbiased estimate of :math:`\operatorname{diag} H = E_v[v \odot H v]`, with H v by double backward.

    The variance of one probe is Σ_{j≠i} H_ij² for signs, Σ_j H_ij² + H_ii² for Gaussian v.  The exact H v knows no
    kinks: it is the Hessian almost everywhere, and nothing is written to the model.

    Args:
        model: As in :func:`tsuzuku2019_diagonal`; its operations must have second derivatives in autograd.
        data: As there.
        loss: As there.
        probes: m ≥ 1, the number of vectors v, the same ones for every batch.
        distribution: ``"rademacher"`` (signs) or ``"gaussian"``.
        generator: As in :func:`tsuzuku2019_diagonal`.

    Returns:
        Parameter name → estimate, shaped as the parameter.

    Raises:
        CurvatureError: As in :func:`tsuzuku2019_diagonal`.
        DataError: As there.
        UnsupportedError: As there.
        ValueError: If ``probes`` or ``distribution`` is out of range, or the loss is not a mean.

    Source: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> value = hutchinson_diagonal(net, (torch.ones(4, 1), torch.zeros(4, 1)), "mse", probes=1)["weight"]
    >>> round(value.item(), 6)  # one parameter: ∂²(w²)/∂w², whatever the signs
    2.0
    """
    _require_probes(probes)
    if distribution not in ("rademacher", "gaussian"):
        raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {distribution!r}")
    with evaluation(model):
        risk = read_risk(model, data, loss)
        sums = risk.zeros()
        for v, product in _products(risk, distribution, probes, generator):
            for total, v_p, product_p in zip(sums, v, product, strict=True):
                total += v_p * product_p
        return risk.named([total / probes for total in sums])


def hutchinson_trace(
    model: nn.Module,
    data: Any,
    loss: Loss = "cross_entropy",
    probes: int = 100,  # m
    distribution: Distribution = "rademacher",
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    r"""Unbiased estimate of every :math:`\operatorname{Tr} H_p = E_v[v_p^\top (H v)_p]`, all layers from one probe.

    The variance of one probe of signs is 2 Σ_{i≠j∈p} H_ij² + Σ_{i∈p, j∉p} H_ij²: blocks beside the diagonal do not
    bias a layer's trace, but a small layer, such as a bias, drowns in them.  Gaussian v add 2 Σ_{i∈p} H_ii².

    Args:
        model: As in :func:`hutchinson_diagonal`.
        data: As there.
        loss: As there.
        probes: As there.
        distribution: As there.
        generator: As there.

    Returns:
        Parameter name → trace of its diagonal block, in units of loss per squared weight; may be negative.

    Raises:
        CurvatureError: As in :func:`hutchinson_diagonal`.
        DataError: As there.
        UnsupportedError: As there.
        ValueError: As there.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
    """
    diagonal = hutchinson_diagonal(model, data, loss, probes, distribution, generator)
    return {name: float(estimate.sum(dtype=torch.float64)) for name, estimate in diagonal.items()}


def _mean_quotients(
    risk: Risk,
    distribution: Distribution,
    probes: int,
    scales: Sequence[Tensor],
    divisors: Sequence[Tensor],
    generator: torch.Generator | None,
) -> list[Tensor]:
    """The mean over probes of e ⊙ (∇L(w + scale ⊙ e) − ∇L(w − scale ⊙ e)) / divisor, in float64."""
    generator = seeded(generator)
    sums = risk.zeros()
    with weights_restored(list(risk.parameters.values())) as weights:
        for _ in range(probes):
            probe = _draw(distribution, weights, generator)
            steps = [scale * e for scale, e in zip(scales, probe, strict=True)]
            ahead, behind = (_gradient_at(risk, weights, steps, sign) for sign in (1.0, -1.0))
            for total, e, plus, minus, divisor in zip(sums, probe, ahead, behind, divisors, strict=True):
                total += e * (plus - minus) / divisor
    return [total / probes for total in sums]


def _gradient_at(risk: Risk, weights: Sequence[Tensor], steps: Sequence[Tensor], sign: float) -> list[Tensor]:
    """∇L(w + sign · step)."""
    with torch.no_grad():
        for parameter, weight, step in zip(risk.parameters.values(), weights, steps, strict=True):
            torch.add(weight, step, alpha=sign, out=parameter)
    return [gradient.detach() for gradient in risk.gradient()]


def _products(
    risk: Risk, distribution: Distribution, probes: int, generator: torch.Generator | None
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """v and (n_b/n) H_b v for every batch and probe; the probes are the same for all batches, so that sums are H v."""
    generator = seeded(generator)
    start = generator.get_state()
    parameters = list(risk.parameters.values())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for term in risk.terms():
            generator.set_state(start)
            first = torch.autograd.grad(term, parameters, create_graph=True, materialize_grads=True, allow_unused=True)
            curved = [index for index, grad in enumerate(first) if grad.requires_grad]
            for probe in range(probes):
                v = _draw(distribution, parameters, generator)
                if not curved:  # L is linear in all of them
                    continue
                product = torch.autograd.grad(
                    [first[index] for index in curved],
                    parameters,
                    [v[index] for index in curved],
                    retain_graph=probe < probes - 1,
                    materialize_grads=True,
                    allow_unused=True,
                )
                yield v, [part.detach() for part in product]  # (in torch 2.6 zeros that were filled in have a graph)


def _draw(distribution: Distribution, like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """One probe: independent signs or standard normal numbers, shaped, typed and placed as the given tensors."""
    found = []
    for tensor in like:
        drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
        if distribution == "gaussian":
            drawn.normal_(generator=generator)
        else:
            drawn.random_(0, 2, generator=generator).mul_(2.0).sub_(1.0)
        found.append(drawn.to(tensor.device))
    return found


def _require_probes(probes: int) -> None:
    """An integer from 1 on."""
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be an integer >= 1, got {probes!r}; each costs two forward+backward passes")


def _require_positive(name: str, value: float) -> None:
    """A finite number above 0."""
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be > 0 and finite, got {value}; the published values are r = 1e-5, ε = 1e-8")
