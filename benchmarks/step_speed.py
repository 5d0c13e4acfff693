r"""A step of MSSAM costs two forward and backward passes and little else.

Method: see :mod:`benchmarks.harness`.  Batch of 128 random images, cross-entropy, float32, SGD with momentum as the
base, ``refresh_every=100``, ``columns=2``, discovery of the scale group apart.  Of a hundred steps ninety-nine have no
refresh and one has: both kinds are contenders, timed apart, and their weighted mean is taken within the round.  On the
MLP a contender takes twenty steps at a time, with a refresh and on ResNet-18 one.

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
# That a contender takes at a time on the MLP: enough for its own weights, not another's, to be in the cache.
STEPS = 20


def refreshed(name: str, steps: int) -> dict[str, float]:
    """Of a hundred steps, the last with a refresh; ``steps`` of those without one are timed together."""
    return {name: 0.99, f"{name}, refreshing": 0.01 * steps}


CLAIMS = [
    Claim("mlp", "MSSAM[move], in two passes", refreshed("MSSAM[move]", STEPS), TWO, 1.10),
    Claim("mlp", "MSSAM[metric]", refreshed("MSSAM[metric]", STEPS), TWO, 1.10),
    Claim("mlp", "two passes + torch's SGD step", "two passes + SGD", TWO),
    Claim("mlp", "MSSAM[move], in two passes + torch's SGD step", refreshed("MSSAM[move]", STEPS), "two passes + SGD"),
    Claim("mlp", "MSSAM[move] with `fused=True` for its SGD", refreshed("MSSAM[move, fused]", STEPS), TWO),
    Claim("mlp", "ms_optim.SAM", "SAM", TWO),
    Claim("mlp", "pytorch_optimizer's SAM", PEER, TWO),
    Claim("mlp", "MSRegularizedSGD[trace], in two passes", refreshed("MSRegularizedSGD[trace]", STEPS), TWO),
    Claim("mlp", "MSRegularizedSGD[noise], in one pass", refreshed("MSRegularizedSGD[noise]", STEPS), ONE),
    Claim("mlp", "torch's SGD, in one pass", "SGD", ONE),
    Claim("resnet18", "MSSAM[move], in two passes", refreshed("MSSAM[move]", 1), TWO, 1.03),
    Claim("resnet18", "MSSAM[move], a step without a refresh", "MSSAM[move]", TWO),
    Claim("resnet18", "MSSAM[move], a step with a refresh", "MSSAM[move], refreshing", TWO),
    Claim("resnet18", "two passes + torch's SGD step", "two passes + SGD", TWO),
]

Kind = Callable[..., ms_optim.SharpnessAware]
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


def balanced(
    name: str, build: Callable[[], nn.Module], x: Tensor, y: Tensor, steps: int, kind: Kind, **options: Any
) -> dict[str, Contender]:
    """An optimizer that rebalances, as two contenders: steps without a refresh, and one step with one."""
    still, fresh = build(), build()
    rarely = kind(still, refresh_every=10**9, **options, **_SGD)
    always = kind(fresh, refresh_every=1, **options, **_SGD)
    return {
        name: closures(rarely, still, x, y, steps),
        f"{name}, refreshing": closures(always, fresh, x, y, 1),
    }


def on_mlp(full: bool) -> list[Run]:
    """Every optimizer."""
    batch = 128 if full else 4
    torch.manual_seed(0)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return models.mlp() if full else models.small_fcnn()

    plain = build()
    contenders = {
        ONE: passes(build(), x, y, 1, STEPS),
        TWO: passes(build(), x, y, 2, STEPS),
        "SGD": passes(build(), x, y, 1, STEPS, base=True),
        "two passes + SGD": passes(build(), x, y, 2, STEPS, base=True),
        "SAM": closures(ms_optim.SAM(plain, **_SGD), plain, x, y, STEPS),
        **balanced("MSSAM[move]", build, x, y, STEPS, ms_optim.MSSAM),
        **balanced("MSSAM[metric]", build, x, y, STEPS, ms_optim.MSSAM, rebalance="metric"),
        **balanced("MSSAM[move, fused]", build, x, y, STEPS, ms_optim.MSSAM, fused=True),
        **balanced("MSRegularizedSGD[trace]", build, x, y, STEPS, ms_optim.MSRegularizedSGD, strength=1e-4),
        **balanced(
            "MSRegularizedSGD[noise]", build, x, y, STEPS, ms_optim.MSRegularizedSGD, strength=1e-6, gradient="noise"
        ),
    }
    runs: list[Run] = []
    peer = peer_sam(build(), x, y, STEPS)
    if peer is None:
        runs.append(harness.missing("mlp", PEER))
    else:
        contenders[PEER] = peer
    return runs + harness.paired("mlp", contenders, 80 if full else 2, budget=100)


def on_resnet(full: bool) -> list[Run]:
    """MSSAM, a step at a time."""
    batch, size = (128, 32) if full else (2, 8)
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return models.resnet18() if full else models.small_resnet(channels=4, in_channels=3)

    contenders: dict[str, Contender] = {
        TWO: passes(build(), x, y, 2, 1),
        "two passes + SGD": passes(build(), x, y, 2, 1, base=True),
        **balanced("MSSAM[move]", build, x, y, 1, ms_optim.MSSAM),
    }
    return harness.paired("resnet18", contenders, 8 if full else 2, budget=180)


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
