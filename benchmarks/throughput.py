r"""On a GPU two passes train on half as many images a second as SGD, and one pass on as many.

Method: see :mod:`benchmarks.harness`.  ResNet-18 for CIFAR (32×32, 10 classes) and ResNet-50 for ImageNet (224×224,
1,000 classes), both with 128 images a step, as the recipes: forward passes in bfloat16 (autocast), channels last,
compiled, in training mode; the images lie on the device, so that no loader is measured.  torch's SGD with momentum is
the base of everybody, and all are driven by a closure.  Ten steps are taken at a time, and the host waits for the
device before and after them only.

*A refresh.*  ``refresh_every=100``: a step of MSSAM or MSRegularizedSGD is 0.99 of one without and 0.01 of the median
of those with a refresh, as in :mod:`benchmarks.overhead`.  What is made once (discovery of the scale group,
compilation, the first refresh) comes before.

Goals: SAM and MSSAM reach at least 0.97 of half of SGD's images per second, 0.485; MSRegularizedSGD with
``gradient="noise"``, one pass, at least 0.95 of SGD's.  Two passes and a step of torch's SGD are in the table, too.

On a CPU, with fewer images and the compiler's graphs run without its code, this is to see that it runs: the claim is
about ``--device cuda``.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ms_optim

from . import harness
from .harness import Claim, Contender, Run
from .methods import MOVE, NOISE, SAM, SGD, TWO_SGD, WITH, WITHOUT, Step
from .networks import problem
from .overhead import hundred, repeated

DEVICES = ("cpu", "cuda")
NETWORKS = {"resnet18": 10, "resnet50_224": 1000}
METHODS = (SGD, TWO_SGD, SAM, MOVE, NOISE)
ORDER = [*METHODS, *(method + kind for method in (MOVE, NOISE) for kind in (WITHOUT, WITH))]
QUANTITY = "images_per_second"
_FEW = 8


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        batch: Images of a step.
        steps: That are taken at a time.
        rounds: Of everybody.
        refreshes: Of steps with a refresh.
        budget: Seconds after which no further round begins.
        backend: Of ``torch.compile``.
    """

    batch: int
    steps: int
    rounds: int
    refreshes: int
    budget: float
    backend: str


_CUDA = Effort(128, 10, 30, 10, 120, "inductor")
_CPU = Effort(8, 1, 3, 1, 120, "aot_eager")
_SMOKE = Effort(3, 1, 2, 1, 1, "aot_eager")


def claims(network: str) -> list[Claim]:
    """The rows of a network.

    Args:
        network: Its name.

    Returns:
        The claims.
    """
    speed = functools.partial(Claim, network, quantity=QUANTITY, at_least=True)
    return [
        speed("images/s of MSSAM[move], over SGD's: 0.97 of a half", MOVE, SGD, 0.485),
        speed("images/s of ms_optim.SAM, over SGD's: 0.97 of a half", SAM, SGD, 0.485),
        speed("images/s of two passes + torch's SGD step, over SGD's", TWO_SGD, SGD),
        speed("images/s of MSRegularizedSGD[noise], over SGD's", NOISE, SGD, 0.95),
    ]


CLAIMS = [claim for network in NETWORKS for claim in claims(network)]


def gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """A forward pass in bfloat16, and a backward pass.

    Args:
        model: The compiled model.
        x: Images.
        y: Labels.

    Returns:
        The loss.
    """
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def made(
    method: str, model: nn.Module, call: Callable[[Tensor], Tensor], group: ms_optim.ScaleGroup
) -> tuple[Step, torch.optim.Optimizer]:
    """A method on a model.

    Args:
        method: Of :data:`METHODS`.
        model: The model.
        call: The same, compiled.
        group: Its scale group.

    Returns:
        Its step, and its optimizer.
    """
    settings = {"lr": 1e-3, "momentum": 0.9}
    rebalancing = {**settings, "rebalance": "move", "gauge": 0.0, "refresh_every": 10**9, "group": group}
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        SAM: lambda: ms_optim.SAM(model, **settings),
        MOVE: lambda: ms_optim.MSSAM(model, **rebalancing),
        NOISE: lambda: ms_optim.MSRegularizedSGD(model, strength=1e-6, gradient="noise", **rebalancing),
    }
    optimizer = makers.get(method, lambda: torch.optim.SGD(model.parameters(), **settings))()
    passes = 2 if method == TWO_SGD else 1

    def step(x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            for _ in range(passes):
                optimizer.zero_grad()
                loss = gradient(call, x, y)
            return loss

        optimizer.step(closure)

    return step, optimizer


def refreshed(optimizer: ms_optim.SharpnessAware, step: Step) -> Step:
    """A step with a refresh before it.

    Args:
        optimizer: The optimizer.
        step: Its step.

    Returns:
        Both.
    """

    def both(x: Tensor, y: Tensor) -> None:
        optimizer.refresh(x)
        step(x, y)

    return both


def timed(network: str, full: bool, device: str, effort: Effort) -> list[Run]:
    """Images per second of every method.

    Args:
        network: The network.
        full: The network itself, or its stand-in.
        device: Where it runs.
        effort: How much is measured.

    Returns:
        The lines, the mean of a hundred steps among them.
    """
    contenders: dict[str, Contender] = {}
    classes = NETWORKS[network] if full else 10
    make = functools.partial(problem, network, full, device, classes, effort.batch)
    model, x, _ = make()
    group = ms_optim.scale_symmetries(model.train(), x[:_FEW])
    torch.compiler.reset()
    for method in METHODS:
        model, x, y = make()
        model, x = model.train().to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        step, optimizer = made(method, model, torch.compile(model, backend=effort.backend), group)
        if isinstance(optimizer, ms_optim.SharpnessAware) and method in (MOVE, NOISE):
            contenders[method + WITH] = functools.partial(refreshed(optimizer, step), x, y)
            method += WITHOUT
        contenders[method] = functools.partial(repeated, step, x, y, effort.steps)
    slow = {name: effort.refreshes for name in contenders if name.endswith(WITH)}
    for name in slow:
        contenders[name]()  # the first refresh makes what the others find made
    runs = harness.paired(network, contenders, effort.rounds, slow=slow, budget=effort.budget, device=device)
    for run in runs:
        if "seconds" in run and not run["contender"].endswith(WITH):
            run["seconds"] /= effort.steps
    runs += hundred(runs)
    return [{**run, QUANTITY: len(x) / run["seconds"]} if "seconds" in run else run for run in runs]


def measure(scale: str, device: str) -> list[Run]:
    """All runs.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.
        device: Where they run.

    Returns:
        The lines.
    """
    full = scale == "cpu"
    effort = _SMOKE if not full else _CUDA if device == "cuda" else _CPU
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # as in training: shapes do not change
    try:
        return [run for network in NETWORKS for run in timed(network, full, device, effort)]
    finally:
        torch.backends.cudnn.benchmark = before


def details(runs: Sequence[Run]) -> list[str]:
    """Images per second and milliseconds of everybody.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = ["| network | contender | images/s | milliseconds a step (n) |", "| --- | --- | --- | --- |"]
    for network in NETWORKS:
        for name in ORDER:
            mine = [run for run in runs if (run["network"], run["contender"]) == (network, name) and QUANTITY in run]
            if mine:
                speed = statistics.median(run[QUANTITY] for run in mine)
                step = 1e3 * statistics.median(run["seconds"] for run in mine)
                lines.append(f"| {network} | {name} | {speed:,.0f} | {step:.3g} ({len(mine)}) |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "throughput", measure, arguments, DEVICES)


if __name__ == "__main__":
    main()
