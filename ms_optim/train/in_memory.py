"""In memory: small data sets are decoded once, to bytes on the device, where whole batches are augmented.

A worker process prepares a few thousand images of 32 x 32 pixels a second, an accelerator trains on tens of thousands.
From bytes in memory a batch is one gather, one more for the random crop, and a few operations on all of it.  Without
augmentation the batches are those of the workers bit for bit.

What batches have no step for (AutoAugment, colour jitter, random resized crop) is done by timm's transforms of single
images in the ordinary loader, from the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .augmentation import DeviceAugmentation, Normalisation
from .images import Images, to_bytes
from .order import EvaluationOrder, TrainingOrder
from .sources import PixelSource

BUDGET = 2 << 30  # bytes of pixels, of all splits together


class DoesNotFit(Exception):
    """Images that cannot be kept in memory as one tensor; the message says why."""


def decode(images: Images, input_size: tuple[int, int, int], budget: int) -> Tensor:
    """Read all images.

    Args:
        images: The images.
        input_size: Channels, height and width that each must have.
        budget: Bytes that they may take.

    Returns:
        Bytes ``[N, C, H, W]``.

    Raises:
        DoesNotFit: If they do not fit, or one has another size.
    """
    shape = (len(images), *input_size)
    size = torch.Size(shape).numel()
    if size > budget:
        raise DoesNotFit(
            f"{images.source.name}, {list(shape)} bytes, is {size / 2**30:.1f} GiB, {budget / 2**30:.1f} are left"
        )
    pixels = images.source.pixels(images.indices, images.mode)
    if pixels is not None:
        _check_size(tuple(pixels.shape[1:]), 0, images, input_size)
        return pixels
    pixels = torch.empty(shape, dtype=torch.uint8)
    try:
        for place, index in enumerate(images.indices.tolist()):
            image = to_bytes(images.source.read(index, images.mode))
            _check_size(tuple(image.shape), index, images, input_size)
            pixels[place] = image
    finally:
        images.source.close()
    return pixels


def _check_size(found: tuple[int, ...], index: int, images: Images, input_size: tuple[int, int, int]) -> None:
    if found != input_size:
        raise DoesNotFit(
            f"image {index} of {images.source.name} is {list(found)}, not {list(input_size)}, and has to be resized"
        )


def in_memory(images: Images, pixels: Tensor) -> Images:
    """The same images, read from memory.

    Args:
        images: The images.
        pixels: Their bytes, as of :func:`decode`.

    Returns:
        The images.
    """
    source = PixelSource(pixels, images.mode, images.source.name)
    return Images(source, torch.arange(len(images)).numpy(), images.labels, images.mode)


def fits_on(device: torch.device, size: int) -> bool:
    """Whether a device has room for bytes and for the training beside.

    Args:
        device: The device.
        size: Number of bytes.

    Returns:
        Whether they take at most half of what is free.
    """
    return device.type != "cuda" or 2 * size <= torch.cuda.mem_get_info(device)[0]


class _Memory:
    """Bytes and labels, of which a batch is a gather."""

    def __init__(self, pixels: Tensor, images: Images, normalise: Normalisation, device: torch.device) -> None:
        where = device if fits_on(device, pixels.numel()) else torch.device("cpu")
        self.pixels, self.labels = pixels.to(where), torch.from_numpy(images.labels).to(where)
        self.normalise, self.device = normalise, device

    def parts(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in order.to(self.pixels.device).split(size):
            yield self.pixels[part].to(self.device), self.labels[part].to(self.device)


class MemoryTraining(_Memory):
    """Training batches from memory; timm's ``Mixup`` is left to the loop.

    Args:
        pixels: ``[N, C, H, W]``.
        images: Whose they are.
        normalise: What follows the crop.
        device: Where batches are to be.
        order: Of the images.
        augmentation: On the device.
    """

    mixes = False

    def __init__(
        self,
        pixels: Tensor,
        images: Images,
        normalise: Normalisation,
        device: torch.device,
        order: TrainingOrder,
        augmentation: DeviceAugmentation,
    ) -> None:
        super().__init__(pixels, images, normalise, device)
        self.order, self.augmentation = order, augmentation

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch.

        Args:
            epoch: From 0.
        """
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.augmentation.begin(self.order.epoch)
        for x, y in self.parts(self.order.indices(), self.order.batch_size):
            yield self.augmentation.numbers(self.normalise(self.augmentation.bytes(x))), y


class MemoryEvaluation(_Memory):
    """Batches in order, from memory.

    Args:
        pixels: ``[N, C, H, W]``.
        images: Whose they are.
        normalise: What is done to them.
        device: Where batches are to be.
        order: Of the images.
    """

    def __init__(
        self, pixels: Tensor, images: Images, normalise: Normalisation, device: torch.device, order: EvaluationOrder
    ) -> None:
        super().__init__(pixels, images, normalise, device)
        self.order = order

    @property
    def real(self) -> int:
        """How many images of this rank are not padding; they come first."""
        return self.order.real

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.parts(self.order.indices(), self.order.batch_size):
            yield self.normalise(x), y
