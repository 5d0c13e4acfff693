"""Requirements: what an optimizer is built from and loaded with, checked before anything is changed.

A combination that would train something other than what was asked for is refused here, with what to do instead.
"""

from __future__ import annotations

import inspect
import math
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from ..errors import OptimizerError, UnsupportedError
from ..symmetry.optimizer_state import STATE_EXPONENTS

Rebalance = Literal["move", "metric"] | None


def require_plain_model(model: nn.Module | None) -> None:
    """Refuse what is no model, and wrappers that the engine does not handle yet.

    Args:
        model: The model, if there is one.

    Raises:
        OptimizerError: If it is no module.
        UnsupportedError: If it is wrapped for data parallelism or compilation.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise OptimizerError(f"model is a {type(model).__name__}; pass the torch.nn.Module that owns the parameters")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or getattr(model, "_orig_mod", None) is not None:
        raise UnsupportedError(
            f"a model wrapped in {type(model).__name__} is not supported yet; build the optimizer with the module "
            "inside it and train that"
        )


def require_known_base(base: Optimizer, rebalance: Rebalance) -> None:
    """Refuse at once what would fail at the first descent, or at the first refresh with state.

    Args:
        base: The optimizer that descends.
        rebalance: As in :class:`SharpnessAware`.

    Raises:
        UnsupportedError: If it calls the closure itself, or ``"move"`` cannot rescale its state.
    """
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UnsupportedError(
            f"{type(base).__name__} evaluates the closure itself, so it cannot descend along a gradient that was taken "
            "elsewhere; use torch.optim.SGD or another first-order optimizer"
        )
    if rebalance == "move" and type(base) not in STATE_EXPONENTS:
        supported = ", ".join(kind.__name__ for kind in STATE_EXPONENTS)
        raise UnsupportedError(
            f"rebalance='move' rescales the base optimizer's state, and it is not known how that of "
            f"{type(base).__name__} moves with a parameter's scale; use {supported}, or rebalance='metric'"
        )


def require_nonnegative(key: str, value: float) -> None:
    """Refuse a negative or non-finite number.

    Args:
        key: Its name.
        value: The number.

    Raises:
        ValueError: If it is one.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key} must be >= 0 and finite, got {value}; {key}=0 is the base optimizer")


def require_range(
    settings: dict[str, float],
    rebalance: Rebalance,
    refresh_every: int,
    columns: int | None,
    gauge: float,
    every: int = 1,
) -> None:
    """Refuse numbers out of their range, before anything is built.

    Args:
        settings: ρ, λ: finite and ≥ 0.
        rebalance: One of its three words.
        refresh_every: ≥ 1.
        columns: ≥ 0 or ``None``.
        gauge: In [0, 1].
        every: ≥ 1.

    Raises:
        ValueError: If one is out of range.
    """
    for key, value in settings.items():
        require_nonnegative(key, value)
    if rebalance not in ("move", "metric", None):
        raise ValueError(f"rebalance must be 'move', 'metric' or None, got {rebalance!r}")
    if refresh_every < 1:
        raise ValueError(f"refresh_every must be >= 1 step, got {refresh_every}; rebalance=None switches refreshes off")
    if every < 1:
        raise ValueError(f"every must be >= 1 step, got {every}; rho=0 or strength=0 switches our part off")
    if columns is not None and columns < 0:
        raise ValueError(f"columns must be >= 0 or None, got {columns}; None is exact")
    if not 0.0 <= gauge <= 1.0:
        raise ValueError(f"gauge must lie in [0, 1], got {gauge}; 0 balances traces, 1 norms")
