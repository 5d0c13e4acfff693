"""Small networks, each with the scale group that theory says it has.

A group is declared as generators, parameter name -> exponent, and compared as a space: any basis will do.  Everything
is in the default dtype (float64 in tests); a network is built anew, from torch's random stream, on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


@dataclass(frozen=True, eq=False)
class Network:
    """One network of the zoo.

    Attributes:
        name: What it shows.
        build: Builds the model, in training mode.
        inputs: Number of samples -> a batch of inputs; the logits are ``[n, 3]``.
        generators: The declared group.
        exact: No ε is involved in evaluation mode.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    generators: Sequence[dict[str, int]]
    exact: bool = True

    def declared(self, parameters: Sequence[str]) -> Tensor:
        """The generators as a matrix ``[G, P]``."""
        unknown = {name for generator in self.generators for name in generator} - set(parameters)
        assert not unknown, f"{self.name} declares generators for {unknown}, which it does not have"
        rows = [[float(generator.get(name, 0)) for name in parameters] for generator in self.generators]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(parameters))

    def __str__(self) -> str:
        return self.name


def features(n: int) -> Tensor:
    return torch.randn(n, 5)


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 8, 8)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 4, 5)


def mlp(activation: Callable[[], nn.Module], bias: bool = True) -> nn.Sequential:
    """Layers 0, 2, 4; hidden scales s1, s2."""
    return nn.Sequential(
        *(nn.Linear(5, 7, bias=bias), activation()),
        *(nn.Linear(7, 6, bias=bias), activation()),
        nn.Linear(6, CLASSES, bias=bias),
    )


MLP_WITH_BIASES = [
    {"0.weight": 1, "0.bias": 1, "2.weight": -1},
    {"2.weight": 1, "2.bias": 1, "4.weight": -1},
]


def with_lived_in_statistics(model: nn.Module) -> nn.Module:
    """Give BatchNorms the running statistics and affine parameters of a network that has been trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, CLASSES)),
    )


class Residual(nn.Module):
    """Stem, one residual block with BatchNorm, global mean, linear."""

    def __init__(self, projection: bool = False, inplace: bool = False) -> None:
        super().__init__()
        width = 6 if projection else 4
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(4, width, 1, bias=False), nn.BatchNorm2d(width)) if projection else nn.Identity()
        )
        self.relu = nn.ReLU(inplace=inplace)
        self.inplace = inplace
        self.head = nn.Linear(width, CLASSES)
        with_lived_in_statistics(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y = y.add_(self.shortcut(x)) if self.inplace else y + self.shortcut(x)
        return self.head(self.relu(y).mean((2, 3)))


RESIDUAL = [
    {"conv.weight": 1},
    {"norm.weight": 1, "norm.bias": 1, "norm2.weight": 1, "norm2.bias": 1, "conv1.weight": -1, "head.weight": -1},
    {"conv1.weight": 1},
    {"norm1.weight": 1, "norm1.bias": 1, "conv2.weight": -1},
    {"conv2.weight": 1},
]


class Functional(nn.Module):
    """No modules inside: parameters and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(7, 5))
        self.shift = nn.Parameter(torch.randn(7))
        self.second = nn.Parameter(torch.randn(7, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.first) + self.shift) @ self.second


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], dim=1))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.value(x)) * F.relu(self.gate(x)))


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.out = nn.Linear(5, 12), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pieces(x).unflatten(1, (6, 2)).amax(2))


class Attention(nn.Module):
    """One head of attention over four positions, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6)
        self.out, self.head = nn.Linear(6, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(F.relu(self.out(mixed)).mean(1))


class Tied(nn.Module):
    """Two layers share one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Linear(5, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.second(F.relu(self.first(x)))))


class UsedTwice(nn.Module):
    """One layer with a bias is applied twice, so its weight cannot move: b = s and b = s + a."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.out(F.relu(self.shared(F.relu(self.shared(x)))))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = mlp(nn.ReLU), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def frozen() -> nn.Module:
    model = mlp(nn.ReLU)
    model[0].requires_grad_(False)
    return model


class Auxiliary(nn.Module):
    """An auxiliary head that exists in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)
        self.out, self.auxiliary = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        logits = self.out(F.relu(self.second(x)))
        return logits + 0.3 * self.auxiliary(x) if self.training else logits


