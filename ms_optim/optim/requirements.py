"""Requirements: what an optimizer is built from and loaded with, checked before anything is changed.

A combination that would train something other than what was asked for is refused here, with what to do instead.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OptimizerError, UnsupportedError
from ..symmetry import Group, NeuronGroup, ScaleGroup
from ..symmetry.optimizer_state import STATE_EXPONENTS

Rebalance = Literal["move", "rows", "metric"] | None
#: Those that rescale the weights.
MOVING = ("move", "rows")
Buffers = Literal["first", "last"]
MicroBatch = Literal["global", "local"] | int


def require_model(model: nn.Module | None) -> None:
    """Refuse what is no model, and wrappers that copy it for every forward pass.

    Args:
        model: The model, if there is one.

    Raises:
        OptimizerError: If it is no module.
        UnsupportedError: If it is in ``DataParallel``.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise OptimizerError(f"model is a {type(model).__name__}; pass the torch.nn.Module that owns the parameters")
    if model is not None and any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise UnsupportedError(
            "a model in DataParallel runs as copies whose forward passes cannot be seen; use DistributedDataParallel, "
            "or build the optimizer with the module inside it and train that"
        )


def require_own_parameters(parameters: Iterable[Tensor], module: nn.Module) -> None:
    """Refuse a module that does not own all the parameters.

    Args:
        parameters: The optimizer's.
        module: The module.

    Raises:
        OptimizerError: If one is missing.
    """
    owned = {id(p) for p in module.parameters()}
    missing = sum(id(p) not in owned for p in parameters)
    if missing:
        raise OptimizerError(
            f"{type(module).__name__} lacks {missing} of the optimizer's parameters; attach a module that holds the "
            "model and returns the loss"
        )


def require_real_parameters(given: Iterable[Any], model: nn.Module | None) -> None:
    """Refuse complex parameters, and those that are not the model's.

    Args:
        given: Of a group: parameters, or pairs of a name and a parameter.
        model: The model, if there is one.

    Raises:
        OptimizerError: If one is not the model's.
        UnsupportedError: If one is complex.
    """
    known = None if model is None else {id(p) for p in model.parameters()}
    for i, item in enumerate(given):
        p = item[1] if isinstance(item, tuple) else item  # torch takes (name, parameter), too
        if isinstance(p, Tensor) and p.is_complex():
            raise UnsupportedError(
                f"parameter {i} of the group, of shape {tuple(p.shape)}, is complex ({p.dtype}), which is not "
                "supported yet; keep its real and imaginary parts (torch.view_as_real) as the parameter"
            )
        if known is not None and id(p) not in known:
            raise OptimizerError(
                f"parameter {i} of the group, of shape {tuple(p.shape)}, is not one of {type(model).__name__}'s; pass "
                "the model's own parameters, or the model that owns them"
            )


def require_whole_batches(m: MicroBatch) -> None:
    """Refuse a number of samples per perturbation where the size of the batch is a loop's own business.

    Args:
        m: As in :class:`SharpnessAware`.

    Raises:
        UnsupportedError: If it is a number.
    """
    if isinstance(m, int):
        raise UnsupportedError(
            f"m={m} samples are to share a perturbation, and an unmodified loop decides itself how many go through a "
            "forward pass; accumulate over micro-batches of that size with m='local', or use passes(samples=len(x))"
        )


def require_one_gradient(name: str, combines: bool) -> None:
    """Refuse an optimizer that descends along what several passes found, where a loop's backward pass is only the last.

    Args:
        name: The optimizer's.
        combines: Whether it does.

    Raises:
        UnsupportedError: If it does.
    """
    if combines:
        raise UnsupportedError(
            f"{name} descends along a combination of the gradients of its passes, and in a loop around an attached "
            "module .grad, which may be accumulated, scaled and clipped, holds the last of them only; use "
            "step(closure) or passes()"
        )


def require_one_step_for_all(optimizer: Any) -> None:
    """Refuse perturbations for some samples where each rank would then descend along something else.

    Args:
        optimizer: Whose step begins.

    Raises:
        UnsupportedError: If it is so.
    """
    if optimizer.is_of_all_ranks and optimizer.m != "global" and optimizer.ranks.group is not None:
        raise UnsupportedError(
            f"m={optimizer.m!r} leaves gradients or losses on their rank, and {type(optimizer).__name__} descends "
            "along a combination of them, which would be another one on every rank; use m='global'"
        )


def require_outside_closures(optimizer: Any) -> None:
    """Refuse a step inside the closure of another one.

    Args:
        optimizer: Whose step it is.

    Raises:
        OptimizerError: If one of its closures is running.
    """
    if optimizer.beginnings:
        raise OptimizerError(
            f"{type(optimizer).__name__}.step() was called inside the closure that another step() is running; run "
            "forward and backward only, and leave the step to that one"
        )


