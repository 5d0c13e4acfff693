r"""Family: the optimizers of this package as subjects, with the norm in which each has its ρ.

    SAM                    ‖ε‖
    ASAM                   ‖T_W^{-1} ε‖,   T = |W| + η on weights, 1 elsewhere (official); |W| (elementwise)
    rebalance="metric"     the same at the representative: of α ε, and T_{αW}

An optimizer with ``rebalance="move"`` or ``"rows"`` takes its first step from another, equivalent point, and is at rest
after that: the next refresh is far away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import ASAM, MSSAM, SAM, MSRegularizedSGD
from ..symmetry import ScaleGroup, scale_symmetries
from . import networks
from .subject import Closure, Norm, Subject, Tensors

_GROUPS: dict[tuple[str, tuple[str, ...]], ScaleGroup] = {}
PENALTY = "its penalty has a gradient of its own"


def subject(kind: Callable[..., Any], name: str | None = None, **options: Any) -> Subject:
    """One of our optimizers as a subject.

    Args:
        kind: Its class.
        name: What reports call it; the class's name by default.
        **options: Its own options.

    Returns:
        The subject.

    >>> from ms_optim import ASAM
    >>> subject(ASAM, operator="elementwise", rho=0.5).radius
    0.5
    """
    regularised = kind is MSRegularizedSGD
    rebalance = options.get("rebalance", "rows" if regularised or kind is MSSAM else None)
    gradient = options.get("gradient", "trace") if regularised else None
    along_momentum = options.get("ascent") == "momentum"
    own = {"rho": 0.05} if not regularised else {"strength": 0.01 if gradient == "trace" else 1e-4}
    if rebalance is not None:
        own = {**own, "refresh_every": 1000}

    def build(model: nn.Module, params: list[Any], base: Callable[..., Any], **given: Any) -> Any:
        if given.get("rebalance", rebalance) is not None:
            given["group"] = known_group(model)
        return kind(params, *(() if regularised else (base,)), model=model, **given)

    (key,) = own.keys() & {"rho", "strength"}
    return Subject(
        kind.__name__ if name is None else name,
        build,
        options={**own, **options},
        off={key: 0.0, "rebalance": None},
        bases=(torch.optim.SGD,) if regularised else (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW),
        sgd_options={"momentum": 0.9} if along_momentum else {},
        passes=1 if along_momentum or gradient in ("trace", "noise") else 2,
        ascent=None if regularised else 0 if along_momentum else 1,
        norm=None if regularised else _norm(kind, options),
        rho_key=key,
        last_gradient=gradient in (None, "noise"),
        settles=int(along_momentum or rebalance in ("move", "rows")),
        scaled_step=by_passes,
        excluded={"no_gradients_change_nothing": PENALTY} if gradient == "trace" else {},
    )


def by_passes(optimizer: Any, model: nn.Module, closure: Closure, scaler: torch.amp.GradScaler) -> None:
    """One step with a scaler: explicit passes, which are told the scale.

    Args:
        optimizer: The optimizer.
        model: Its model.
        closure: Zeroes the gradients, runs forward and a scaled backward.
        scaler: The scaler.
    """
    for gradient_pass in optimizer.passes(scaler=scaler):
        with gradient_pass:
            closure()
    scaler.step(optimizer)
    scaler.update()


def known_group(model: nn.Module) -> ScaleGroup:
    """The scale group of one of the suite's networks, discovered once.

    Args:
        model: One of them.

    Returns:
        Its group.
    """
    key = (str(model), tuple(name for name, _ in model.named_parameters()))
    if key not in _GROUPS:
        _GROUPS[key] = scale_symmetries(model, networks.batches(model, 1)[0][0])
    return _GROUPS[key]


def _norm(kind: Callable[..., Any], options: dict[str, Any]) -> Norm:
    """The norm in which the perturbation has length ρ."""
    operator = options.get("operator", "official") if kind is ASAM else None
    eta = options.get("eta", 0.01)

    def metric_norm(optimizer: Any, weights: Tensors, perturbation: Tensors) -> float:
        # 1 where the weights have moved to the representative; single units have none that is not 1.
        known: dict[str, float] = getattr(optimizer.balance, "weights", {})
        total = 0.0
        for name, e in perturbation.items():
            radius = _radius(operator, name, weights[name], math.sqrt(known.get(name, 1.0)), eta)
            total += float((e / radius).square().sum())
        return math.sqrt(total)

    return metric_norm


def _radius(operator: str | None, name: str, weight: Tensor, root: float, eta: float) -> Tensor | float:
    """T_{αW} / α in today's coordinates, where α = 1/√w: how far the ball of ρ = 1 reaches in each direction."""
    if operator == "elementwise":
        return weight.abs()
    is_weight = "weight" in name.rpartition(".")[2]
    return weight.abs() + eta * root if operator == "official" and is_weight else root


# One of each kind; the tests of this package run the suite on many more.
FAMILY = (
    subject(SAM),
    subject(SAM, "SAM (momentum)", ascent="momentum"),
    subject(ASAM, "ASAM (official)", rho=0.5),
    subject(ASAM, "ASAM (elementwise)", rho=0.5, operator="elementwise"),
    subject(MSSAM),
    subject(MSSAM, "MSSAM (move)", rebalance="move", gauge=0.0),
    subject(MSSAM, "MSSAM (metric)", rebalance="metric"),
    subject(MSRegularizedSGD, "MSReg (trace)"),
    subject(MSRegularizedSGD, "MSReg (noise)", gradient="noise"),
    subject(MSRegularizedSGD, "MSReg (antithetic)", gradient="antithetic"),
)
