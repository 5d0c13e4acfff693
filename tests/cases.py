"""One line per optimizer: what every test of the contract runs over.

``build(model_or_params, **options)`` makes the optimizer; ``passes`` is its number of gradient passes a step; ``off``
switches its own part off, so that the base optimizer (SGD with the same learning rate) is what is left.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ms_optim

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    name: str
    kind: Callable[..., ms_optim.SharpnessAware]
    passes: int
    off: dict[str, float]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, params: Any, /, **options: Any) -> ms_optim.SharpnessAware:
        settings = {"lr": 0.05, "momentum": 0.9, "refresh_every": 3, **self.options, **options}
        if settings.get("ascent") == "momentum":
            settings["momentum"] = 0.9  # which it cannot do without
        network = options.get("model", params)
        if settings.get("granularity") == "neuron" and isinstance(network, nn.Module):
            settings["group"] = known_units(network)
        elif settings.get("rebalance", "move") and isinstance(network, nn.Module):
            settings.setdefault("group", known_group(network))
        return self.kind(params, **settings)

    @property
    def rebalances(self) -> bool:
        balanced_by_default = self.kind in (ms_optim.MSSAM, ms_optim.MSRegularizedSGD)
        return self.options.get("rebalance", "move" if balanced_by_default else None) is not None

    @property
    def perturbs(self) -> bool:
        """Whether its pass is not at the weights themselves."""
        return "trace" not in self.name and self.kind not in (ms_optim.WEISSI, BARHere)

    def __str__(self) -> str:
        return self.name


class SAMONHere(ms_optim.SAMON):
    """SAM-ON where vectors (gains, offsets, biases) stand for a normaliser's parameters: not every network has one."""

    def _inside(self) -> list[bool]:
        return [p.dim() < 2 for p in self.parameters()]


class BARHere(ms_optim.BAR):
    """BAR whose pair is the first and the last matrix among its parameters."""

    def __init__(self, params: Any, *args: Any, **options: Any) -> None:
        given = list(params.parameters()) if isinstance(params, nn.Module) else list(params)
        flat = [p for entry in given for p in (entry["params"] if isinstance(entry, dict) else [entry])]
        matrices = [p for p in flat if p.dim() > 1]
        super().__init__(
            given if not isinstance(params, nn.Module) else params,
            *args,
            pairs=[(matrices[0], matrices[-1])],
            **options,
        )


