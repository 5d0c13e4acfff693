"""Chains of linear or convolutional layers and ReLUs, whose Gauss-Newton trace is their Hessian trace.

All that follows a parameter is piecewise linear.  Sizes are those of the experiments of Minimum Sharpness (arXiv
2106.12612) and of its published code; parameter counts are for ten classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class MLP(nn.Sequential):
    """Fully connected ReLU network on flattened inputs, x ↦ W_D φ(… φ(W_1 x + b_1) …) + b_D.

    Args:
        sizes: Widths, the input's and the logits' included: D + 1 of them for D layers.
        bias: Whether the layers have biases. Without them the network is a chain, whose minimum sharpness has a closed
            form (arXiv 2106.12612, Thm 1).

    Raises:
        ValueError: If there are fewer than two widths.
    """

    def __init__(self, sizes: Sequence[int], bias: bool = True) -> None:
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least an input and an output width, got {tuple(sizes)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in zip(sizes[:-2], sizes[1:-1], strict=True):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1], bias=bias))


def mlp(num_classes: int = 10, bias: bool = True) -> MLP:
    """The MLP 784-512-128-512-10 of arXiv 2106.12612: 538,762 parameters with biases, as there.

    Args:
        num_classes: Number of logits.
        bias: Whether the layers have biases.

    Returns:
        The network, for inputs ``[N, 1, 28, 28]`` or ``[N, 784]``.
    """
    return MLP((784, 512, 128, 512, num_classes), bias=bias)


def digits_mlp(num_classes: int = 10) -> MLP:
    """The MLP 64-128-128-10 of the demo, for the handwritten digits of 8×8 pixels: 26,122 parameters.

    Args:
        num_classes: Number of logits.

    Returns:
        The network, for inputs ``[N, 1, 8, 8]`` or ``[N, 64]``.
    """
    return MLP((64, 128, 128, num_classes))


def small_fcnn(num_classes: int = 10) -> MLP:
    """The fully connected network 784-20-20-10 of the timings of arXiv 2106.12612, Fig. 1: 16,330 parameters.

    Args:
        num_classes: Number of logits.

    Returns:
        The network, for inputs ``[N, 1, 28, 28]`` or ``[N, 784]``.
    """
    return MLP((784, 20, 20, num_classes))


def small_cnn(num_classes: int = 10) -> nn.Sequential:
    """The convolutional network of the timings of arXiv 2106.12612, Fig. 1: 13,750 parameters.

    Two 5×5 convolutions of 20 channels without padding, each with ReLU and 2×2 max-pooling, and one linear layer.

    Args:
        num_classes: Number of logits.

    Returns:
        The network, for inputs ``[N, 1, 28, 28]``.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2, 2)),  # 28 -> 24 -> 12
        *(nn.Conv2d(20, 20, 5), nn.ReLU(), nn.MaxPool2d(2, 2)),  # 12 -> 8 -> 4
        *(nn.Flatten(), nn.Linear(20 * 4 * 4, num_classes)),
    )


def lenet(num_classes: int = 10) -> nn.Sequential:
    """The LeNet of arXiv 2106.12612: 545,546 parameters.

    Its first pooling has stride 1, so that 120 maps of 7×7 reach the linear layers: that layer holds 90% of them.

    Args:
        num_classes: Number of logits.

    Returns:
        The network, for inputs ``[N, 1, 28, 28]``.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, 1)),  # 28 -> 28 -> 27
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2, 2)),  # 27 -> 23 -> 11
        *(nn.Conv2d(16, 120, 5), nn.ReLU()),  # 11 -> 7
        *(nn.Flatten(), nn.Linear(120 * 7 * 7, 84), nn.ReLU(), nn.Linear(84, num_classes)),
    )
