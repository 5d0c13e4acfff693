"""Loaders: a run's batches on the device, from memory where its data set fits, else from workers by timm's parts."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..errors import CommandLineError
from .augmentation import Normalisation
from .datasets import Opened, Stream, open_data
from .images import Images, stratified
from .in_memory import BUDGET, DoesNotFit, MemoryEvaluation, MemoryTraining, decode, in_memory
from .order import EvaluationOrder, OneOfMany, Purpose, Ranks, TrainingOrder, integer
from .pipeline import (
    Format,
    device_augmentation,
    evaluation_transform,
    mixes_in,
    mixing,
    training_transform,
    why_not_on_device,
)
from .streaming import StreamBatches, StreamEvaluation, for_evaluation, training_batches
from .workers import HostBatches, OnDevice, WorkerEvaluation, WorkerTraining


class Training(Protocol):
    """Training batches ``(x, y)`` on the device, x normalised; whole batches only.

    Attributes:
        mixes: Whether mixup and cutmix are done already, and ``y`` is a distribution over classes; else they are left
            to the loop.
    """

    mixes: bool

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, before it is iterated."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class Evaluation(Protocol):
    """Batches ``(x, y)`` in order; all ranks have equally many."""

    @property
    def real(self) -> int:
        """How many of this rank's images are not padding; they come first (a stream: of those yielded so far)."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        train: Training batches.
        validation: What chooses the best checkpoint, or ``None``.
        test: What is scored beside, or ``None``.
        description: What, how many, from where, and how.
        first: n -> the images of :meth:`sample`.
    """

    train: Training
    validation: Evaluation | None
    test: Evaluation | None
    description: str
    first: Callable[[int], tuple[Tensor, Tensor]]

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Training images without augmentation, always the same ones.

        Args:
            n: How many; all if there are fewer.

        Returns:
            Inputs ``[n, C, H, W]`` and labels ``[n]``, on the device.
        """
        return self.first(n)