CASES = [
    Case("SAM", ms_optim.SAM, 2, {"rho": 0.0}, {"rho": 0.1}),
    Case("SAM[move]", ms_optim.SAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": "move"}),
    Case("ASAM[official]", ms_optim.ASAM, 2, {"rho": 0.0}, {"rho": 0.5, "operator": "official"}),
    Case("ASAM[elementwise]", ms_optim.ASAM, 2, {"rho": 0.0}, {"rho": 0.5, "operator": "elementwise"}),
    Case("ASAM[metric]", ms_optim.ASAM, 2, {"rho": 0.0}, {"rho": 0.5, "operator": "official", "rebalance": "metric"}),
    Case("MSSAM[move]", ms_optim.MSSAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": "move", "gauge": 0.0}),
    Case("MSSAM[metric]", ms_optim.MSSAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": "metric"}),
    Case("MSSAM[rows]", ms_optim.MSSAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": "rows"}),
    Case("MSSAM[None]", ms_optim.MSSAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": None}),
    Case(
        "MSSAM[move,gauge=1/2]",
        ms_optim.MSSAM,
        2,
        {"rho": 0.0},
        {"rho": 0.1, "rebalance": "move", "gauge": 0.5, "columns": None},
    ),
    Case("SAM[momentum]", ms_optim.SAM, 1, {"rho": 0.0}, {"rho": 0.1, "ascent": "momentum"}),
    Case("ASAM[momentum]", ms_optim.ASAM, 1, {"rho": 0.0}, {"rho": 0.5, "ascent": "momentum"}),
    Case(
        "MSSAM[momentum,move]", ms_optim.MSSAM, 1, {"rho": 0.0}, {"rho": 0.1, "ascent": "momentum", "rebalance": "move"}
    ),
    Case(
        "MSSAM[momentum,metric]",
        ms_optim.MSSAM,
        1,
        {"rho": 0.0},
        {"rho": 0.1, "ascent": "momentum", "rebalance": "metric"},
    ),
    Case("MSReg[trace,move]", ms_optim.MSRegularizedSGD, 1, {"strength": 0.0}, {"strength": 0.01, "rebalance": "move"}),
    Case(
        "MSReg[trace,metric]",
        ms_optim.MSRegularizedSGD,
        1,
        {"strength": 0.0},
        {"strength": 0.01, "rebalance": "metric", "gauge": 0.5},
    ),
    Case("MSReg[trace,rows]", ms_optim.MSRegularizedSGD, 1, {"strength": 0.0}, {"strength": 0.01, "rebalance": "rows"}),
    Case("MSReg[trace,None]", ms_optim.MSRegularizedSGD, 1, {"strength": 0.0}, {"strength": 0.01, "rebalance": None}),
    Case(
        "MSReg[noise,move]",
        ms_optim.MSRegularizedSGD,
        1,
        {"strength": 0.0},
        {"strength": 1e-4, "gradient": "noise", "rebalance": "move"},
    ),
    Case(
        "MSReg[antithetic noise,move]",
        ms_optim.MSRegularizedSGD,
        2,
        {"strength": 0.0},
        {"strength": 1e-4, "gradient": "antithetic", "rebalance": "move"},
    ),
    Case(
        "MSReg[antithetic noise,None]",
        ms_optim.MSRegularizedSGD,
        2,
        {"strength": 0.0},
        {"strength": 1e-4, "gradient": "antithetic", "rebalance": None},
    ),
    Case(
        "MSReg[noise,metric]",
        ms_optim.MSRegularizedSGD,
        1,
        {"strength": 0.0},
        {"strength": 1e-4, "gradient": "noise", "rebalance": "metric"},
    ),
]

# Of the literature: driven like the ones above.
OTHERS = [
    Case("ASAM[filter]", ms_optim.ASAM, 2, {"rho": 0.0}, {"rho": 0.1, "operator": "filter"}),
    Case("ASAM[layer]", ms_optim.ASAM, 2, {"rho": 0.0}, {"rho": 0.1, "operator": "layer"}),
    Case("FriendlySAM", ms_optim.FriendlySAM, 2, {"rho": 0.0}, {"rho": 0.1}),
    Case("FriendlySAM[move]", ms_optim.FriendlySAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": "move"}),
    Case("RSAM", ms_optim.RSAM, 2, {"rho": 0.0}, {"rho": 0.05}),
    Case("RSAM[metric]", ms_optim.RSAM, 2, {"rho": 0.0}, {"rho": 0.05, "rebalance": "metric"}),
    Case("TraceSAM[noise]", ms_optim.TraceSAM, 1, {"rho": 0.0}, {"rho": 0.01}),
    Case("RandomPerturbation[noise,layer]", ms_optim.RandomPerturbation, 1, {"rho": 0.0}, {"rho": 0.05}),
    Case(
        "RandomPerturbation[noise,filter]",
        ms_optim.RandomPerturbation,
        1,
        {"rho": 0.0},
        {"rho": 0.05, "scale": "filter"},
    ),
    Case("SAMON", SAMONHere, 2, {"rho": 0.0}, {"rho": 0.5}),
    Case("BAR", BARHere, 1, {"strength": 0.0}, {"strength": 0.5}),
    Case("WEISSI", ms_optim.WEISSI, 1, {"strength": 0.0, "sparsity": 0.0}, {"strength": 0.01, "sparsity": 1e-3}),
]

# What descends along several passes' gradients: by closures and explicit passes only.
COMBINED = [
    Case("SAGM", ms_optim.SAGM, 2, {"rho": 0.0, "alpha": 0.0}, {"rho": 0.1, "alpha": 0.01}),
    Case("SAGM[metric]", ms_optim.SAGM, 2, {"rho": 0.0, "alpha": 0.0}, {"rho": 0.1, "rebalance": "metric"}),
    Case("StableSAM", ms_optim.StableSAM, 2, {"rho": 0.0}, {"rho": 0.1}),
    Case("StableSAM[metric]", ms_optim.StableSAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": "metric"}),
    Case("GSAM", ms_optim.GSAM, 2, {"rho": 0.0}, {"rho": 0.1}),
    Case("GSAM[move]", ms_optim.GSAM, 2, {"rho": 0.0}, {"rho": 0.1, "rebalance": "move"}),
    Case("LookSAM[1]", ms_optim.LookSAM, 2, {"rho": 0.0}, {"rho": 0.1, "k": 1}),
    Case("TiltedSAM[noise]", ms_optim.TiltedSAM, 4, {"rho": 0.0, "sigma": 0.0}, {"rho": 0.1, "samples": 2}),
    Case("FrobSAM[noise]", ms_optim.FrobSAM, 3, {"strength": 0.0}, {"strength": 0.01, "rho": 0.05}),
    Case("FrobSAM[noise,move]", ms_optim.FrobSAM, 3, {"strength": 0.0}, {"strength": 0.01, "rebalance": "move"}),
    Case("UniversalSAM[noise]", ms_optim.UniversalSAM, 3, {"strength": 0.0}, {"strength": 0.01, "rho": 0.05}),
    Case("DetSAM[noise]", ms_optim.DetSAM, 2, {"strength": 0.0}, {"strength": 0.5}),
]
EVERY = CASES + OTHERS + COMBINED
# Single hidden units; other tests give groups of layers.
NEURON = [
    Case("MSSAM[neuron,move]", ms_optim.MSSAM, 2, {"rho": 0.0}, {"rho": 0.1, "granularity": "neuron", "columns": None}),
    Case(
        "MSReg[trace,neuron,move]",
        ms_optim.MSRegularizedSGD,
        1,
        {"strength": 0.0},
        {"strength": 0.01, "granularity": "neuron"},
    ),
]


def mlp() -> nn.Sequential:
    """A ReLU network with biases: layers scale against each other, the last bias is fixed."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4))


def convnet() -> nn.Sequential:
    """Convolution, BatchNorm, in-place ReLU, dropout: running statistics, buffers and randomness."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(4 * 16, 4),
    )


@functools.cache
def _group(printed: str) -> ms_optim.ScaleGroup:
    model = {str(network()): network() for network in (mlp, convnet)}[printed]
    return ms_optim.scale_symmetries(model, samples(model, 1)[0])


def known_group(model: nn.Module) -> ms_optim.ScaleGroup | None:
    """The group of the two networks above, discovered once for all tests; ``None``, to be discovered, for others."""
    return _group(str(model)) if str(model) in (str(mlp()), str(convnet())) else None


@functools.cache
def _units(printed: str) -> ms_optim.NeuronGroup:
    model = {str(network()): network() for network in (mlp, convnet)}[printed]
    return ms_optim.neuron_symmetries(model, samples(model, 1)[0])


def known_units(model: nn.Module) -> ms_optim.NeuronGroup | None:
    """The same for single hidden units."""
    return _units(str(model)) if str(model) in (str(mlp()), str(convnet())) else None


def samples(model: nn.Module, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches of eight samples for one of the networks above."""
    stream = torch.Generator().manual_seed(seed)
    shape = (6,) if isinstance(model[0], nn.Linear) else (1, 6, 6)
    return [
        (torch.randn(8, *shape, generator=stream), torch.randint(0, 4, (8,), generator=stream)) for _ in range(count)
    ]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[float, Tensor]]:
    """Train by closure; after each step the loss that ``step`` returned, and the logits on the first batch."""
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        with torch.no_grad():
            training = model.training
            logits = model.eval()(batches[0][0])
            model.train(training)
        yield loss.item(), logits


def by_passes(
    model: nn.Module,
    optimizer: ms_optim.SharpnessAware,
    batches: list[tuple[Tensor, Tensor]],
    around: Context = contextlib.nullcontext,
    inside: Context = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Train by explicit passes, with a context around all forward passes of a step, or inside each, and a scaler."""
    for x, y in batches:
        with around():
            for gradient_pass in optimizer.passes(scaler=scaler):
                with gradient_pass:
                    with inside():
                        loss = nn.functional.cross_entropy(model(x), y)
                    gradient_pass.loss = loss.detach()  # which some weigh their gradients by
                    (loss if scaler is None else scaler.scale(loss)).backward()
        descend(optimizer, scaler)


def descend(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """The end of a step, through a scaler if there is one."""
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def everything(model: nn.Module, optimizer: ms_optim.SharpnessAware) -> list[Tensor]:
    """Copies of all that a step may change: weights, buffers, the base optimizer's state, the generator."""
    state = [v for s in optimizer.base.state.values() for v in s.values() if isinstance(v, Tensor)]
    tensors = [*model.state_dict().values(), *state, optimizer.generator.get_state()]
    return [t.detach().clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
