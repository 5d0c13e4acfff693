"""One training of a comparison, from settings that name everything it depends on.

The loop is the plainest one there is: batches of a random order, ``optimizer.step(closure)``, a cosine schedule to zero
per step.  Every optimizer is driven by the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import ms_optim
from ms_optim.errors import DivergedError, MsOptimError

from .corruptions import withstood
from .problems import Data, Images, Problem, drawn, problem_of

MOMENTUM = 0.9


def optimizer_of(
    model: nn.Module, name: str, lr: float, weight_decay: float, options: Mapping[str, Any], late: int = 0
) -> Optimizer:
    """An optimizer that descends by SGD.

    Args:
        model: The network.
        name: ``"SGD"``, or a public name of the package.
        lr: The learning rate.
        weight_decay: As in ``torch.optim.SGD``.
        options: Its own, such as ρ; momentum is 0.9 if it is not among them.
        late: Steps of plain SGD at the beginning, for RSAM, whose authors do so.

    Returns:
        The optimizer.
    """
    base = {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, **options}
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), **base)
    if name == "RSAM":
        base["start"] = late
    if name == "MSRegularizedSGD":
        return ms_optim.MSRegularizedSGD(model, **base)
    found: Optimizer = getattr(ms_optim, name)(model, torch.optim.SGD, **base)
    return found


def descend(
    model: nn.Module,
    optimizer: Optimizer,
    images: Images,
    epochs: int,
    batch: int,
    seed: int,
    watch: Callable[[int], object] | None = None,
) -> None:
    """Train.

    Args:
        model: The network.
        optimizer: Its optimizer; a cosine takes its learning rate to zero.
        images: To train on.
        epochs: How often.
        batch: Images per step; the last one of an epoch may be smaller.
        seed: Of the order.
        watch: Is called after every epoch.

    Raises:
        DivergedError: If the loss is not finite at the end of an epoch, or a refresh cannot measure what has diverged.
    """
    x, y = images
    steps = math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for chosen in torch.randperm(len(x), generator=shuffle).split(batch):

            def closure(chosen: Tensor = chosen) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                loss.backward()
                return loss

            try:
                loss = optimizer.step(closure)  # type: ignore[arg-type]  # torch asks for a float, documents a tensor
            except MsOptimError as error:
                # What has diverged has no curvature: a refresh may be the first to say so.  SGD would go on to the end
                # of the epoch, and both have diverged; a training that failed would be left out of a mean.
                if not lost(model, x[chosen], y[chosen]):
                    raise
                raise DivergedError(f"a refresh in epoch {epoch + 1}: {error}") from error
            schedule.step()
        if not math.isfinite(float(loss.detach())):
            raise DivergedError(f"the loss is {float(loss.detach())} after epoch {epoch + 1}")
        if watch is not None:
            watch(epoch)


@torch.no_grad()
def lost(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether a training has left a network without a function.

    Args:
        model: The network.
        x: Images.
        y: Labels.

    Returns:
        Whether the square of a parameter's norm, or the loss, is not finite.
    """
    norms = (torch.linalg.vector_norm(p, dtype=torch.float64) ** 2 for p in model.parameters())
    return not all(bool(n.isfinite()) for n in norms) or not bool(F.cross_entropy(model(x), y).isfinite())


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images whose largest logit is their label's; logits that are not finite are wrong.

    Args:
        model: The network; left in evaluation mode.
        x: Images.
        y: Labels.

    Returns:
        The share.
    """
    model.eval()
    logits = torch.cat([model(part) for part in x.split(1000)])
    return float((logits.argmax(1).eq(y) & logits.isfinite().all(1)).double().mean())


def begun(problem: Problem, settings: Mapping[str, Any], data: Data) -> tuple[nn.Module, int]:
    """The network of a seed at its initialisation, and the length of its training.

    Args:
        problem: The row.
        settings: ``seed``, and ``epochs`` as a factor if it is not 1.
        data: On whose device it is put.

    Returns:
        Network, epochs.
    """
    torch.manual_seed(settings["seed"])
    return problem.build().to(data.train[0].device), round(problem.epochs * settings.get("epochs", 1))


def optimizer_in(settings: Mapping[str, Any], model: nn.Module, problem: Problem, data: Data) -> Optimizer:
    """The optimizer that settings name.

    Args:
        settings: ``optimizer``, ``lr``, ``weight_decay``, ``options``; ``own_stream``: whether what the optimizer
            draws itself depends on the seed, and not on a default of its own.
        model: The network.
        problem: The row.
        data: What is trained on.

    Returns:
        The optimizer.
    """
    name, options = settings["optimizer"], settings["options"]
    if settings.get("own_stream") and name != "SGD":  # torch's draws nothing
        options = {**options, "seed": settings["seed"]}
    late = late_start(problem, data)
    return optimizer_of(model, name, settings["lr"], settings["weight_decay"], options, late=late)


def late_start(problem: Problem, data: Data) -> int:
    """Steps of plain SGD before RSAM: its authors begin with 5 of 200 epochs.

    Args:
        problem: The row.
        data: What is trained on.

    Returns:
        Their number, those of one epoch at least.
    """
    return max(1, problem.epochs // 40) * math.ceil(len(data.train[0]) / problem.batch)


def read(settings: Mapping[str, Any]) -> tuple[Problem, Data]:
    """The row and the data of settings; on the GPU at the scale of papers.

    Args:
        settings: ``problem``, ``scale``, ``seed``; ``row``, the problem's size, if it is to be checked.

    Returns:
        Problem, data.

    Raises:
        ValueError: If the problem has another size by now: what goes on with older trainings would mix two problems.
    """
    problem = problem_of(settings["problem"], settings["scale"])
    if "row" in settings and settings["row"] != problem.size:
        raise ValueError(
            f"problem {settings['problem']!r} has size {problem.size}, and these settings are of {settings['row']}: "
            "begin a run of its own"
        )
    data = drawn(problem, settings["seed"])
    if settings["scale"] == "paper":
        parts = ((x.cuda(), y.cuda()) for x, y in (data.train, data.held_out, data.test))
        data = Data(*parts)
    return problem, data


def trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train once: the function of sweeps.

    Args:
        settings: ``problem``, ``scale``, ``optimizer``, ``lr``, ``weight_decay``, ``options``, ``seed``; ``epochs``, a
            factor; ``own_stream``; ``test``: whether the test images are looked at; ``withstood``: whether the network
            is corrupted, too.

    Returns:
        Accuracy on each part, shares of 1.
    """
    problem, data = read(settings)
    model, epochs = begun(problem, settings, data)
    optimizer = optimizer_in(settings, model, problem, data)
    descend(model, optimizer, data.train, epochs, problem.batch, settings["seed"])
    found: dict[str, Any] = {"held_out": accuracy(model, *data.held_out), "train": accuracy(model, *data.train)}
    if settings.get("test"):
        found["test"] = accuracy(model, *data.test)
    if settings.get("withstood"):
        found["withstood"] = withstood(model, data, accuracy)
    return found