class Dictionary(nn.Module):
    """Named inputs, and an output object with ``logits``, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dense, self.head = nn.Embedding(11, 5), nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> SimpleNamespace:
        hidden = F.relu(self.dense(self.embed(tokens))) * mask[..., None]
        return SimpleNamespace(logits=self.head(hidden.sum(1)), loss=None)


def tokens(n: int) -> dict[str, Tensor]:
    return {"tokens": torch.randint(11, (n, 4)), "mask": (torch.rand(n, 4) > 0.3).to(torch.get_default_dtype())}


ZOO = [
    Network(
        "chain without biases",
        lambda: mlp(nn.ReLU, bias=False),
        features,
        [{"0.weight": 1, "2.weight": -1}, {"2.weight": 1, "4.weight": -1}],
    ),
    Network("mlp with biases", lambda: mlp(nn.ReLU), features, MLP_WITH_BIASES),
    Network("leaky relu", lambda: mlp(lambda: nn.LeakyReLU(0.2)), features, MLP_WITH_BIASES),
    # The slopes do not move.
    Network("prelu", lambda: mlp(nn.PReLU), features, MLP_WITH_BIASES),
    Network("rrelu", lambda: mlp(nn.RReLU), features, MLP_WITH_BIASES),
    Network(
        "relu6 after the second layer",
        lambda: nn.Sequential(*mlp(nn.ReLU)[:3], nn.ReLU6(), nn.Linear(6, CLASSES)),
        features,
        MLP_WITH_BIASES[:1],
    ),
    Network("gelu", lambda: mlp(nn.GELU), features, []),
    Network(
        "lenet",
        lenet,
        images,
        [
            {"0.weight": 1, "0.bias": 1, "3.weight": -1},
            {"3.weight": 1, "3.bias": 1, "7.weight": -1},
            {"7.weight": 1, "7.bias": 1, "9.weight": -1},
        ],
    ),
    Network(
        "depthwise",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, groups=6, bias=False), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
        ),
        images,
        [{"0.weight": 1, "0.bias": 1, "2.weight": -1}, {"2.weight": 1, "6.weight": -1}],
    ),
    Network("residual", Residual, images, RESIDUAL),
    Network(
        "residual with projection",
        lambda: Residual(projection=True),
        images,
        [
            {"conv.weight": 1},
            {"norm.weight": 1, "norm.bias": 1},
            {"conv1.weight": 1},
            {"norm1.weight": 1, "norm1.bias": 1},
            {"conv2.weight": 1},
            {"shortcut.0.weight": 1},
            {"norm2.weight": 1, "norm2.bias": 1, "shortcut.1.weight": 1, "shortcut.1.bias": 1, "head.weight": -1},
        ],
    ),
    Network("residual in place", lambda: Residual(inplace=True), images, RESIDUAL),
    Network(
        "batch norm of a vector",
        lambda: with_lived_in_statistics(
            nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES))
        ),
        features,
        [{"0.weight": 1, "0.bias": 1}, {"1.weight": 1, "1.bias": 1, "3.weight": -1}],
    ),
    Network(
        "group norm",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
        ),
        images,
        [{"0.weight": 1, "0.bias": 1}, {"1.weight": 1, "1.bias": 1, "5.weight": -1}],
        exact=False,
    ),
    Network(
        "layer norm",
        lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, CLASSES)),
        features,
        [{"0.weight": 1, "0.bias": 1}, {"1.weight": 1, "1.bias": 1, "3.weight": -1}],
        exact=False,
    ),
    Network(
        "rms norm",
        lambda: nn.Sequential(nn.Linear(5, 7), nn.RMSNorm(7, eps=1e-6), nn.ReLU(), nn.Linear(7, CLASSES)),
        features,
        [{"0.weight": 1, "0.bias": 1}, {"1.weight": 1, "3.weight": -1}],
        exact=False,
    ),
    Network("functional", Functional, features, [{"first": 1, "shift": 1, "second": -1}]),
    Network(
        "concat",
        Concat,
        features,
        [{"a.weight": 1, "a.bias": 1, "b.weight": 1, "b.bias": 1, "out.weight": -1}],
    ),
    Network(
        "gate",
        Gate,
        features,
        [
            {"value.weight": 1, "value.bias": 1, "out.weight": -1},
            {"gate.weight": 1, "gate.bias": 1, "out.weight": -1},
        ],
    ),
    Network("maxout", Maxout, features, [{"pieces.weight": 1, "pieces.bias": 1, "out.weight": -1}]),
    Network(
        "attention",
        Attention,
        sequences,
        [
            {"query.weight": 1, "query.bias": 1, "key.weight": -1, "key.bias": -1},
            {"value.weight": 1, "value.bias": 1, "out.weight": -1},
            {"out.weight": 1, "out.bias": 1, "head.weight": -1},
        ],
    ),
    Network("tied", Tied, features, [{"first.weight": 1, "out.weight": -2}]),
    Network(
        "used twice",
        UsedTwice,
        features,
        [{"stem.weight": 1, "stem.bias": 1, "shared.bias": 1, "out.weight": -1}],
    ),
    Network(
        "unused parameter",
        Unused,
        features,
        [{f"body.{name}": e for name, e in generator.items()} for generator in MLP_WITH_BIASES],
    ),
    Network("frozen", frozen, features, MLP_WITH_BIASES[1:]),
    Network(
        "dropout",
        lambda: nn.Sequential(
            *(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.4)),
            *(nn.Linear(7, 6), nn.ReLU(), nn.Dropout1d(0.2), nn.Linear(6, CLASSES)),
        ),
        features,
        [{"0.weight": 1, "0.bias": 1, "3.weight": -1}, {"3.weight": 1, "3.bias": 1, "6.weight": -1}],
    ),
    Network(
        "auxiliary head",
        Auxiliary,
        features,
        [
            {"first.weight": 1, "first.bias": 1, "second.weight": -1, "auxiliary.weight": -1},
            {"second.weight": 1, "second.bias": 1, "out.weight": -1},
        ],
    ),
    Network(
        "dictionary",
        Dictionary,
        tokens,
        [
            {"embed.weight": 1, "dense.weight": -1},
            {"dense.weight": 1, "dense.bias": 1, "head.weight": -1},
        ],
    ),
]
