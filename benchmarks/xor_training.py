"""The trainings of the XOR experiment: which networks, with which steps, from which seed, and what is measured.

Learning rates, ρ, weight decay and phases are those of Table 2 of arXiv 2307.11007, where it has a row.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from .harness import Run
from .two_layer import (
    BIAS,
    NO_BIAS,
    SIM_BN,
    SIM_LN,
    Network,
    Rule,
    generalising,
    initial,
    memorising,
    minimum_sharpness,
    outputs,
    traces,
    train,
    xor,
)

GD, SAM, PROJECTED, EASED = "GD, weight decay", "1-SAM", "1-SAM, projected", "1-SAM, eased in"
MSSAM, MS_SGD = "MSSAM", "MSRegularizedSGD"
OPTIMIZERS = (GD, SAM, PROJECTED, EASED, MSSAM, MS_SGD)
CONSTRUCTED = ("constructed, generalising", "constructed, memorising")
SAMPLES, DIMENSION, WIDTH, FRESH = 100, 30, 500, 10_000


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Attributes:
        rule: The numbers of a step.
        epochs: How many are run here.
        paper: How many the paper ran; 0 where it has no such row.
    """

    rule: Rule
    epochs: int
    paper: int = 0


@dataclass(frozen=True)
class Setting:
    """One training, but for its seed.

    Attributes:
        kind: The network.
        optimizer: The optimizer.
        phases: What is run.
        source: The row of the paper's Table 2, or that it is ours.
        shrink: What the initial first layer is divided by.
    """

    kind: str
    optimizer: str
    phases: tuple[Phase, ...]
    source: str = "ours"
    shrink: float = 1.0

    @property
    def epochs(self) -> int:
        """All phases'."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def paper(self) -> int:
        """The paper's, of all phases."""
        return sum(phase.paper for phase in self.phases)


def _beside(sam: Setting, epochs: tuple[int, ...] = ()) -> Setting:
    """MSSAM with the numbers of a 1-SAM, and, if they are given, fewer epochs."""
    lengths = epochs or tuple(phase.epochs for phase in sam.phases)
    phases = [Phase(replace(p.rule, every=100), n) for p, n in zip(sam.phases, lengths, strict=True)]
    return Setting(sam.kind, MSSAM, tuple(phases), shrink=sam.shrink)


def _regularised(sam: Setting, epochs: tuple[int, ...] = ()) -> Setting:
    """MSRegularizedSGD with λ = ρ²/2."""
    lengths = epochs or tuple(phase.epochs for phase in sam.phases)
    phases = [
        Phase(replace(p.rule, strength=p.rule.strength**2 / 2, trace=True, every=100), n)
        for p, n in zip(sam.phases, lengths, strict=True)
    ]
    return Setting(sam.kind, MS_SGD, tuple(phases))


_DECAYED = Phase(Rule(0.01, decay=0.05, full=True), 100_000, 100_000)
_DECAYED_OURS = replace(_DECAYED, paper=0)
_SAM_PLAIN = Setting(NO_BIAS, SAM, (Phase(Rule(0.01, 0.05), 100_000, 100_000),), "1b")
_SAM_BIAS = Setting(
    BIAS, SAM, (Phase(Rule(0.01, 0.05), 200_000, 200_000), Phase(Rule(0.01, 0.1), 400_000, 400_000)), "4b"
)
_SAM_LN = Setting(SIM_LN, SAM, (Phase(Rule(0.1, 0.1), 100_000, 100_000),), "6a", shrink=100.0)
_ON_SPHERE = tuple(Phase(Rule(0.01, rho, every=1, radius=10.0), 500, 500) for rho in (0.1, 0.5, 1.0))
# From γ = 1 and PyTorch's initial W2, ρ = 0.1 moves f by 2, and the network collapses to f = 0; the paper does not say
# where it starts.  A hundred epochs with a small ρ find a fit from which its two phases can begin.
_SAM_BN = Setting(SIM_BN, SAM, (Phase(Rule(0.005, 0.1), 1_000, 100_000), Phase(Rule(0.003, 1.0), 1_000, 100_000)), "2a")
_EASED_BN = Setting(
    SIM_BN,
    EASED,
    (
        Phase(Rule(0.005, 0.02), 100),
        Phase(Rule(0.005, 0.1), 10_000, 100_000),
        Phase(Rule(0.003, 1.0), 10_000, 100_000),
    ),
    "2a, but for the first phase",
)

