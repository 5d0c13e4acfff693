"""Groups of networks as they would be found, written down by hand, and models with prescribed squared norms.

Log-scales are dictionaries generator -> integer; a weight has the log-scale of its output minus that of its input, a
bias that of its output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ms_optim.symmetry.group import ScaleGroup

Scale = dict[int, int]
KINDS = ("chain", "biased chain", "residual", "normalised", "normalised with biases", "normalised residual")


@dataclass(frozen=True)
class Declared:
    """A group: its kind, Bᵀ, shapes, which parameters are scale-free by the argument in ``declare``, and the biases."""

    kind: str
    generators: Tensor
    shapes: tuple[tuple[int, ...], ...]
    free: tuple[bool, ...]
    biases: tuple[bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"p{i}" for i in range(len(self.shapes)))

    @property
    def group(self) -> ScaleGroup:
        return ScaleGroup(parameters=self.names, generators=self.generators, opaque=(), statistics=())

    @property
    def rows(self) -> list[int]:
        return [shape[0] if len(shape) > 1 else math.prod(shape) for shape in self.shapes]

    def model(self, norms: Tensor) -> nn.Module:
        """A module whose parameters have these squared norms."""
        module = nn.Module()
        for name, shape, norm in zip(self.names, self.shapes, norms.tolist(), strict=True):
            module.register_parameter(name, nn.Parameter(torch.full(shape, math.sqrt(norm / math.prod(shape)))))
        return module

    def traces(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))


class _Network:
    def __init__(self) -> None:
        self.count = 0
        self.parameters: list[tuple[Scale, tuple[int, ...], bool, bool]] = []

    def fresh(self) -> Scale:
        self.count += 1
        return {self.count - 1: 1}

    def weight(self, out: Scale, into: Scale, free: bool = False) -> None:
        scale = {g: out.get(g, 0) - into.get(g, 0) for g in out.keys() | into.keys()}
        self.parameters.append((scale, (3, 2), free, False))

    def bias(self, out: Scale, free: bool = False) -> None:
        self.parameters.append((out, (3,), free, True))

    def normaliser(self, out: Scale, free: bool = False) -> None:
        """γ and β."""
        self.parameters.append((out, (3,), free, False))
        self.bias(out, free)


def declare(kind: str, depth: int) -> Declared:
    """The group of a network of this kind with ``depth`` layers or blocks, at least 2."""
    net, stream = _Network(), {}
    if kind in ("chain", "biased chain"):
        for layer in range(depth):
            out = net.fresh() if layer < depth - 1 else {}
            net.weight(out, stream)
            if kind == "biased chain":
                net.bias(out)
            stream = out
    elif kind == "residual":
        stream = net.fresh()
        net.weight(stream, {})
        for _ in range(depth - 1):
            hidden = net.fresh()
            net.weight(hidden, stream)
            net.bias(hidden)
            net.weight(stream, hidden)
            net.bias(stream)
        net.weight({}, stream)
        net.bias({})
    elif kind in ("normalised", "normalised with biases"):
        # Linear, BatchNorm (γ, β), ReLU: what feeds a normaliser grows for free, and so does a γ whose successor can
        # follow; only the last γ is held by the head.
        for layer in range(depth):
            fed = net.fresh()
            net.weight(fed, stream, free=True)
            if kind == "normalised with biases":
                net.bias(fed, free=True)
            stream = net.fresh()
            net.normaliser(stream, free=layer < depth - 1)
        net.weight({}, stream)
        net.bias({})
    else:
        # Weight, norm, then blocks weight, norm, weight, norm whose last γ and β share the scale of the stream.
        fed = net.fresh()
        net.weight(fed, {}, free=True)
        stream = net.fresh()
        net.normaliser(stream)
        for _ in range(depth - 1):
            fed, hidden, second = net.fresh(), net.fresh(), net.fresh()
            net.weight(fed, stream, free=True)
            net.normaliser(hidden, free=True)
            net.weight(second, hidden, free=True)
            net.normaliser(stream)
        net.weight({}, stream)
        net.bias({})
    generators = torch.zeros(net.count, len(net.parameters), dtype=torch.float64)
    for p, (scale, *_) in enumerate(net.parameters):
        for g, power in scale.items():
            generators[g, p] = power
    _, shapes, free, biases = zip(*net.parameters, strict=True)
    return Declared(kind, generators, shapes, free, biases)


def declared(kinds: tuple[str, ...] = KINDS) -> st.SearchStrategy[Declared]:
    return st.builds(declare, st.sampled_from(kinds), st.integers(2, 5))


def positive(seed: int, count: int, spread: float) -> Tensor:
    """Numbers between e^{−spread} and e^{spread}."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(spread * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1))


def some_zero(values: Tensor, seed: int, probability: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return values * (torch.rand(len(values), generator=generator, dtype=torch.float64) >= probability)


def element(seed: int, declared_group: Declared, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(len(declared_group.generators), generator=generator, dtype=torch.float64)


def numbers(balance: object, field: str) -> Tensor:
    """A field of a Balance as a vector ``[P]``."""
    return torch.tensor(list(getattr(balance, field).values()), dtype=torch.float64)


seeds = st.integers(0, 2**31 - 1)
gauges = st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])
