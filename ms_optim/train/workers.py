"""Workers: processes that prepare batches of single images on the host, and their way to the device.

The dataset that torch's ``DataLoader`` sees is one of whole batches, each with its epoch, number and images: the worker
that prepares a batch seeds its streams by these, so neither the number of workers nor what they did before matters.
Bytes are normalised, erased and cut on the device by timm's ``PrefetchLoader``, or by workers with ``--no-prefetcher``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import DeviceAugmentation
from .images import Images
from .order import Batch, EvaluationOrder, Purpose, streams
from .pipeline import Format


class HostBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of single images that are prepared on the host; its indices are the batches of an order.

    Args:
        images: With their transform.
        collate: What makes a batch of them.
        seed: Of the run.
        rank: Of this process.
        mixes_in: Epoch -> whether batches are mixed.
    """

    def __init__(
        self, images: Images, collate: Any, seed: int = 0, rank: int = 0, mixes_in: Callable[[int], bool] | None = None
    ) -> None:
        self.images, self.collate, self.seed, self.rank, self.mixes_in = images, collate, seed, rank, mixes_in

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prepare one batch."""
        if self.mixes_in is not None and hasattr(self.collate, "mixup_enabled"):
            self.collate.mixup_enabled = self.mixes_in(batch.epoch)
        with streams(Purpose.HOST, self.seed, batch.epoch, self.rank, batch.number):
            prepared: tuple[Tensor, Tensor] = self.collate([self.images[index] for index in batch.indices])
        return prepared


class OnDevice:
    """Batches of a ``DataLoader`` on the device, as numbers.

    Args:
        loader: Of batches.
        form: What images are.
        device: Where batches are to be.
        augmentation: After normalisation; ``None``: none.
        prefetcher: Whether the loader gives bytes; else it gives normalised images.
    """

    def __init__(
        self,
        loader: Any,
        form: Format,
        device: torch.device,
        augmentation: DeviceAugmentation | None,
        prefetcher: bool,
    ) -> None:
        self.loader, self.device, self.prefetcher = loader, device, prefetcher
        if prefetcher:
            # float32 by name: timm would otherwise normalise by tensors of the default type.
            arguments = {"channels": form.input_size[0], "device": device, "img_dtype": torch.float32}
            self.loader = import_module("timm.data.loader").PrefetchLoader(loader, form.mean, form.std, **arguments)
            # Its place for timm's own erasing, which is part of ours.
            self.loader.random_erasing = None if augmentation is None else augmentation.numbers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.prefetcher:
            yield from self.loader
        else:
            for x, y in self.loader:
                yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


class WorkerTraining:
    """Training batches that workers prepare.

    Args:
        batches: On the device.
        order: Whose epoch they are of, or the dataset of a stream.
        length: Their number.
        mixes: Whether they are mixed.
        augmentation: On the device.
    """

    def __init__(
        self, batches: OnDevice, order: Any, length: int, mixes: bool, augmentation: DeviceAugmentation
    ) -> None:
        self.batches, self.order, self.length, self.mixes, self.augmentation = (
            batches,
            order,
            length,
            mixes,
            augmentation,
        )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch.

        Args:
            epoch: From 0.
        """
        self.epoch = epoch
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.augmentation.begin(self.epoch)
        return iter(self.batches)


class WorkerEvaluation:
    """Batches in order that workers prepare.

    Args:
        batches: On the device.
        order: Of the images.
    """

    def __init__(self, batches: OnDevice, order: EvaluationOrder) -> None:
        self.batches, self.order = batches, order

    @property
    def real(self) -> int:
        """How many images of this rank are not padding; they come first."""
        return self.order.real

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)
