r"""A step of MSSAM costs two forward and backward passes and little else.

Method: see :mod:`benchmarks.harness`.  Batch of 128 random images, cross-entropy, float32, SGD with momentum as the
base, ``refresh_every=100``, ``columns=2``, discovery of the scale group apart.

* On the MLP a contender takes 100 steps at a time, exactly one of which begins with a refresh.
* On ResNet-18 a contender takes one step without a refresh, a refresh is a contender of its own, and a hundredth of it
  is added within the round.

Two-pass methods are divided by two forward and backward passes without any optimizer, one-pass methods by one, and
``MSRegularizedSGD`` with ``gradient="trace"``, which differentiates twice, by two.  davda54/sam is not on the package
index and is left out.

Goals: MSSAM at most 1.10 times two passes on the MLP, 1.03 times on ResNet-18.  No tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ms_optim
from ms_optim import models

from . import harness
from .harness import Claim, Contender, Run

ONE, TWO = "one pass", "two passes"
PEER = "pytorch_optimizer SAM"
REFRESH = "refresh"

CLAIMS = [
    Claim("mlp", "MSSAM[move], refreshes included, in two passes", "MSSAM[move]", TWO, 1.10),
    Claim("mlp", "MSSAM[metric], refreshes included", "MSSAM[metric]", TWO, 1.10),
    Claim("mlp", "two passes + torch's SGD step", "two passes + SGD", TWO),
    Claim("mlp", "ms_optim.SAM", "SAM", TWO),
    Claim("mlp", "pytorch_optimizer's SAM", PEER, TWO),
    Claim("mlp", "MSRegularizedSGD[trace], in two passes", "MSRegularizedSGD[trace]", TWO),
    Claim("mlp", "MSRegularizedSGD[noise], in one pass", "MSRegularizedSGD[noise]", ONE),
    Claim("mlp", "torch's SGD, in one pass", "SGD", ONE),
    Claim(
        "resnet18", "MSSAM[move] with 1/100 of a refresh, in two passes", {"MSSAM[move]": 1, REFRESH: 0.01}, TWO, 1.03
    ),
    Claim("resnet18", "MSSAM[move] without a refresh", "MSSAM[move]", TWO),
    Claim("resnet18", "a refresh, in two passes", REFRESH, TWO),
    Claim("resnet18", "two passes + torch's SGD step", "two passes + SGD", TWO),
]

_SGD = {"lr": 1e-3, "momentum": 0.9}


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One forward and backward pass from zero gradients; the loss."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def passes(model: nn.Module, x: Tensor, y: Tensor, count: int, steps: int, base: bool = False) -> Contender:
    """``steps`` times ``count`` passes, and a step of torch's SGD after them if there is a base."""
    optimizer = torch.optim.SGD(model.parameters(), **_SGD) if base else None

    def run() -> None:
        for _ in range(steps):
            for _ in range(count):
                gradient(model, x, y)
            if optimizer is not None:
                optimizer.step()

    return run


def closures(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Contender:
    """``steps`` steps of an optimizer driven by a closure."""

    def run() -> None:
        for _ in range(steps):
            loss = optimizer.step(lambda: gradient(model, x, y))
        if not bool(torch.isfinite(loss)):
            raise RuntimeError("the loss is not finite, so the step was not the one to time")

    return run


def peer_sam(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Contender | None:
    """pytorch_optimizer's SAM, which wants the first gradient before ``step``; ``None`` where it is not installed."""
    try:
        from pytorch_optimizer import SAM  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, **_SGD)

    def run() -> None:
        for _ in range(steps):
            gradient(model, x, y)
            optimizer.step(lambda: gradient(model, x, y))

    return run


def on_mlp(full: bool) -> list[Run]:
    """Every optimizer, a hundred steps at a time."""
    batch, steps = (128, 100) if full else (4, 2)
    torch.manual_seed(0)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))

    def network() -> nn.Module:
        torch.manual_seed(0)
        return models.mlp() if full else models.small_fcnn()

    def ours(kind: Callable[..., ms_optim.SharpnessAware], **options: Any) -> Contender:
        model = network()
        return closures(kind(model, refresh_every=steps, **options, **_SGD), model, x, y, steps)

    contenders = {
        ONE: passes(network(), x, y, 1, steps),
        TWO: passes(network(), x, y, 2, steps),
        "SGD": passes(network(), x, y, 1, steps, base=True),
        "two passes + SGD": passes(network(), x, y, 2, steps, base=True),
        "SAM": ours(ms_optim.SAM),
        "MSSAM[move]": ours(ms_optim.MSSAM),
        "MSSAM[metric]": ours(ms_optim.MSSAM, rebalance="metric"),
        "MSRegularizedSGD[trace]": ours(ms_optim.MSRegularizedSGD, strength=1e-4),
        "MSRegularizedSGD[noise]": ours(ms_optim.MSRegularizedSGD, strength=1e-6, gradient="noise"),
    }
    runs: list[Run] = []
    peer = peer_sam(network(), x, y, steps)
    if peer is None:
        runs.append(harness.missing("mlp", PEER))
    else:
        contenders[PEER] = peer
    return runs + harness.paired("mlp", contenders, 15 if full else 2, budget=100)


def on_resnet(full: bool) -> list[Run]:
    """MSSAM, a step at a time, and its refresh."""
    batch, size = (128, 32) if full else (2, 8)
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))

    def network() -> nn.Module:
        torch.manual_seed(0)
        return models.resnet18() if full else models.small_resnet(channels=4, in_channels=3)

    plain, based, balanced = network(), network(), network()
    optimizer = ms_optim.MSSAM(balanced, refresh_every=10**9, **_SGD)
    contenders: dict[str, Contender] = {
        TWO: passes(plain, x, y, 2, 1),
        "two passes + SGD": passes(based, x, y, 2, 1, base=True),
        "MSSAM[move]": closures(optimizer, balanced, x, y, 1),
        REFRESH: lambda: optimizer.refresh(x),
    }
    return harness.paired("resnet18", contenders, 6 if full else 2, budget=120)


def measure(scale: str) -> list[Run]:
    """All runs.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.

    Returns:
        The lines.
    """
    return on_mlp(scale == "cpu") + on_resnet(scale == "cpu")


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "step_speed", measure, arguments)


if __name__ == "__main__":
    main()
