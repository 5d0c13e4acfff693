"""Streaming: batches of data sets that are read in one direction, each worker its own part of them.

timm's readers share shards out to ranks and workers.  What they draw is seeded here for each epoch, so that a resumed
run reads what the uninterrupted one read: timm's own sample shuffle goes on from one epoch to the next.

Evaluation is exact: each rank reads its shards once.  How many images those hold is known only when they have been
read, so ranks that are done wait for the others with padding.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import DataError, UnsupportedError
from .datasets import Stream
from .order import Purpose, Ranks, integer, streams


class StreamBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of one rank, or of one of its workers.

    Args:
        stream: Where the images come from.
        transform: What is done to each.
        collate: What makes a batch of them.
        batch_size: Images in a batch.
        num_classes: Labels are below.
        seed: Of the run.
        rank: Of this process.
        mixes_in: Epoch -> whether batches are mixed; ``None``: this is evaluation, in order and to the last image.
    """

    def __init__(
        self,
        stream: Stream,
        transform: Callable[[Any], Any],
        collate: Any,
        batch_size: int,
        num_classes: int,
        seed: int,
        rank: int,
        mixes_in: Callable[[int], bool] | None,
    ) -> None:
        self.stream, self.transform, self.collate = stream, transform, collate
        self.batch_size, self.num_classes, self.seed, self.rank, self.mixes_in = (
            batch_size,
            num_classes,
            seed,
            rank,
            mixes_in,
        )
        # Workers outlive epochs, and read it when they begin one.
        self.epoch = multiprocessing.Value("q", 0)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch.

        Args:
            epoch: From 0.
        """
        self.epoch.value = epoch
        self.stream.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch.value
        worker = self._take_part(epoch)
        key = (self.seed, epoch, self.rank, worker)
        rows: list[tuple[Any, int]] = []
        batches = 0
        for count, (image, label) in enumerate(self.stream.dataset):
            if not 0 <= label < self.num_classes:
                raise DataError(
                    f"{self.stream.name} has an image with label {label}, and the model has {self.num_classes} "
                    "classes; pass --num-classes or --class-map, or leave the split out if its images have no labels"
                )
            with streams(Purpose.HOST, *key, count):
                rows.append((self.transform(image), label))
            if len(rows) == self.batch_size:
                yield self._batch(rows, *key, batches)
                rows, batches = [], batches + 1
        if rows and self.mixes_in is None:
            yield self._batch(rows, *key, batches)

    def _take_part(self, epoch: int) -> int:
        """Have timm's reader begin anew, its shuffle from the epoch's seed; which worker this is."""
        reader, info = self.stream.dataset.reader, get_worker_info()
        worker = 0 if info is None else info.id
        if info is not None:
            reader.worker_info, reader.worker_id, reader.num_workers = info, info.id, info.num_workers
            reader.global_num_workers = reader.dist_num_replicas * info.num_workers
            reader.global_worker_id = reader.dist_rank * info.num_workers + info.id
        # WebDataset's pipeline keeps the seed that it was made with.  TensorFlow's takes that of the worker, which is
        # the same in all epochs, and the epoch for the order of files.
        if hasattr(reader, "worker_seed"):
            reader.worker_seed, reader.ds = integer(Purpose.ORDER, self.seed, epoch, self.rank, worker), None
        return worker

    def _batch(self, rows: list[tuple[Any, int]], *key: int) -> tuple[Tensor, Tensor]:
        if self.mixes_in is not None and hasattr(self.collate, "mixup_enabled"):
            self.collate.mixup_enabled = self.mixes_in(key[1])
        with streams(Purpose.MIXING, *key):
            batch: tuple[Tensor, Tensor] = self.collate(rows)
        return batch


def training_batches(stream: Stream, batch_size: int) -> int:
    """The number of batches of a rank, which timm knows from the number of images.

    Args:
        stream: Of training.
        batch_size: Images in a batch.

    Returns:
        The number.
    """
    return len(stream.dataset) // batch_size


def for_evaluation(stream: Stream, ranks: Ranks) -> Stream:
    """A stream of which each rank reads its part once, without timm's repetitions that make parts equal.

    Args:
        stream: The stream; changed.
        ranks: This one of how many.

    Returns:
        The stream.

    Raises:
        UnsupportedError: If its reader cannot be divided so.
    """
    reader = stream.dataset.reader
    if ranks.world == 1:
        return stream
    if hasattr(reader, "split_info"):  # WebDataset: whole shards
        mine = reader.split_info.filenames[ranks.rank :: ranks.world]
        reader.split_info = dataclasses.replace(reader.split_info, filenames=mine)
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        reader.num_samples = math.ceil(reader.num_samples / ranks.world)
    elif hasattr(reader, "subsplit"):
        raise UnsupportedError(
            f"{stream.name} cannot be evaluated exactly on {ranks.world} ranks, as TensorFlow's reader repeats images; "
            "take --val-split '' and evaluate on one process, or another copy of the data"
        )
    return stream


class StreamEvaluation:
    """Batches of a stream until all ranks have read theirs.

    Args:
        batches: On the device, of this rank.
        estimate: About how many there are.
        ranks: This one of how many.
        blank: Shape ``[C, H, W]`` of an image, for ranks that have none.
        device: Where batches are.

    """

    def __init__(self, batches: Any, estimate: int, ranks: Ranks, blank: tuple[int, ...], device: torch.device) -> None:
        self.batches, self.estimate, self.ranks, self.blank, self.device = batches, estimate, ranks, blank, device
        self._yielded = 0

    @property
    def real(self) -> int:
        """How many images of this rank are not padding; they come first.

        One process pads nothing, and of several each knows only, while it reads, how many it has yielded so far.
        """
        return sys.maxsize if self.ranks.world == 1 else self._yielded

    def __len__(self) -> int:
        return self.estimate

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._yielded = 0
        padding = (
            torch.zeros(1, *self.blank, device=self.device),
            torch.zeros(1, dtype=torch.long, device=self.device),
        )
        iterator = iter(self.batches)
        while True:
            batch = next(iterator, None)
            if not self._anywhere(batch is not None):
                return
            self._yielded += 0 if batch is None else len(batch[1])
            yield padding if batch is None else batch

    def _anywhere(self, here: bool) -> bool:
        """Whether any rank has a batch left."""
        if self.ranks.world == 1:
            return here
        flag = torch.tensor(int(here), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
