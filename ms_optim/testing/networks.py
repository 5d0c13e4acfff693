"""Networks: the smallest ones in which an optimizer can go wrong, and batches for them.

All classify into four classes.  They are small enough for hundreds of steps a second, and each has one thing that
matters: running statistics, masks, a weight that is used twice, a branch that is not always taken, sparse gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES, HIDDEN, CLASSES, WORDS = 6, 5, 4, 12
Batch = tuple[Tensor, Tensor]


class Branching(nn.Module):
    """A residual branch that a forward pass may leave out; its parameters have no gradient then."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.side = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        """The logits.

        Args:
            x: Inputs ``[N, 6]``.
            side: Whether the branch is taken.

        Returns:
            Logits ``[N, 4]``.
        """
        h = torch.relu(self.trunk(x))
        return self.head(h + torch.relu(self.side(h)) if side else h)


class Embedded(nn.Module):
    """The mean of word vectors, and a layer on it.

    Args:
        sparse: Whether the gradient of the word vectors is sparse.
    """

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, FEATURES, sparse=sparse)
        self.hidden, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The logits.

        Args:
            x: Words ``[N, T]``.

        Returns:
            Logits ``[N, 4]``.
        """
        return self.head(torch.relu(self.hidden(self.words(x).mean(1))))


def mlp() -> nn.Module:
    """Three layers with biases."""
    layers = (nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(HIDDEN, CLASSES))


def normalised(momentum: float | None = 0.1) -> nn.Module:
    """Running statistics.

    Args:
        momentum: Of the moving average; ``None``: the average of all batches, which depends on their number.

    Returns:
        The network.
    """
    first = (nn.Linear(FEATURES, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN, momentum=momentum), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def masked() -> nn.Module:
    """Dropout on the inputs, whose zeros are the mask and nothing else."""
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def stochastic() -> nn.Module:
    """Running statistics and masks together, as in a network that is trained in earnest."""
    first = (nn.Linear(FEATURES, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(*first, nn.Linear(HIDDEN, CLASSES))


def tied() -> nn.Module:
    """One weight in two layers."""
    model = nn.Sequential(
        nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES)
    )
    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    second.weight = first.weight
    return model


def batches(model: nn.Module, count: int, seed: int = 0) -> list[Batch]:
    """Random inputs and labels for one of the networks above, in its precision.

    Args:
        model: The network.
        count: The number of batches.
        seed: Of a generator of their own.

    Returns:
        Pairs of inputs and labels, eight samples each.
    """
    stream, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
    drawn = []
    for _ in range(count):
        if isinstance(model, Embedded):
            x = torch.randint(0, WORDS // 2, (8, 3), generator=stream)  # half of the words occur
        else:
            x = torch.randn(8, FEATURES, generator=stream, dtype=torch.float64).to(dtype)
        drawn.append((x, torch.randint(0, CLASSES, (8,), generator=stream)))
    return drawn