@dataclass(frozen=True)
class _Plan:
    """What all loaders of a run share."""

    options: argparse.Namespace
    form: Format
    num_classes: int
    device: torch.device
    ranks: Ranks

    def __post_init__(self) -> None:
        options = self.options
        for name in ("batch_size", "validation_batch_size"):
            size = getattr(options, name)
            if size is not None and size < 1:
                raise CommandLineError(f"--{name.replace('_', '-')} must be at least 1, got {size}")
        if options.cutout < 0:
            raise CommandLineError(f"--cutout is the side of a square, got {options.cutout}; 0 cuts nothing out")
        if options.worker_seeding != "all":
            raise CommandLineError(
                f"--worker-seeding {options.worker_seeding}: here each batch is seeded by seed, epoch, rank, number; "
                "leave it out"
            )
        if options.in_memory not in ("auto", "yes", "no"):
            raise CommandLineError(f"--in-memory must be auto, yes or no, got {options.in_memory}")

    @property
    def evaluation_size(self) -> int:
        return self.options.validation_batch_size or self.options.batch_size

    @property
    def normalise(self) -> Normalisation:
        return Normalisation(self.form.mean, self.form.std, self.device)

    def data_loader(self, dataset: Any, sampler: Any, persistent: bool) -> Any:
        """Of whole batches."""
        options = self.options
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=options.workers,
            pin_memory=options.pin_mem and self.device.type != "cpu",
            persistent_workers=persistent and options.workers > 0,
            # Of the workers' seeds; without it each pass would draw from the training's stream.
            generator=torch.Generator().manual_seed(integer(Purpose.HOST, options.seed, self.ranks.rank)),
        )

    def collate(self) -> tuple[Any, bool]:
        """What makes a batch, and whether it mixes."""
        if self.options.no_prefetcher:
            return default_collate, False
        timm_data: Any = import_module("timm.data")
        arguments = mixing(self.options, self.num_classes)
        return (_fast_collate(), False) if arguments is None else (timm_data.FastCollateMixup(**arguments), True)

    def training(self, images: Images | Stream) -> Training:
        """Prepared by workers."""
        options, ranks = self.options, self.ranks
        prefetcher = not options.no_prefetcher
        transform = training_transform(options, self.form, prefetcher)
        collate, mixes = self.collate()
        augmentation = device_augmentation(options, ranks.rank, self.device, everything=False)
        when = partial(mixes_in, options)
        if isinstance(images, Stream):
            if options.aug_repeats:
                raise CommandLineError(
                    f"--aug-repeats {options.aug_repeats} repeats images by their places, and {images.name} is read in "
                    "one direction; leave it out"
                )
            images.dataset.set_loader_cfg(num_workers=max(1, options.workers))
            dataset: Any = StreamBatches(
                images, transform, collate, options.batch_size, self.num_classes, options.seed, ranks.rank, when
            )
            order, sampler, length = dataset, None, training_batches(images, options.batch_size)
        else:
            order = sampler = self.training_order(images)
            dataset = HostBatches(images.transformed(transform), collate, options.seed, ranks.rank, when)
            length = len(order)
        loader = self.data_loader(dataset, sampler, persistent=True)
        return WorkerTraining(
            OnDevice(loader, self.form, self.device, augmentation, prefetcher), order, length, mixes, augmentation
        )

    def training_order(self, images: Images) -> TrainingOrder:
        options = self.options
        return TrainingOrder(len(images), options.batch_size, options.seed, self.ranks, options.aug_repeats)

    def evaluation(self, images: Images | Stream, persistent: bool) -> Evaluation:
        """Prepared by workers."""
        transform, size = evaluation_transform(self.form), self.evaluation_size
        if isinstance(images, Stream):
            for_evaluation(images, self.ranks).dataset.set_loader_cfg(num_workers=max(1, self.options.workers))
            batches = StreamBatches(
                images, transform, _fast_collate(), size, self.num_classes, 0, self.ranks.rank, None
            )
            loader = self.data_loader(batches, None, persistent)
            on_device = OnDevice(loader, self.form, self.device, None, prefetcher=True)
            estimate = math.ceil(len(images.dataset) / size)
            return StreamEvaluation(on_device, estimate, self.ranks, self.form.input_size, self.device)
        order = EvaluationOrder(len(images), size, self.ranks)
        loader = self.data_loader(HostBatches(images.transformed(transform), _fast_collate()), order, persistent)
        return WorkerEvaluation(OnDevice(loader, self.form, self.device, None, prefetcher=True), order)

    def sample(self, images: Images | Stream, n: int) -> tuple[Tensor, Tensor]:
        """The first images of a stream, or a stratified choice."""
        transform = evaluation_transform(self.form)
        if isinstance(images, Stream):
            reader = images.dataset.reader
            reader.dist_rank, reader.dist_num_replicas = 0, 1  # the same images on all ranks
            rows = [(transform(image), label) for (image, label), _ in zip(images.dataset, range(n), strict=False)]
        else:
            places = stratified(images.labels, min(n, len(images)), Purpose.SAMPLE, self.options.split_seed)
            chosen = images.chosen(places).transformed(transform)
            rows = [chosen[place] for place in range(len(chosen))]
            images.source.close()
        x, y = _fast_collate()(rows)
        return self.normalise(x.to(self.device)), y.to(self.device)


def _fast_collate() -> Any:
    return import_module("timm.data.loader").fast_collate


