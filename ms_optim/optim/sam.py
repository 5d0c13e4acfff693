r"""SAM: descend along the gradient at the worst nearby point, ε = ρ M g / √⟨g, M g⟩ in a diagonal metric M.

    SAM      M = 1              the ball of radius ρ around the weights
    MSSAM    M = w = α^{-2}     the ball around the balanced representative, in today's coordinates
    ASAM     M = T_W²           the ball that grows with the weights

One global norm; a parameter group's ρ multiplies its part of ε.

Two directions are known before the pass, so that one pass is enough, at half of SAM's cost and in unmodified loops:

    ascent="momentum"   the base optimizer's running average of gradients m in the place of g, with the opposite sign:
                        the gradient is taken at a point in the direction of the coming step, ε = −ρ M m / √⟨m, M m⟩
    ascent="previous"   the gradient that the step before descended along in the place of g; the first step has none

Source: Foret et al., arXiv 2010.01412, eq. 2 and 3 for M = 1 (second-order terms dropped, as there); for the momentum
Becker et al., arXiv 2401.12033, Algorithm 1; for the previous gradient the "previous-batch" variant that Andriushchenko
& Flammarion, arXiv 2206.06232, compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import completed, is_sharded, local
from .engine import Plan, SharpnessAware
from .gradient_pass import Probe, Request
from .perturbation import DeviceNorm, Perturbation, Scaled, nothing_finite

Metric = list[float] | list[Tensor]
Ascent = Literal["gradient", "momentum", "previous"]


def ascent(
    grads: list[Tensor | None],
    metric: Metric,  # M_p: one number, or one tensor of the parameter's shape, per parameter
    rho: list[float],  # ρ_p: radius
    quiet: bool = False,
) -> Scaled | None:
    """ε_p = ρ_p M_p g_p / √(Σ_q ⟨g_q, M_q g_q⟩).

    Args:
        grads: g, entry by entry; ``None`` where a parameter took no part.
        metric: M.
        rho: The radius of each parameter's group.
        quiet: Whether a gradient that is not finite is to be expected, as with a loss scale.

    Returns:
        ε; ``None`` if there is no direction, hence no other gradient to take: no gradient, or zero. For one that is not
        finite, 0 and a warning: another gradient may be (``None`` if ``quiet``, so that a loss scaler sees it). On a
        GPU the host does not wait to know: ε is 0 in all of these cases, and the warning comes at the end of the pass.
    """
    taking_part = [i for i, grad in enumerate(grads) if grad is not None]
    whole = [grad for grad in grads if grad is not None]
    if not whole:
        return None
    with torch.no_grad():
        g = [local(grad).coalesce() if grad.is_sparse else local(grad) for grad in whole]
        metrics = [metric[i] for i in taking_part]
        numbers = [1.0 if isinstance(m, Tensor) else m for m in metrics]
        raised = _raised(g, metrics)
        directions: list[Tensor | None] = [None] * len(grads)
        for i, direction in zip(taking_part, raised, strict=True):
            directions[i] = direction
        factors = [0.0] * len(grads)
        if not quiet and stays_on_device(whole):  # (a loss scaler waits in every step, and needs the infinity)
            for i, m in zip(taking_part, numbers, strict=True):
                factors[i] = rho[i] * m
            return _scaled_on_device(directions, factors, _square_on_device(g, raised, numbers))
        # A norm that is not finite must not reach the weights.
        norm = math.sqrt(_square(whole, g, raised, numbers))
        if not math.isfinite(norm):
            return nothing_finite(grads, quiet)
        if norm == 0.0:
            return None
    for i, m in zip(taking_part, numbers, strict=True):
        factors[i] = rho[i] * m / norm
    return Scaled(directions, factors)


def stays_on_device(tensors: list[Tensor]) -> bool:
    """Whether the host would have to wait for a norm, and need not know it: dense tensors on one GPU."""
    return (
        len({t.device for t in tensors}) == 1
        and tensors[0].is_cuda
        and not any(t.is_sparse for t in tensors)
        and not is_sharded(tensors)
    )


def _scaled_on_device(directions: list[Tensor | None], factors: list[float], square: Tensor) -> Scaled:
    """Directions over a norm whose square only the device knows; 0 where that is 0 or not finite."""
    norm = square.sqrt()
    usable = norm.isfinite() & (norm > 0)
    scale = torch.where(usable, 1.0 / norm, 0.0)
    return Scaled(directions, factors, scale, DeviceNorm(norm))


def _square_on_device(g: list[Tensor], raised: list[Tensor], numbers: list[float]) -> Tensor:
    """:func:`_square` without waiting: a float64 number on the device; NaN or infinite where it is not finite."""
    norms, power = _norms(g, raised)
    if set(numbers) != {1.0}:
        norms = list(torch._foreach_mul([n.double() for n in norms], [m ** (1 / power) for m in numbers]))
    return torch.stack(norms).double().pow(power).sum()


def _norms(g: list[Tensor], raised: list[Tensor]) -> tuple[list[Tensor], int]:
    """Numbers whose powers are ⟨g_q, raised_q⟩, and which power."""
    # In half precision the sum of squares would overflow at a norm of 256.
    kind = torch.float32 if any(a.dtype in (torch.half, torch.bfloat16) for a in g) else None
    if all(a is b for a, b in zip(g, raised, strict=True)):
        return list(torch._foreach_norm(g, 2, dtype=kind)), 2
    # A sum of products none of which is negative.
    return list(torch._foreach_norm(torch._foreach_mul(g, raised), 1, dtype=kind)), 1


def _square(whole: list[Tensor], g: list[Tensor], raised: list[Tensor], numbers: list[float]) -> float:
    """Σ_q ⟨g_q, M_q g_q⟩, over this rank's parts g of the whole, M g = number · raised; NaN where it is not finite."""
    sparse = any(a.is_sparse for a in g)
    if sparse:
        squares = [m * _inner(a, b) for m, a, b in zip(numbers, g, raised, strict=True)]
        return completed(squares, whole) if is_sharded(whole) else sum(torch.stack(squares).tolist())
    norms, power = _norms(g, raised)
    if is_sharded(whole):
        return completed([m * n.double() ** power for m, n in zip(numbers, norms, strict=True)], whole)
    return sum(m * n**power for m, n in zip(numbers, torch.stack(norms).tolist(), strict=True))


