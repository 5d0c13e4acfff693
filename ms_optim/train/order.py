"""Order: which images an epoch takes, in which batches, and every random number that is drawn on the way.

All of it follows from the run's seed, the epoch, the rank and the number of the batch:

    order of an epoch      (seed, epoch), the same on all ranks, which take every world-th image of it
    augmentation           (seed, epoch, rank, batch)

so a run that is resumed at the start of an epoch sees what the uninterrupted run saw.  Seeds belong to batches and not
to workers: which worker prepares a batch, and how many there are, changes nothing.  Only of data that can be read in
one direction (WebDataset, …) each worker has a part of its own, and its index takes the place of the batch's owner.

With W ranks and batches of B images, the k-th batches of all ranks together are the k-th batch of one process with
batches of W·B images.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import DataError
from ..optim.randomness import Streams

_WORD = 1 << 32


class Purpose(IntEnum):
    """What random numbers are drawn for: two purposes never share a stream."""

    EVERYTHING = 0
    ORDER = 1
    HOST = 2  # augmentation of images in the host's memory, and mixing them
    DEVICE = 3  # augmentation of batches on the device
    HELD_OUT = 4
    CHOICE = 5
    LABEL_NOISE = 6
    SAMPLE = 7
    MIXING = 8


class OneOfMany(Protocol):
    """Whatever knows which of how many processes this is."""

    @property
    def rank(self) -> int:
        """From 0."""

    @property
    def world(self) -> int:
        """Their number."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: From 0.
        world: Their number.
    """

    rank: int = 0
    world: int = 1


def entropy(purpose: Purpose, *integers: int) -> np.random.SeedSequence:
    """The source of a stream that belongs to a tuple of integers.

    numpy's sequence hashes its words, but takes ``(1,)`` and ``(1, 0)`` for the same, and a large integer for two small
    ones.  Hence the number of integers comes first and each of them is two words.

    Args:
        purpose: What for.
        *integers: Seed, epoch, rank, …: taken modulo 2⁶⁴.

    Returns:
        The source.
    """
    words = [int(purpose), len(integers)]
    for integer in integers:
        words += [integer % _WORD, integer // _WORD % _WORD]
    return np.random.SeedSequence(words)


def integer(purpose: Purpose, *integers: int) -> int:
    """A seed of 63 bits for the generators of torch.

    Args:
        purpose: What for.
        *integers: As of :func:`entropy`.

    Returns:
        The seed.
    """
    return int(entropy(purpose, *integers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's global streams, the latter on all devices, for an epoch of one rank.

    Args:
        seed: Of the run.
        epoch: From 0.
        rank: Of this process.
    """
    key = (Purpose.EVERYTHING, seed, epoch, rank)
    _seed_host(*key)
    torch.manual_seed(integer(*key))


def _seed_host(purpose: Purpose, *integers: int) -> None:
    """Seed Python's and numpy's global streams."""
    state = entropy(purpose, *integers).generate_state(8)
    random.seed(int.from_bytes(state.tobytes(), "little"))
    np.random.seed(state)


@contextmanager
def streams(purpose: Purpose, *integers: int, device: torch.device | None = None) -> Iterator[None]:
    """The global streams seeded by a tuple of integers, and afterwards as they were.

    timm's and torchvision's transforms draw from the global streams.  In the main process these belong to the training
    (dropout), which must not depend on where images are prepared.

    Args:
        purpose: What for.
        *integers: As of :func:`entropy`.
        device: A device that is drawn on, beside the CPU.

    Yields:
        Nothing.
    """
    python, numpy = random.getstate(), np.random.get_state()
    saved = Streams.now([] if device is None else [torch.empty(0, device=device)])
    try:
        _seed_host(purpose, *integers)
        torch_seed = integer(purpose, *integers)
        torch.default_generator.manual_seed(torch_seed)  # of the CPU; torch.manual_seed seeds all devices
        for each in saved.cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(torch_seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        saved.restore()


class Batch(NamedTuple):
    """One batch that is to be prepared.

    Attributes:
        epoch: It belongs to.
        number: Of the batch in the epoch of this rank.
        indices: Of its images.
    """

    epoch: int
    number: int
    indices: list[int]


class TrainingOrder(Sampler[Batch]):
    """The batches of one rank: each epoch a permutation of its own, of which the last incomplete batch is left out.

    Args:
        samples: Number of images.
        batch_size: B, of this rank.
        seed: Of the run.
        ranks: This one of how many.
        repeats: How often an image is repeated (timm's repeated augmentation); 0: not at all.

    Raises:
        DataError: If there is not one whole batch.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, ranks: Ranks, repeats: float = 0) -> None:
        self.samples, self.batch_size, self.seed, self.ranks = samples, batch_size, seed, ranks
        self.epoch = 0
        self._repeated: Any = None
        if repeats:
            from timm.data.distributed_sampler import RepeatAugSampler

            # timm rounds down to 256 images, and its older releases did so where there are fewer, too.
            rounding = 256 if samples >= 256 else 0
            self._repeated = RepeatAugSampler(
                range(samples), ranks.world, ranks.rank, num_repeats=repeats, selected_round=rounding
            )
            self._batches = len(self._repeated) // batch_size
        else:
            self._batches = samples // (batch_size * ranks.world)
        if self._batches == 0:
            joint = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
            raise DataError(
                f"{samples:,} training images are less than one batch of {batch_size:,}{joint}, and incomplete batches "
                f"are left out; take --batch-size {max(1, samples // ranks.world)} or less, or more images"
            )

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch.

        Args:
            epoch: From 0.
        """
        self.epoch = epoch

    def indices(self) -> Tensor:
        """The images of this rank in the current epoch, in order, whole batches only."""
        if self._repeated is not None:
            # timm's sampler seeds itself by this number alone, and so it has to hold the run's seed too.
            self._repeated.set_epoch(integer(Purpose.ORDER, self.seed, self.epoch))
            mine = torch.tensor(list(self._repeated))
        else:
            generator = torch.Generator().manual_seed(integer(Purpose.ORDER, self.seed, self.epoch))
            mine = torch.randperm(self.samples, generator=generator)[self.ranks.rank :: self.ranks.world]
        return mine[: self._batches * self.batch_size]

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        for number, indices in enumerate(self.indices().split(self.batch_size)):
            yield Batch(epoch, number, indices.tolist())


class EvaluationOrder(Sampler[Batch]):
    """All images in order; of several ranks each takes every world-th.

    All ranks have the same number of batches.  Where images do not divide evenly, the last ranks' last image is one
    from the beginning, which is to be left out of metrics.

    Args:
        samples: Number of images.
        batch_size: Of this rank.
        ranks: This one of how many.

    Attributes:
        real: How many images of this rank are its own: all but the padding at the end.
    """

    def __init__(self, samples: int, batch_size: int, ranks: Ranks) -> None:
        self.samples, self.batch_size, self.ranks = samples, batch_size, ranks
        self.real = len(range(ranks.rank, samples, ranks.world))

    def indices(self) -> Tensor:
        """The images of this rank, in order, padding at the end."""
        padded = math.ceil(self.samples / self.ranks.world) * self.ranks.world
        return torch.arange(self.ranks.rank, padded, self.ranks.world) % self.samples

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.samples / self.ranks.world) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for number, indices in enumerate(self.indices().split(self.batch_size)):
            yield Batch(0, number, indices.tolist())
