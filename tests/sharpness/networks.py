"""Labelled networks for the laws of sharpness, and rescalings that leave their functions alone."""

from __future__ import annotations

import copy

import torch
from curvature.random_networks import settled
from torch import Tensor, nn

from ms_optim import ScaleGroup, models, scale_symmetries


def chain(bias: bool = True, seed: int = 0, sizes: tuple[int, ...] = (5, 7, 6, 3)) -> nn.Sequential:
    """A ReLU network, weights of about unit gain, biases away from zero."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=fan_in**-0.5)
        if bias:
            nn.init.normal_(layers[-2].bias, std=0.3)
    return nn.Sequential(*layers[:-1])


def normalised(seed: int = 0) -> nn.Sequential:
    """A linear layer and a convolution before BatchNorms with statistics of their own."""
    torch.manual_seed(seed)
    return settled(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
        )
    )


def labelled(
    samples: int = 12, classes: int = 3, seed: int = 1, shape: tuple[int, ...] = (5,)
) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *shape, generator=stream)
    return x, torch.randint(classes, (samples,), generator=stream)


_GROUPS: dict[str, ScaleGroup] = {}


def known_group(model: nn.Module, x: Tensor) -> ScaleGroup:
    """The scale group, discovered once for all networks that print alike."""
    key = str(model)
    if key not in _GROUPS:
        _GROUPS[key] = scale_symmetries(model, x)
    return _GROUPS[key]


def rescaled_layers(model: nn.Module, x: Tensor, std: float = 0.7, seed: int = 2) -> nn.Module:
    """A copy with the same function, moved by a random element of the scale group, and running statistics along."""
    other = copy.deepcopy(model)
    group = known_group(model, x)
    element = group.bound(other, group.random(std, torch.Generator().manual_seed(seed)))
    assert element.abs().max() > 0.1
    group.rescale_(other, element)
    assert_same_function(model, other, x)
    return other


def rescaled_neurons(model: nn.Sequential, x: Tensor, std: float = 0.7, seed: int = 2) -> nn.Module:
    """A copy with the same function, every hidden neuron of a chain of linear layers multiplied by its own factor."""
    other = copy.deepcopy(model)
    stream = torch.Generator().manual_seed(seed)
    linear = [module for module in other if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for layer, behind in zip(linear[:-1], linear[1:], strict=True):
            factors = (std * torch.randn(layer.out_features, generator=stream)).exp()
            layer.weight.mul_(factors[:, None])
            if layer.bias is not None:
                layer.bias.mul_(factors)
            behind.weight.div_(factors)
    assert_same_function(model, other, x)
    return other


def grown_before_normalisers(model: nn.Module, x: Tensor, std: float = 0.7, seed: int = 2) -> nn.Module:
    """A copy with the same function, each output unit in front of a BatchNorm multiplied by its own factor."""
    other = copy.deepcopy(model)
    stream = torch.Generator().manual_seed(seed)
    modules = list(other)
    count = 0
    with torch.no_grad():
        for module, norm in zip(modules[:-1], modules[1:], strict=True):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                # A variance below ε has no counterpart, so that factors are at least 1.
                factors = (std * torch.randn(norm.num_features, generator=stream)).abs().exp()
                module.weight.mul_(factors.view(-1, *[1] * (module.weight.ndim - 1)))
                if module.bias is not None:
                    module.bias.mul_(factors)
                norm.running_mean.mul_(factors)
                norm.running_var.add_(norm.eps).mul_(factors.square()).sub_(norm.eps)
                count += 1
    assert count
    assert_same_function(model, other, x)
    return other


def assert_same_function(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-11, atol=1e-12)


def three_kinds() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """An MLP, the LeNet and a small BatchNorm ResNet, with data."""
    torch.manual_seed(0)
    return {
        "mlp": (chain(), labelled()),
        "lenet": (models.lenet(), labelled(4, 10, shape=(1, 28, 28))),
        "resnet": (settled(models.small_resnet(channels=4)), labelled(6, 10, shape=(1, 8, 8))),
    }
