"""The methods whose steps are measured: bare passes, torch's SGD, ours, and the SAMs of other authors.

A *step* is made for one model and takes images and labels.  Ours, moskomule/sam.pytorch and pytorch_optimizer are
driven by a closure; davda54/sam in two steps, with BatchNorm's statistics off in the second pass, and SamsungLabs/ASAM
by ascent and descent, as their authors' examples do.

Of an optimizer that rebalances there are two more methods: steps without a refresh, and steps that all have one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ms_optim

from . import sam_peers

Step = Callable[[Tensor, Tensor], object]
Paths = Mapping[str, str | None]

ONE, TWO, SGD, TWO_SGD = "one pass", "two passes", "SGD", "two passes + SGD"
SAM, ASAM, MOMENTUM = "ms_optim.SAM", "ms_optim.ASAM[elementwise]", "ms_optim.SAM[momentum]"
MOVE, METRIC, FUSED = "MSSAM[move]", "MSSAM[metric]", "MSSAM[move, fused]"
NOISE, TRACE = "MSRegularizedSGD[noise]", "MSRegularizedSGD[trace]"
DAVDA54, PACKAGE = "davda54/sam", "pytorch_optimizer SAM"
SAMSUNG, SAMSUNG_SAM, MOSKOMULE = "SamsungLabs/ASAM", "SamsungLabs/ASAM's SAM", "moskomule/sam.pytorch"
WITHOUT, WITH = ", no refresh", ", a refresh"

REFRESHED = (MOVE, METRIC, FUSED, NOISE, TRACE)

_SGD = {"lr": 1e-3, "momentum": 0.9}


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One forward and backward pass from zero gradients.

    Args:
        model: The model.
        x: Images.
        y: Labels.

    Returns:
        The loss.
    """
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def passes(model: nn.Module, count: int, base: bool = False) -> Step:
    """So many passes, and a step of torch's SGD after them if there is a base.

    Args:
        model: The model.
        count: How many.
        base: Whether there is one.

    Returns:
        The step.
    """
    optimizer = torch.optim.SGD(model.parameters(), **_SGD) if base else None

    def step(x: Tensor, y: Tensor) -> None:
        for _ in range(count):
            gradient(model, x, y)
        if optimizer is not None:
            optimizer.step()

    return step


def by_closure(optimizer: Any, model: nn.Module) -> Step:
    """A step of an optimizer that is driven by a closure.

    Args:
        optimizer: The optimizer.
        model: Its model.

    Returns:
        The step.
    """

    def step(x: Tensor, y: Tensor) -> None:
        loss = optimizer.step(lambda: gradient(model, x, y))
        if not bool(torch.isfinite(loss)):
            raise RuntimeError("the loss is not finite, so the step was not the one to time")

    return step


def davda54(model: nn.Module, path: str) -> Step:
    """A step of davda54/sam, as in its README.

    Args:
        model: The model.
        path: The checkout.

    Returns:
        The step.
    """
    kind, switches = sam_peers.load_davda54(path), sam_peers.load_davda54_running_stats(path)
    assert kind is not None and switches is not None
    optimizer, (enable, disable) = kind(model.parameters(), torch.optim.SGD, rho=0.05, **_SGD), switches

    def step(x: Tensor, y: Tensor) -> None:
        enable(model)
        F.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        disable(model)
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    return step


def samsung(model: nn.Module, path: str, which: int) -> Step:
    """A step of SamsungLabs/ASAM, as in its example.

    Args:
        model: The model.
        path: The checkout.
        which: 0: ASAM. 1: its SAM.

    Returns:
        The step.
    """
    kinds = sam_peers.load_asam(path)
    assert kinds is not None
    minimizer = kinds[which](torch.optim.SGD(model.parameters(), **_SGD), model, rho=(0.5, 0.05)[which])

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        minimizer.ascent_step()
        F.cross_entropy(model(x), y).backward()
        minimizer.descent_step()

    return step


def moskomule(model: nn.Module, path: str) -> Step:
    """A step of moskomule/sam.pytorch.

    Args:
        model: The model.
        path: The checkout.

    Returns:
        The step.
    """
    kind = sam_peers.load_moskomule(path)
    assert kind is not None
    return by_closure(kind(model.parameters(), rho=0.05, **_SGD), model)


def package(model: nn.Module) -> Step:
    """A step of pytorch_optimizer's SAM, which wants the first gradient before ``step``.

    Args:
        model: The model.

    Returns:
        The step.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    kinds = sam_peers.load_pytorch_optimizer()
    if kinds is None:
        raise ModuleNotFoundError("pytorch_optimizer")
    optimizer = kinds["SAM"](model.parameters(), torch.optim.SGD, rho=0.05, **_SGD)

    def step(x: Tensor, y: Tensor) -> None:
        gradient(model, x, y)
        optimizer.step(lambda: gradient(model, x, y))

    return step


def made(name: str, model: nn.Module, paths: Paths, group: ms_optim.ScaleGroup | None) -> Step:
    """A method on a model.

    Args:
        name: The method, with or without a refresh in its steps.
        model: The model.
        paths: Peer → checkout.
        group: The scale group; discovered in the first step if ``None``.

    Returns:
        Its step.
    """
    plain = name.removesuffix(WITHOUT).removesuffix(WITH)
    moved: dict[str, Any] = {"rebalance": "move", "gauge": 0.0}
    kinds: dict[str, Callable[..., ms_optim.SharpnessAware]] = {
        SAM: ms_optim.SAM,
        ASAM: functools.partial(ms_optim.ASAM, operator="elementwise"),
        MOMENTUM: functools.partial(ms_optim.SAM, ascent="momentum"),
        MOVE: functools.partial(ms_optim.MSSAM, **moved),
        METRIC: functools.partial(ms_optim.MSSAM, rebalance="metric", gauge=0.0),
        FUSED: functools.partial(ms_optim.MSSAM, fused=True, **moved),
        NOISE: functools.partial(ms_optim.MSRegularizedSGD, strength=1e-6, gradient="noise", rebalance="move"),
        TRACE: functools.partial(ms_optim.MSRegularizedSGD, strength=1e-4, rebalance="move"),
    }
    if plain in kinds:
        every = 10**9 if name.endswith(WITHOUT) else 1
        return by_closure(kinds[plain](model, refresh_every=every, group=group, **_SGD), model)
    makers: dict[str, Callable[[], Step]] = {
        ONE: lambda: passes(model, 1),
        TWO: lambda: passes(model, 2),
        SGD: lambda: passes(model, 1, base=True),
        TWO_SGD: lambda: passes(model, 2, base=True),
        DAVDA54: lambda: davda54(model, str(paths[DAVDA54])),
        SAMSUNG: lambda: samsung(model, str(paths[SAMSUNG]), 0),
        SAMSUNG_SAM: lambda: samsung(model, str(paths[SAMSUNG_SAM]), 1),
        MOSKOMULE: lambda: moskomule(model, str(paths[MOSKOMULE])),
        PACKAGE: lambda: package(model),
    }
    return makers[plain]()


def methods(network: str, paths: Paths) -> list[str]:
    """Who is measured on a network.

    Args:
        network: The network.
        paths: Peer → checkout; a peer without one is left out.

    Returns:
        Names.
    """
    ours = [ONE, TWO, SGD, TWO_SGD, SAM, ASAM, MOMENTUM, MOVE, METRIC, NOISE, TRACE]
    fused = [FUSED] if network == "mlp" else []
    return [*ours, *fused, *(peer for peer, path in paths.items() if path is not None), PACKAGE]