def load(
    options: argparse.Namespace,
    *,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    crop_pct: float | None,
    num_classes: int,
    device: torch.device,
    ranks: OneOfMany,
) -> Data:
    """Open a run's data.

    Args:
        options: The command line, after :func:`ms_optim.train.preset.fill`; the splits are filled in here.
        input_size: Channels, height and width of the model's images.
        mean: Per channel, or one for all.
        std: Per channel, or one for all.
        interpolation: With which images are resized where they are evaluated.
        crop_pct: Share of the resized image's sides that is kept where it is evaluated; ``None``: timm's 0.875.
        num_classes: Of the model.
        device: Where batches are to be.
        ranks: This process, of how many.

    Returns:
        Training, validation and test batches.

    Raises:
        CommandLineError: If options contradict each other or do not fit the data.
        DataError: If the data are not there, or do not fit the model.
    """
    channels = input_size[0]
    per_channel = {}
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise CommandLineError(
                f"images of {channels} channels need a {name} for each or for all, got {list(values)}: pass --{name}"
            )
        per_channel[name] = tuple(values) * channels if len(values) == 1 else tuple(values)
    size = (int(channels), int(input_size[1]), int(input_size[2]))
    form = Format(size, **per_channel, interpolation=interpolation, crop_pct=crop_pct or 0.875)
    plan = _Plan(options, form, num_classes, device, Ranks(ranks.rank, ranks.world))
    opened = _open_in_turn(plan)
    if isinstance(opened.train, Stream):
        if options.in_memory == "yes":
            raise CommandLineError(f"--in-memory yes: {opened.train.name} is read in one direction; take auto or no")
        return _from_workers(plan, opened, f"{options.workers} workers")
    if options.in_memory == "no":
        return _from_workers(plan, opened, f"{options.workers} workers")
    try:
        return _from_memory(plan, opened)
    except DoesNotFit as reason:
        if options.in_memory == "yes":
            raise CommandLineError(f"--in-memory yes: {reason}; take auto or no") from reason
        return _from_workers(plan, opened, f"{options.workers} workers (not in memory: {reason})")


def _open_in_turn(plan: _Plan) -> Opened:
    """If the data set is to be fetched, one rank does it and the others wait."""
    arguments = (plan.options, plan.form.input_size[0], plan.num_classes)
    if not (plan.options.dataset_download and plan.ranks.world > 1 and dist.is_initialized()):
        return open_data(*arguments)
    first = open_data(*arguments) if plan.ranks.rank == 0 else None
    dist.barrier()
    return open_data(*arguments) if first is None else first


def _from_workers(plan: _Plan, opened: Opened, how: str) -> Data:
    """All from the ordinary loader."""
    glance = opened.train if opened.glance is None else opened.glance
    return Data(
        plan.training(opened.train),
        None if opened.validation is None else plan.evaluation(opened.validation, persistent=True),
        None if opened.test is None else plan.evaluation(opened.test, persistent=False),
        f"{opened.description}; {list(plan.form.input_size)}, {how}",
        partial(plan.sample, glance),
    )


def _from_memory(plan: _Plan, opened: Opened) -> Data:
    """Decoded once, and on the device where batches can do all that is asked for."""
    budget, kept = BUDGET, {}
    for name in ("train", "validation", "test"):
        images = getattr(opened, name)
        if images is not None:
            pixels = decode(images, plan.form.input_size, budget)
            budget -= pixels.numel()
            kept[name] = (in_memory(images, pixels), pixels)
    changes: dict[str, Any] = {name: images for name, (images, _) in kept.items()}
    opened = dataclasses.replace(opened, **changes)
    used = f"decoded in memory ({(BUDGET - budget) / 2**20:,.0f} MiB)"
    host = why_not_on_device(plan.options)
    whole = plan.form.keeps_whole_images()
    if host is not None and not whole:
        return _from_workers(plan, opened, f"{used}, {plan.options.workers} workers")
    if host is None:
        images, pixels = kept["train"]
        augmentation = device_augmentation(plan.options, plan.ranks.rank, plan.device, everything=True)
        order = plan.training_order(images)
        train: Training = MemoryTraining(pixels, images, plan.normalise, plan.device, order, augmentation)
        how = f"{used}, augmented on {plan.device}"
    else:
        train = plan.training(opened.train)
        how = f"{used}, augmented by {plan.options.workers} workers ({host})"

    def evaluation(name: str) -> Evaluation | None:
        if name not in kept:
            return None
        images, pixels = kept[name]
        if not whole:
            return plan.evaluation(images, persistent=name == "validation")
        order = EvaluationOrder(len(images), plan.evaluation_size, plan.ranks)
        return MemoryEvaluation(pixels, images, plan.normalise, plan.device, order)

    description = f"{opened.description}; {list(plan.form.input_size)}, {how}"
    return Data(train, evaluation("validation"), evaluation("test"), description, partial(plan.sample, opened.train))