SETTINGS = (
    Setting(NO_BIAS, GD, (_DECAYED,), "1a"),
    _SAM_PLAIN,
    _beside(_SAM_PLAIN),
    _regularised(_SAM_PLAIN),
    Setting(BIAS, GD, (_DECAYED,), "4a"),
    _SAM_BIAS,
    _beside(_SAM_BIAS, (200_000, 100_000)),
    _regularised(_SAM_BIAS, (200_000, 100_000)),
    Setting(SIM_LN, GD, (_DECAYED_OURS,)),
    _SAM_LN,
    Setting(SIM_LN, PROJECTED, _ON_SPHERE, "6b"),
    _beside(_SAM_LN),
    Setting(SIM_BN, GD, (_DECAYED_OURS,)),
    _SAM_BN,
    _EASED_BN,
    _beside(_EASED_BN),
)


def measured(net: Network, x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor) -> Run:
    """What is said about a network, in float64.

    Args:
        net: The network.
        x: The training inputs.
        y: Their targets.
        x_test: Fresh inputs.

    Returns:
        Numbers by name.
    """
    net = net.double()
    f, g = outputs(net, x, x), outputs(net, x_test, x)
    target = x_test[:, 0] * x_test[:, 1]
    return {
        "loss": float((f - y).square().mean()),
        "train_accuracy": float((f * y > 0).double().mean()),
        "test_accuracy": float((g * target > 0).double().mean()),
        "trace": sum(traces(net, x).values()),
        "minimum_sharpness": minimum_sharpness(net, x),
        "first_norm": float(net.first.norm()),
        "columns": net.first[:, :-1].norm(dim=0).topk(3).values.tolist(),
        "features": net.first[:, :2].norm(dim=0).tolist(),
    }


def checkpoints(epochs: int, points: int = 24) -> list[int]:
    """Epochs at which a phase is measured, in even ratios, the last one included.

    Args:
        epochs: Its length.
        points: How many, at most.

    Returns:
        Epochs, growing.
    """
    return sorted({round(epochs ** (i / (points - 1))) for i in range(points)})


def training(setting: Setting, seed: int, width: int = WIDTH) -> list[Run]:
    """Train once, and measure on the way.

    Args:
        setting: What is trained.
        seed: Of data, weights and order.
        width: The number of units.

    Returns:
        One line per point in time; the last one has ``"last"``.
    """
    draw = torch.Generator().manual_seed(seed)
    x, y = xor(SAMPLES, DIMENSION, draw)
    x_test, _ = xor(FRESH, DIMENSION, torch.Generator().manual_seed(1_000_000 + seed))
    net = initial(setting.kind, width, DIMENSION, draw, setting.shrink)
    shuffle = torch.Generator().manual_seed(seed)
    began, done = time.process_time(), 0
    shared = {"network": setting.kind, "contender": setting.optimizer, "round": seed}
    lines: list[Run] = [{**shared, "epochs": 0, "seconds": 0.0, **measured(net, x, y, x_test)}]
    for phase in setting.phases:
        start, steps = done, 1 if phase.rule.full else SAMPLES
        for point in checkpoints(phase.epochs):
            if not math.isfinite(lines[-1]["loss"]):
                break
            while done < start + point:
                some = min(1000, start + point - done)
                order = torch.arange(some)
                if not phase.rule.full:
                    order = torch.rand(some, SAMPLES, generator=shuffle).argsort(1).flatten()
                train(net, x, y, phase.rule, order, begun=done * steps)
                done += some
            lines.append({**shared, "epochs": done, "seconds": time.process_time() - began})
            lines[-1].update(measured(net, x, y, x_test))
    lines[-1]["last"] = True
    return lines


def constructed(seed: int = 0) -> list[Run]:
    """The minima whose trace is known, measured as the trained ones are; in Sim-LN the same units."""
    x, y = xor(SAMPLES, DIMENSION, torch.Generator().manual_seed(seed))
    x_test, _ = xor(FRESH, DIMENSION, torch.Generator().manual_seed(1_000_000 + seed))
    lines = []
    for kind in (NO_BIAS, BIAS, SIM_LN):
        for name in CONSTRUCTED[: 1 if kind == NO_BIAS else 2]:
            of = generalising(DIMENSION, kind != NO_BIAS) if name == CONSTRUCTED[0] else memorising(x, y)
            # One unit is active at a time, and Sim-LN makes it 1.
            second = of.second.sign() if kind == SIM_LN else of.second
            found = measured(Network(kind, of.first, second), x, y, x_test)
            lines.append({"network": kind, "contender": name, "round": seed, "last": True, "epochs": 0, **found})
    return lines
