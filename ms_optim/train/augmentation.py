"""Augmentation that timm has not: zeros around an image and a random part back, and cutout; mirroring, for batches.

Each comes twice: of one image on the host, as a step among timm's transforms, and of a batch on a device, all images at
once, each with its own offsets.  Given the same offsets both are equal bit for bit; the first is the reference of the
second.

    crop      pad p zeros on each side, take the part of the old size at (top, left), 0 <= top, left <= 2p
    flip      mirror left and right
    cutout    a square of zeros around (y, x), any pixel of the image, so that the square may stick out

Zeros around an image are black, as they are put there before it is normalised (He et al., arXiv 1512.03385, section
4.2); cutout's are the mean, as it comes after (DeVries and Taylor, arXiv 1708.04552, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .order import Purpose, integer, streams


class Normalisation:
    """Bytes to numbers of mean 0 and deviation 1: ``(x - 255 mean) / (255 std)``, in the order of timm's loader.

    Args:
        mean: Per channel, in units of the brightest pixel.
        std: Per channel.
        device: Where batches are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        # float32 whatever the default type is: bytes become float32, and a subtraction rounds once.
        self.mean, self.std = (
            torch.tensor([255 * x for x in values], dtype=torch.float32, device=device).view(1, -1, 1, 1)
            for values in (mean, std)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise a batch ``[N, C, H, W]``."""
        return x.to(torch.float32).sub_(self.mean).div_(self.std)


def crop_image(image: Any, padding: int, top: int, left: int) -> Any:
    """Pad one image with zeros and take a part of its old size.

    Args:
        image: A PIL image.
        padding: p, pixels on each side.
        top: First row of the padded image that is taken, up to 2p.
        left: First column.

    Returns:
        The part.
    """
    # Outside of an image PIL has zeros, in every mode.
    box = (left - padding, top - padding, left - padding + image.width, top - padding + image.height)
    return image.crop(box)


def crop_batch(x: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad images with zeros and take of each a part of its old size.

    Args:
        x: ``[N, C, H, W]``, bytes or numbers.
        padding: p, pixels on each side.
        top: ``[N]``, first row of the padded image that is taken, up to 2p.
        left: ``[N]``, first column.

    Returns:
        ``[N, C, H, W]``.
    """
    height, width = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (padding, padding, padding, padding))
    # A view of all (2p + 1)² parts, of which each image takes one.
    parts = padded.unfold(2, height, 1).unfold(3, width, 1)
    return parts[torch.arange(len(x), device=x.device), :, top, left]


def flip_batch(x: Tensor, flip: Tensor, dim: int = -1) -> Tensor:
    """Mirror some images.

    Args:
        x: ``[N, C, H, W]``.
        flip: ``[N]``, which.
        dim: -1: left and right; -2: top and bottom.

    Returns:
        ``[N, C, H, W]``.
    """
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(dim), x)


def cut_image(x: Tensor, side: int, row: int, column: int) -> Tensor:
    """Set a square of one image to zero.

    Args:
        x: ``[C, H, W]``, normalised; left as it is.
        side: Of the square.
        row: Of its centre; it begins ``side // 2`` above.
        column: Of its centre.

    Returns:
        ``[C, H, W]``.
    """
    top, left = row - side // 2, column - side // 2
    x = x.clone()
    x[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    return x


def cut_batch(x: Tensor, side: int, row: Tensor, column: Tensor) -> Tensor:
    """Set a square of each image to zero.

    Args:
        x: ``[N, C, H, W]``, normalised.
        side: Of the squares.
        row: ``[N]``, of their centres.
        column: ``[N]``, of their centres.

    Returns:
        ``[N, C, H, W]``.
    """
    height, width = x.shape[-2:]
    y = torch.arange(height, device=x.device) - (row - side // 2).view(-1, 1)
    z = torch.arange(width, device=x.device) - (column - side // 2).view(-1, 1)
    rows, columns = (0 <= y) & (y < side), (0 <= z) & (z < side)
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


@dataclass(frozen=True)
class RandomCrop:
    """A step of a transform: one image padded and cropped at random.

    Attributes:
        padding: p, pixels on each side.
    """

    padding: int

    def __call__(self, image: Any) -> Any:
        """Crop a PIL image."""
        top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
        return crop_image(image, self.padding, top, left)


@dataclass(frozen=True)
class RandomCutout:
    """A step of a transform: a random square of one normalised image set to zero.

    Attributes:
        side: Of the square.
    """

    side: int

    def __call__(self, x: Tensor) -> Tensor:
        """Cut ``[C, H, W]``."""
        row, column = (int(torch.randint(size, ())) for size in x.shape[-2:])
        return cut_image(x, self.side, row, column)


class DeviceAugmentation:
    """What is done to batches on their device: crop and mirror bytes, then erase and cut out of normalised numbers.

    Args:
        seed: Of the run.
        rank: Of this process.
        device: Where the batches are.
        padding: Of the crop; 0: none.
        hflip: Probability to mirror left and right.
        vflip: Probability to mirror top and bottom.
        cutout: Side of the square; 0: none.
        erasing: timm's ``RandomErasing``, or ``None``.
    """

    def __init__(
        self,
        seed: int,
        rank: int,
        device: torch.device,
        *,
        padding: int = 0,
        hflip: float = 0.0,
        vflip: float = 0.0,
        cutout: int = 0,
        erasing: Any = None,
    ) -> None:
        self.seed, self.rank, self.device = seed, rank, device
        self.padding, self.hflip, self.vflip, self.cutout, self.erasing = padding, hflip, vflip, cutout, erasing
        self.generator = torch.Generator(device)
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Start the stream of an epoch.

        Args:
            epoch: From 0.
        """
        self.epoch, self.number = epoch, 0
        self.generator.manual_seed(integer(Purpose.DEVICE, self.seed, epoch, self.rank))

    def bytes(self, x: Tensor) -> Tensor:
        """Crop and mirror.

        Args:
            x: ``[N, C, H, W]``, before normalisation.

        Returns:
            ``[N, C, H, W]``.
        """
        count = len(x)
        if self.padding:
            top, left = self._below(2 * self.padding + 1, count), self._below(2 * self.padding + 1, count)
            x = crop_batch(x, self.padding, top, left)
        for probability, dim in ((self.hflip, -1), (self.vflip, -2)):
            if probability:
                drawn = torch.rand(count, generator=self.generator, device=self.device, dtype=torch.float32)
                x = flip_batch(x, drawn < probability, dim)
        return x

    def numbers(self, x: Tensor) -> Tensor:
        """Erase and cut out.

        Args:
            x: ``[N, C, H, W]``, normalised; may be changed.

        Returns:
            ``[N, C, H, W]``.
        """
        if self.erasing is not None:
            # timm's draws from Python's global stream and, for noise, from that of the device.
            with streams(Purpose.DEVICE, self.seed, self.epoch, self.rank, self.number, device=self.device):
                x = self.erasing(x)
        self.number += 1
        if self.cutout:
            height, width = x.shape[-2:]
            x = cut_batch(x, self.cutout, self._below(height, len(x)), self._below(width, len(x)))
        return x

    def _below(self, bound: int, count: int) -> Tensor:
        return torch.randint(bound, (count,), generator=self.generator, device=self.device)
