"""How the two-step SAM is driven: what its tests share."""


import pytest
import torch
from cases import convnet, mlp, samples
from torch.nn.functional import cross_entropy

from ms_optim.compat import SAM

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9}


def two_steps(optimizer, model, closure):
    loss = closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step(zero_grad=True)
    return loss


def gradient_first(optimizer, model, closure):
    loss = closure()
    optimizer.step(closure)
    optimizer.zero_grad()
    return loss


def closure_alone(optimizer, model, closure):
    return optimizer.step(closure)


DRIVES = [two_steps, gradient_first, closure_alone]
driven = pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.__name__)
every_network = pytest.mark.parametrize("network", [mlp, convnet])


def closure_of(model, x, y):
    """Forward and backward; like the original's, it leaves zeroing to the optimizer."""

    def closure():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def state_of(model, optimizer):
    """All that a step may change."""
    base = [v for s in optimizer.base.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [t.detach().clone() for t in (*model.state_dict().values(), *base)]


def trained(drive, network=mlp, steps=4, given=True, **options):
    torch.manual_seed(0)
    model = network()
    optimizer = SAM(model.parameters(), **{**SGD, "model": model if given else None, **options})
    torch.manual_seed(1)
    for x, y in samples(model, steps):
        drive(optimizer, model, closure_of(model, x, y))
    return model, optimizer
