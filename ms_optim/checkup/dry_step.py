"""Dry step: a training step of the user's own, watched, and undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from ..curvature.parallel import ProcessGroup, unwrapped
from ..errors import OptimizerError
from ..optim import SharpnessAware
from ..optim.distributed import is_sharded
from ..optim.requirements import require_model
from . import examination
from .diagnosis import Diagnosis
from .keeping import Kept
from .observation import Look, Observation, RankView
from .recording import Recorder

# isort: off
from . import pass_rules, gradient_rules, setting_rules, rank_rules  # noqa: F401 - in the order of the table


def doctor(
    model: nn.Module,
    optimizer: Optimizer,
    step: Callable[[], Any],
    *,
    scaler: torch.amp.GradScaler | None = None,
    others: Iterable[Any] = (),
) -> Diagnosis:
    """Run one training step of your own loop, find what goes wrong in it without a word, and put everything back.

    The step is run once, with learning rates of 0 inside ``optimizer.step()``, so that it has nothing to do but restore
    the weights.  Afterwards weights, buffers, gradients, the state of all optimizers that took part, scalers, random
    streams, modes and hooks are as before, bit for bit, whether the step raised or not.  What the step takes from
    elsewhere, as a batch from a loader, is gone: take it outside.

    It needs memory for copies of weights, optimizer state and gradients.  With several ranks all of them call it, and
    they compare what they saw; of weights that are sharded over them, each sees its part.  A compiled model is watched
    from outside.

    Args:
        model: The module that the loop calls, wrapped or not.
        optimizer: The optimizer, of this package or any other.
        step: Takes no argument and runs one step: zeroing, forward, backward, ``optimizer.step()``, and whatever else.
        scaler: The gradient scaler; one that is used in the step is found without being named.
        others: Further objects that the step changes, to be put back: a scheduler, an average of the weights.

    Returns:
        What was found. It is true if there is no problem, and ``print`` shows it.

    Raises:
        OptimizerError: If an argument is not what it should be, the optimizer has none of the model's parameters, or is
            in the middle of a step.
        UnsupportedError: If the model is in ``DataParallel``.

    >>> import torch, ms_optim
    >>> model, batch = torch.nn.Linear(2, 1), torch.ones(4, 2)
    >>> optimizer = ms_optim.SAM(model, rho=0.05, lr=0.1)
    >>> def step():
    ...     def closure():
    ...         optimizer.zero_grad()
    ...         loss = model(batch).square().mean()
    ...         loss.backward()
    ...         return loss
    ...     optimizer.step(closure)
    >>> diagnosis = ms_optim.doctor(model, optimizer, step)
    >>> bool(diagnosis), [round(seen.perturbation, 4) for seen in diagnosis.passes]
    (True, [0.0, 0.05])
    """
    _require(model, optimizer, step)
    kept = Kept(optimizer, model, scaler, *others)
    inner, optimizer = _watched(model), _unwrapped(optimizer)
    seen = _observation(inner, optimizer)
    try:
        Recorder(inner, seen, kept).run(step)
        group = _ranks_of(model, optimizer)
        mine = _view(seen) if group is not None else None
    finally:
        kept.restore()
    if mine is not None:
        views: list[RankView] = [mine] * dist.get_world_size(group)
        dist.all_gather_object(views, mine, group=group)
        # What a rank that failed has not seen is no finding.
        seen.ranks = [] if any(view.failed for view in views) else views
    return examination.examine(seen)


def _require(model: Any, optimizer: Any, step: Any) -> None:
    """Refuse what is not what it should be."""
    if model is None:
        raise OptimizerError("model is None; pass the torch.nn.Module that the loop calls")
    require_model(model)
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer that steps")
    if not callable(step):
        raise OptimizerError(
            f"step is a {type(step).__name__}; pass a function without arguments that runs one training step"
        )
    own = {id(p) for p in model.parameters()}
    parameters = [p for entry in optimizer.param_groups for p in entry["params"]]
    if not any(id(p) in own for p in parameters):
        raise OptimizerError(
            f"none of the {len(parameters)} parameters of {type(optimizer).__name__} is one of "
            f"{type(model).__name__}'s; pass the model that it trains"
        )
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, SharpnessAware):
        loops = (optimizer.loop, optimizer.loss_loop)
        if optimizer.ready or optimizer.inside_a_pass or any(loop.begun for loop in loops):
            raise OptimizerError(
                f"{type(optimizer).__name__} is in the middle of a step; call doctor between two steps, before the "
                "forward pass"
            )


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a framework's, which has the other as ``.optimizer``."""
    inner = getattr(optimizer, "optimizer", None)
    return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def _watched(model: nn.Module) -> nn.Module:
    """The module whose forward passes are watched: the one inside data parallelism, a compiled one from outside."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _observation(model: nn.Module, optimizer: Optimizer) -> Observation:
    """An empty one, with the names."""
    plain = unwrapped(model)
    parameters: dict[str, Tensor] = dict(plain.named_parameters())
    known = {id(p) for p in parameters.values()}
    own = set()
    for g, entry in enumerate(optimizer.param_groups):
        for i, p in enumerate(entry["params"]):
            own.add(id(p))
            if id(p) not in known:
                parameters[f"(group {g}, parameter {i})"] = p
    tensors = list(parameters.values())
    return Observation(
        model=model,
        optimizer=optimizer,
        names=list(parameters),
        parameters=tensors,
        foreign=[name for name, p in parameters.items() if id(p) not in own and p.requires_grad],
        buffer_names=[name for name, _ in model.named_buffers()],
        start=Look.at([*tensors]),
    )


def _ranks_of(model: nn.Module, optimizer: Optimizer) -> ProcessGroup | None:
    """The ranks that train the model together; ``None`` if it is this one alone, or parameters are spread over them."""
    if not dist.is_available() or not dist.is_initialized() or is_sharded(model.parameters()):
        return None
    if isinstance(optimizer, SharpnessAware):
        optimizer.ranks.look_again()
        return optimizer.ranks.group
    wrappers = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    group = wrappers[0].process_group if wrappers else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _view(seen: Observation) -> RankView:
    """What the other ranks are told."""
    descents = [descent for descent in seen.descents if not descent.drives]
    return RankView(
        failed=seen.error is not None,
        start=seen.start,
        perturbed=tuple(one.forwards[0].look for one in seen.passes if one.perturbed),
        gradients=descents[-1].gradients if descents else None,
    )