def automatic(rebalance: Rebalance | Literal["auto"], options: Mapping[str, Any]) -> Rebalance:
    """What ``rebalance="auto"`` stands for.

    Args:
        rebalance: As given.
        options: The optimizer's, of which the granularity counts.

    Returns:
        ``"rows"``; with single hidden units, for which there is no such thing, ``"move"``; else what was given.
    """
    if rebalance != "auto":
        return rebalance
    return "move" if options.get("granularity") == "neuron" else "rows"


def require_known_base(base: Optimizer, rebalance: Rebalance) -> None:
    """Refuse at once what would fail at the first descent, or at the first refresh with state.

    Args:
        base: The optimizer that descends.
        rebalance: As in :class:`SharpnessAware`.

    Raises:
        UnsupportedError: If it calls the closure itself, or ``"move"`` or ``"rows"`` cannot rescale its state.
    """
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UnsupportedError(
            f"{type(base).__name__} evaluates the closure itself, so it cannot descend along a gradient that was taken "
            "elsewhere; use torch.optim.SGD or another first-order optimizer"
        )
    if rebalance in MOVING and type(base) not in STATE_EXPONENTS:
        supported = ", ".join(kind.__name__ for kind in STATE_EXPONENTS)
        raise UnsupportedError(
            f"rebalance={rebalance!r} rescales the base optimizer's state, and it is not known how that of "
            f"{type(base).__name__} moves with a parameter's scale; use {supported}, or rebalance='metric'"
        )


def require_granularity(granularity: str, rebalance: Rebalance, gauge: float, group: Group | None) -> None:
    """Refuse what is not defined for single hidden units.

    Args:
        granularity: ``"layer"`` or ``"neuron"``.
        rebalance: As in :class:`SharpnessAware`.
        gauge: κ.
        group: The group, if one was given.

    Raises:
        UnsupportedError: If ``"metric"`` or ``"rows"`` is asked for.
        ValueError: If the granularity is unknown, or the gauge or the group is one of layers only.
    """
    if granularity not in ("layer", "neuron"):
        raise ValueError(f"granularity must be 'layer' or 'neuron', got {granularity!r}")
    kind = ScaleGroup if granularity == "layer" else NeuronGroup
    if group is not None and not isinstance(group, kind):
        raise ValueError(
            f"granularity={granularity!r} takes a {kind.__name__}, and the group is a {type(group).__name__}; pass "
            f"what {'scale_symmetries' if granularity == 'layer' else 'neuron_symmetries'} returns"
        )
    if granularity == "neuron" and rebalance in ("metric", "rows"):
        raise UnsupportedError(
            f"rebalance={rebalance!r} at granularity='neuron' would need a number for every weight in every "
            "perturbation, which is not supported; use rebalance='move', which rescales the units themselves"
        )
    if granularity == "neuron" and gauge not in (0.0, 1.0):
        raise ValueError(f"gauge must be 0 or 1 at granularity='neuron', got {gauge}; 0 balances traces, 1 norms")


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


def require_count(key: str, value: int, least: int = 1) -> None:
    """Refuse what is no whole number, or too small a one.

    Args:
        key: Its name.
        value: The number.
        least: The smallest that will do.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a whole number >= {least}, got {value!r}")


def require_range(
    settings: dict[str, float],
    rebalance: Rebalance,
    refresh_every: int,
    columns: int | None,
    gauge: float,
    buffers: Buffers,
    m: MicroBatch,
) -> None:
    """Refuse numbers out of their range, before anything is built.

    Args:
        settings: ρ, λ: finite and ≥ 0.
        rebalance: One of its words.
        refresh_every: ≥ 1.
        columns: ≥ 0 or ``None``.
        gauge: In [0, 1].
        buffers: One of its two words.
        m: One of its two words, or a number ≥ 1.

    Raises:
        ValueError: If one is out of range.
    """
    for key, value in settings.items():
        require_nonnegative(key, value)
    if rebalance not in (*MOVING, "metric", None):
        raise ValueError(f"rebalance must be 'move', 'rows', 'metric' or None, got {rebalance!r}")
    if refresh_every < 1:
        raise ValueError(f"refresh_every must be >= 1 step, got {refresh_every}; rebalance=None switches refreshes off")
    if buffers not in ("first", "last"):
        raise ValueError(f"buffers must be 'first' or 'last', the pass whose changes are kept; got {buffers!r}")
    if isinstance(m, bool) or not (m in ("global", "local") or (isinstance(m, int) and m >= 1)):
        raise ValueError(f"m must be 'global', 'local' or a number of samples >= 1, got {m!r}")
    if columns is not None and columns < 0:
        raise ValueError(f"columns must be >= 0 or None, got {columns}; None is exact")
    if not 0.0 <= gauge <= 1.0:
        raise ValueError(f"gauge must lie in [0, 1], got {gauge}; 0 balances traces, 1 norms")