def _raised(g: list[Tensor], metrics: list[float | Tensor]) -> list[Tensor]:
    """M g where M is a tensor, g itself where it is a number."""
    if all(isinstance(m, Tensor) for m in metrics) and not any(a.is_sparse for a in g):
        return list(torch._foreach_mul(g, [local(m) for m in metrics if isinstance(m, Tensor)]))
    return [_times(a, m) if isinstance(m, Tensor) else a for a, m in zip(g, metrics, strict=True)]


def _times(gradient: Tensor, metric: Tensor) -> Tensor:
    """M g, entry by entry; sparse where g is."""
    metric = local(metric)
    if not gradient.is_sparse:
        return gradient * metric
    indices = gradient.indices()
    values = gradient.values() * metric[tuple(indices)]
    return torch.sparse_coo_tensor(indices, values, gradient.shape, check_invariants=False, is_coalesced=True)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ in float64, of two dense tensors or of two sparse ones with the same indices."""
    return torch.sum(a.values() * b.values() if a.is_sparse else a * b, dtype=torch.float64)


def taken_ascent(optimizer: SharpnessAware, ascent: Ascent) -> Ascent:
    """The direction of a new optimizer, which takes the passes of unmodified loops if that needs one pass only.

    Args:
        optimizer: The optimizer.
        ascent: The direction.

    Returns:
        The same.

    Raises:
        ValueError: If it is another word, or the momentum of a base optimizer without one.
    """
    if ascent not in ("gradient", "momentum", "previous"):
        raise ValueError(f"ascent must be 'gradient', 'momentum' or 'previous', got {ascent!r}")
    entries = optimizer.base.param_groups
    if ascent == "momentum" and not all(entry.get("momentum", 0.0) > 0 or "betas" in entry for entry in entries):
        raise ValueError(
            f"ascent='momentum' needs a running average of gradients, and {type(optimizer.base).__name__} was built "
            "without momentum; pass momentum=0.9, say, or ascent='previous' or 'gradient'"
        )
    optimizer.keeps_gradients = ascent == "previous"
    if ascent != "gradient":
        optimizer.take_loops()
    return ascent


def sam_plan(optimizer: SharpnessAware, metric: Callable[[], Metric], ascent_along: Ascent) -> Plan:
    """The plan of every SAM: the gradient here, then the gradient at ε; one pass where ρ = 0, or ε is known before.

    Args:
        optimizer: The optimizer.
        metric: Gives M once the first gradient, and with it a refresh, is there.
        ascent_along: What gives the direction.

    Yields:
        Where each pass is taken.
    """
    rho = optimizer.radii()
    if not any(rho):
        yield None
    elif ascent_along == "gradient":
        yield Probe()
        yield from second_pass(optimizer, [ascent(optimizer.gradients(), metric(), rho, optimizer.expects_overflow)])
    else:
        # A function: after a refresh that is due in this pass, M and the momentum are others.
        yield lambda: _known_before(optimizer, metric, rho, ascent_along)


def second_pass(
    optimizer: SharpnessAware, found: list[Perturbation]
) -> Generator[Request | Probe, None, bool]:
    """The part of a plan that asks for a pass at a perturbation, unless there is none to take.

    Args:
        optimizer: Whose plan it is.
        found: The perturbation, in a list that nobody else keeps: the pass reuses the memory of the first one's
            gradients, which are its directions.

    Yields:
        The perturbation.

    Returns:
        Whether the pass was taken.
    """
    if found[0] is None and not optimizer.passes_are_fixed:
        return False
    yield found.pop()
    return True


def _known_before(
    optimizer: SharpnessAware, metric: Callable[[], Metric], rho: list[float], ascent_along: Ascent
) -> Scaled | None:
    """ε along a direction that is there before the pass; ``None`` in the first step, which has none."""
    if ascent_along == "momentum":
        # That is the momentum of the objective as it is, whether it is minimised or maximised.
        directions, rho = optimizer.momentum(), [-abs(r) for r in rho]
    else:
        directions = optimizer.previous_gradients()
    if all(direction is None for direction in directions):
        return None
    return ascent(directions, metric(), rho)


class SAM(SharpnessAware):
    r"""Sharpness-aware minimization, :math:`\min_W \max_{\|ε\| ≤ ρ} L(W + ε)`, around any optimizer of torch.

    Args:
        model_or_params: The model (BatchNorm's statistics then move once a step), or parameters or groups.
        base: The class of the optimizer that descends.
        rho: ρ ≥ 0, the radius; 0 is the base optimizer, in one pass.
        ascent: ``"gradient"``; or, in one pass, ``"momentum"``: against the base optimizer's momentum, or
            ``"previous"``: along the gradient of the step before.
        **options: ``model``, ``rebalance`` and what goes with it (see :class:`SharpnessAware`; by default none), and
            the base optimizer's own arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's.
        ValueError: If a number is out of range.

    Source: Foret et al., arXiv 2010.01412, Algorithm 1.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = 0.05,  # ρ
        ascent: Ascent = "gradient",
        **options: Any,
    ) -> None:
        super().__init__(model_or_params, base, {"rho": rho}, **options)
        self.ascent = taken_ascent(self, ascent)

    def plan(self) -> Plan:
        """See the base class."""
        return sam_plan(self, lambda: self.scales("weights"), self.ascent)
