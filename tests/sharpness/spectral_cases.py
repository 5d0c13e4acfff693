"""Networks for the spectral measures: small enough to write their matrices out, and the rescalings they are put to."""

import copy

import torch
from torch import nn

from ms_optim.symmetry import scale_symmetries


def chain():
    """Without biases, 52 parameters; its widest layers have 20 each."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Linear(4, 5, bias=False), nn.ReLU()),
        *(nn.Linear(5, 4, bias=False), nn.ReLU()),
        nn.Linear(4, 3, bias=False),
    )


def biased():
    """With biases, 43 parameters."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def labelled(samples=6, features=4, classes=3):
    torch.manual_seed(3)
    return torch.randn(samples, features), torch.arange(samples) % classes




def rescaled(model, x, scale=0.7):
    """An equivalent network: another element of its scale group."""
    other = copy.deepcopy(model)
    group = scale_symmetries(other, x)
    assert len(group) > 0
    t = scale * torch.tensor([(-1.0) ** i * (1 + 0.3 * i) for i in range(len(group))], dtype=torch.float64)
    group.rescale_(other, t)
    before, after = model.eval()(x), other.eval()(x)
    assert torch.allclose(before, after, rtol=1e-9, atol=1e-12)
    return other


def with_rescaled_units(model):
    """The first hidden layer's units, each by its own factor; the next layer makes up for it."""
    other = copy.deepcopy(model)
    linear = [m for m in other if isinstance(m, nn.Linear)]
    factors = torch.linspace(0.4, 2.5, linear[0].out_features)
    with torch.no_grad():
        linear[0].weight.mul_(factors[:, None])
        if linear[0].bias is not None:
            linear[0].bias.mul_(factors)
        linear[1].weight.div_(factors)
    return other


def with_permuted_units(model):
    """The first hidden layer's units in another order: an orthogonal change of coordinates."""
    other = copy.deepcopy(model)
    linear = [m for m in other if isinstance(m, nn.Linear)]
    order = torch.arange(linear[0].out_features).roll(2)
    with torch.no_grad():
        linear[0].weight.copy_(linear[0].weight[order])
        if linear[0].bias is not None:
            linear[0].bias.copy_(linear[0].bias[order])
        linear[1].weight.copy_(linear[1].weight[:, order])
    return other


def seeded(seed):
    return torch.Generator().manual_seed(seed)
