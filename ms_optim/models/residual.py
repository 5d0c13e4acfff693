"""Residual networks for 32×32 images, from two choices: where the normaliser stands, and how wide a stage is.

The normaliser follows the convolution (arXiv 1512.03385) or precedes it (1603.05027); wider stages are those of
1605.07146.  Parameter counts are for ten classes; the ones in millions are those that the papers print.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image's size up to the stride, weights N(0, 2 / fan-out).

    Source: arXiv 1502.01852, eq. 14 (the backward form), as is usual with residual networks.
    """
    conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class BasicBlock(nn.Module):
    """Residual block y = φ(x' + BN(W_2 φ(BN(W_1 x)))) of arXiv 1512.03385, with the shortcut x' without parameters.

    Where the shape changes, x' is every second pixel of x, padded by channels of zeros: "option A", which the paper
    uses on CIFAR "in all cases". Scales pass through it unchanged, so the residual streams of all stages share one.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of y, at least as many.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolution(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C', H / stride, W / stride]``."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(x + residual)


class ResNet(nn.Module):
    """Residual network of basic blocks for small images: stem, stages, global average, linear.

    Args:
        blocks: Blocks in each stage; every stage but the first halves the image.
        widths: Channels of each stage.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Source: arXiv 1512.03385, section 4.2.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], in_channels: int = 3, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = convolution(in_channels, widths[0], 3)
        self.bn = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for index in range(count):
                layers.append(BasicBlock(channels, width, stride=2 if stage and not index else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to logits ``[N, K]``."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return cast(Tensor, self.head(x.mean((2, 3))))


def cifar_resnet(depth: int, num_classes: int = 10) -> ResNet:
    """The ResNet-20, 32, 44, 56 or 110 for CIFAR of arXiv 1512.03385, Table 6.

    Its 0.27, 0.46, 0.66, 0.85 and 1.7 million parameters are those of shortcuts without parameters (option A).

    Args:
        depth: Number of layers with weights, 6n + 2: n blocks in each of three stages of 16, 32, 64 channels.
        num_classes: Number of logits.

    Returns:
        The network, for inputs ``[N, 3, 32, 32]``.

    Raises:
        ValueError: If no n gives that depth.
    """
    count, rest = divmod(depth - 2, 6)
    if count < 1 or rest:
        raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110, ...), got {depth}")
    return ResNet((count,) * 3, (16, 32, 64), num_classes=num_classes)


def small_resnet(channels: int = 16, blocks: int = 1, in_channels: int = 1, num_classes: int = 10) -> ResNet:
    """A residual network of two stages for images of about 8×8: 19,130 parameters as it stands.

    Args:
        channels: Channels of the first stage; the second has twice as many.
        blocks: Blocks in each stage.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Returns:
        The network, for inputs ``[N, in_channels, H, W]``.
    """
    return ResNet((blocks, blocks), (channels, 2 * channels), in_channels, num_classes)


class PreActBlock(nn.Module):
    """Residual block y = x' + W_2 φ(BN(W_1 φ(BN(x)))), normaliser first.

    Where the shape changes, x' is a 1×1 convolution of φ(BN(x)), otherwise x itself.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of y.
        stride: Stride of the first convolution and of the shortcut.
        dropout: Probability of dropout between the convolutions.

    Source: arXiv 1603.05027, Fig. 1b; arXiv 1605.07146, Fig. 1d with dropout.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(out_channels, out_channels, 3)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = convolution(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C', H / stride, W / stride]``."""
        active = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return cast(Tensor, kept + self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active))))))


class PreActResNet(nn.Module):
    """Residual network of pre-activation blocks: stem, stages, normaliser, global average, linear.

    Args:
        blocks: Blocks in each stage; every stage but the first halves the image.
        widths: Channels of each stage.
        stem: Channels of the first convolution.
        num_classes: Number of logits.
        dropout: Probability of dropout between the convolutions of a block.

    Source: arXiv 1603.05027, section 4, with the extra activation after its last block.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], stem: int, num_classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = convolution(3, stem, 3)
        layers: list[nn.Module] = []
        channels = stem
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for index in range(count):
                layers.append(PreActBlock(channels, width, stride=2 if stage and not index else 1, dropout=dropout))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, H, W]`` to logits ``[N, K]``."""
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return cast(Tensor, self.head(x.mean((2, 3))))


def preact_resnet18(num_classes: int = 10) -> PreActResNet:
    """The PreAct-ResNet-18 of the SAM literature on CIFAR: 11.17 million parameters.

    Two pre-activation blocks in each of four stages of 64, 128, 256, 512 channels, after a 3×3 stem.

    Args:
        num_classes: Number of logits.

    Returns:
        The network, for inputs ``[N, 3, 32, 32]``.
    """
    return PreActResNet((2, 2, 2, 2), (64, 128, 256, 512), stem=64, num_classes=num_classes)


def wide_resnet(depth: int = 28, width: int = 10, num_classes: int = 10, dropout: float = 0.0) -> PreActResNet:
    """The wide residual network WRN-depth-width of arXiv 1605.07146: WRN-28-10 has 36.5 million parameters.

    Args:
        depth: Number of layers with weights, 6n + 4 with the shortcuts' convolutions counted as in the paper.
        width: Factor k on the stages' 16, 32, 64 channels.
        num_classes: Number of logits.
        dropout: Probability of dropout between the convolutions of a block.

    Returns:
        The network, for inputs ``[N, 3, 32, 32]``.

    Raises:
        ValueError: If no n gives that depth, or the width is below 1.
    """
    count, rest = divmod(depth - 4, 6)
    if count < 1 or rest:
        raise ValueError(f"depth must be 6n + 4 (16, 22, 28, 40, ...), got {depth}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}; 1 is the network without widening")
    widths = (16 * width, 32 * width, 64 * width)
    return PreActResNet((count,) * 3, widths, stem=16, num_classes=num_classes, dropout=dropout)
