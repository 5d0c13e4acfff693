"""A user's project, as the command line sees it: networks, data and training loops by name, right and wrong ones."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ms_optim
from ms_optim.models import MLP


def network(width=12, num_classes=10):
    """A chain for the digits: the same one each time, whatever the stream of random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return MLP((64, width, num_classes)).double()


INSTANCE = network()
NUMBER = 3


def smooth():
    """A network in which nothing can be rescaled."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)).double()


class Tied(nn.Module):
    """A network with one matrix under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x.flatten(1))))))


class Undecided(nn.Module):
    """A network whose graph depends on its input, so that it cannot be exported."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 5), nn.Linear(64, 5)

    def forward(self, x):
        x = x.flatten(1)
        return self.first(x) if float(x.sum()) > 0 else self.second(x)


def other():
    return NUMBER


def raising():
    raise ValueError("the weights\nare elsewhere")


def interrupted():
    raise KeyboardInterrupt


def leaving():
    sys.exit("configuration is missing")


def samples(count=10):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (count,), generator=generator)


def inputs():
    return samples()[0]


def batches():
    x, y = samples()
    return [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]


def unlabelled():
    return [x for x, _ in batches()]


def stream():
    yield from batches()


def dataset():
    return TensorDataset(*samples())


def loader():
    return DataLoader(dataset(), 4)


def nothing():
    return []


def overflowing():
    x, y = samples()
    return [(torch.full_like(x, torch.inf), y)]


def loop(spoiled=False):
    """A step of SAM; spoiled, its gradients are taken twice without being zeroed."""
    model = network()
    optimizer = ms_optim.SAM(model, torch.optim.SGD, rho=0.05, lr=0.1)
    x, y = samples()

    def closure():
        if not spoiled:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step():
        if spoiled:
            raise RuntimeError("out of data")
        optimizer.step(closure)

    return model, optimizer, step


def loop_by_name():
    return dict(zip(("model", "optimizer", "step"), loop(), strict=True))


def half_a_loop():
    return loop()[:2]
