"""Data sets: a training, a validation and a test set, opened by timm, or the reason why not and what to do about it.

    ''                  folders or tars in --data-dir: train/CLASS/IMAGE, train.tar, or CLASS/IMAGE
    digits              scikit-learn's handwritten digits, 8 x 8
    torch/cifar10, …    torchvision's
    hfds/…              of Hugging Face, with random access
    hfids/, wds/, tfds/ that are read in one direction: streams of Hugging Face, WebDataset, TensorFlow

Which split is which: :mod:`ms_optim.train.splits`; which images are held out: :mod:`ms_optim.train.images`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CommandLineError, DataError
from . import splits
from .images import Images, Integers, Source, held_out, some, with_label_noise
from .sources import PixelSource, TimmSource, TorchSource

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Stream:
    """Images that are read in one direction.

    Attributes:
        dataset: timm's.
        name: In words.
    """

    dataset: Any
    name: str


@dataclass(frozen=True)
class Opened:
    """The three sets of a run.

    Attributes:
        train: What is trained on.
        validation: What chooses the best checkpoint, or ``None``.
        test: What is scored beside, or ``None``.
        glance: A stream of training images in order, for measurements; ``None`` where ``train`` can be read anywhere.
        description: In words.
    """

    train: Images | Stream
    validation: Images | Stream | None
    test: Images | Stream | None
    glance: Stream | None
    description: str


def open_data(options: argparse.Namespace, channels: int, num_classes: int) -> Opened:
    """Open a run's training, validation and test set.

    Args:
        options: The command line; ``holdout``, ``val_split`` and ``test_split`` are filled in.
        channels: Of the model's images.
        num_classes: Of the model.

    Returns:
        The three.

    Raises:
        CommandLineError: If the options do not fit the data set.
        DataError: If it is not there, or does not fit the model.
    """
    splits.fill(options)
    sort, name = splits.kind(options)
    _check_options(options, sort, name)
    mode = _mode(options, channels)
    if sort in splits.ITERABLE:
        return _open_streams(options, mode)
    if options.epoch_repeats:
        raise CommandLineError(
            f"--epoch-repeats {options.epoch_repeats} is for data sets read in one direction; take more --epochs"
        )
    everything, classes = _images(options, options.train_split, mode, num_classes)
    noisy = with_label_noise(everything.labels, options.label_noise or 0.0, num_classes, options.split_seed)
    relabelled = Images(everything.source, everything.indices, noisy, mode)
    train, validation, words = relabelled, None, []
    if options.holdout:
        left, out = held_out(everything.labels, options.holdout, options.split_seed)
        train, validation = relabelled.chosen(left), relabelled.chosen(out)
        validation = some(validation, options.val_num_samples, "--val-num-samples", options.split_seed)
        words.append(f"{len(validation):,} held out for validation")
    elif options.val_split:
        validation, _ = _images(options, options.val_split, mode, num_classes, classes)
        validation = some(validation, options.val_num_samples, "--val-num-samples", options.split_seed)
        words.append(f"{len(validation):,} for validation ({options.val_split})")
    train = some(train, options.train_num_samples, "--train-num-samples", options.split_seed)
    test = None
    if options.test_split:
        test, _ = _images(options, options.test_split, mode, num_classes, classes)
        words.append(f"{len(test):,} for the test")
    if options.label_noise:
        changed = int((noisy != everything.labels).sum())
        words.append(f"labels redrawn with probability {options.label_noise:g} ({changed:,} changed)")
    where = "" if options.data_dir is None else f" in {options.data_dir}"
    title = (options.dataset or "images") + where
    description = ", ".join([f"{title}: {len(train):,} training images", *words])
    return Opened(train, validation, test, None, description)


def _mode(options: argparse.Namespace, channels: int) -> str:
    """The colours of PIL that the channels stand for."""
    from PIL import ImageMode

    mode: str | None = options.input_img_mode or _MODES.get(channels)
    try:
        bands = None if mode is None else len(ImageMode.getmode(mode).bands)
    except KeyError as error:
        raise CommandLineError(f"--input-img-mode {mode} is no mode of PIL; L is gray, RGB has colours") from error
    if mode is None or bands != channels:
        raise CommandLineError(
            f"images of {channels} channels need an --input-img-mode of as many, got {mode}; L has 1, RGB 3, RGBA 4"
        )
    return mode


def _images(
    options: argparse.Namespace, split: str, mode: str, num_classes: int, like: dict[str, int] | None = None
) -> tuple[Images, dict[str, int] | None]:
    """All images of a split, and the names of its classes, which have to be those of the training split."""
    sort, name = splits.kind(options)
    title = f"{options.dataset or options.data_dir} ({split})"
    classes: dict[str, int] | None = None
    if sort == "digits":
        source: Source
        source, labels = _digits(split, title)
    else:
        dataset = _open(options, split)
        if splits.is_folder(sort, name):
            dataset, classes = _same_classes(options, split, dataset, like)
        source = TorchSource(dataset, title) if sort == "torch" else TimmSource(dataset, title)
        labels = _labels(dataset, title)
    if len(labels) == 0:
        raise DataError(f"{title} has no images")
    if labels.min() < 0:
        raise DataError(
            f"{title} has images without a label ({int((labels < 0).sum()):,} of {len(labels):,}); leave the split out "
            "(--test-split ''), or name another"
        )
    if labels.max() >= num_classes:
        raise DataError(
            f"{title} has labels up to {labels.max()}, and the model has {num_classes} classes; pass --num-classes "
            f"{labels.max() + 1}"
        )
    return Images(source, np.arange(len(labels)), labels, mode), classes


def _digits(split: str, title: str) -> tuple[PixelSource, Integers]:
    """Split as the demo's first seed splits them, so that `ms-optim measure --data digits` sees the same images."""
    from sklearn.datasets import load_digits

    from ..demo.training import TRAINING_IMAGES

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    places = order[:TRAINING_IMAGES] if split in splits.TRAINING else order[TRAINING_IMAGES:]
    # 0 … 16 as bytes: 15 is the largest factor that fits.
    images = torch.from_numpy((15 * pixels[places]).astype(np.uint8)).view(-1, 1, 8, 8)
    return PixelSource(images, "L", title), labels[places].astype(np.int64)


def _labels(dataset: Any, title: str) -> Integers:
    """The labels of all images, none of which is decoded."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    reader = getattr(dataset, "reader", None)
    if reader is None:  # torchvision's
        labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else [label for label, _ in dataset.index])
        labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST's further columns say who wrote it
    elif isinstance(reader, ReaderImageFolder):
        labels = np.asarray([label for _, label in reader.samples])
    elif isinstance(reader, ReaderImageInTar):
        labels = np.asarray(reader.targets)
    elif reader.remap_class:
        labels = np.asarray([reader.class_to_idx[label] for label in reader.dataset[reader.label_key]])
    else:
        labels = np.asarray(list(reader.dataset[reader.label_key]))
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{title} has labels such as {labels[0]!r}, not numbers of classes; map them with --class-map FILE"
        )
    return labels.astype(np.int64)


def _same_classes(
    options: argparse.Namespace, split: str, dataset: Any, like: dict[str, int] | None
) -> tuple[Any, dict[str, int]]:
    """A folder's classes are numbered by those that are in it; another split's numbers have to mean the same."""
    reader = getattr(dataset, "reader", dataset)
    found: dict[str, int] = reader.class_name_to_idx if hasattr(reader, "class_name_to_idx") else reader.class_to_idx
    if like is None or found == like:
        return dataset, found
    new = sorted(set(found) - set(like))
    if new or reader is dataset:
        raise DataError(
            f"the classes of {split} in {options.data_dir} are not those of {options.train_split}: "
            + (
                f"{', '.join(new[:5])} are new"
                if new
                else f"{', '.join(sorted(set(like) - set(found))[:5])} are missing"
            )
        )
    return _open(options, split, class_map=like), like


def _open(options: argparse.Namespace, split: str, **further: Any) -> Any:
    """timm's data set, or why not."""
    timm_data: Any = import_module("timm.data")
    sort, name = splits.kind(options)
    folder = splits.is_folder(sort, name)
    root = options.data_dir
    if folder:
        root = Path(root)
        root = str(splits.locate(root, split) or root) if root.is_dir() else str(root)
    arguments: dict[str, Any] = {"input_key": options.input_key, "target_key": options.target_key}
    if options.dataset_trust_remote_code:
        arguments["trust_remote_code"] = True
    try:
        return timm_data.create_dataset(
            options.dataset or "",
            root=root,
            split=split,
            search_split=False,
            **{
                "class_map": options.class_map or None,
                "download": options.dataset_download and sort != "hfds",
                **arguments,
                **further,
            },
        )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = "" if root is None else f" in {root}"
        raise DataError(
            f"{options.dataset or 'images'} ({split}) cannot be opened{where}: {reason}; {_next_move(sort, name, root)}"
        ) from error


def _check_options(options: argparse.Namespace, sort: str, name: str) -> None:
    """Refuse what would have no effect."""
    if options.dataset_download and (
        sort in ("folder", "wds") or (sort == "torch" and name in ("imagenet", *splits.FOLDERS))
    ):
        raise CommandLineError(
            f"--dataset-download cannot fetch {options.dataset or 'a folder of images'}: "
            + _next_move(sort, name, options.data_dir)
        )
    if options.class_map and sort in ("torch", "digits"):
        raise CommandLineError(
            f"--class-map is not read for {options.dataset}, whose classes have numbers; leave it out"
        )


def _next_move(sort: str, name: str, root: Any) -> str:
    """What to do when a data set is not there."""
    if sort == "torch" and name == "imagenet":
        return (
            f"put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of "
            f"https://image-net.org, which asks for a registration, into {root}"
        )
    if sort == "torch" and name not in splits.FOLDERS:
        return "fetch it with --dataset-download, or give the folder that holds it with --data-dir"
    if sort in ("hfds", "hfids"):
        return "Hugging Face fetches it when it is first used, into --data-dir if that is given; check name and network"
    if sort == "wds":
        return (
            f"shards are expected as {root}/NAME-train-0000.tar, …, and {root}/_info.json to name the splits, or "
            "--train-split 'NAME-train-{0000..0099}.tar|SAMPLES'"
        )
    if sort == "tfds":
        return "fetch it with --dataset-download"
    return f"{root} should hold images as CLASS/IMAGE, in folders or in a tar"


def _open_streams(options: argparse.Namespace, mode: str) -> Opened:
    """Data sets that are read in one direction, where nothing can be held out, chosen or relabelled."""
    if options.label_noise:
        raise CommandLineError(
            f"--label-noise {options.label_noise} relabels images by their place, and {options.dataset} is read in one "
            "direction; leave it out"
        )

    def stream(split: str, count: int | None, training: bool = False) -> Stream:
        further: dict[str, Any] = {"num_samples": count, "input_img_mode": mode}
        if training:
            further |= {"is_training": True, "seed": options.seed, "repeats": options.epoch_repeats}
        size = options.batch_size if training else options.validation_batch_size or options.batch_size
        dataset = _open(options, split, batch_size=size, **further)
        return Stream(dataset, f"{options.dataset} ({split})")

    train = stream(options.train_split, options.train_num_samples, training=True)
    glance = stream(options.train_split, options.train_num_samples)
    validation = stream(options.val_split, options.val_num_samples) if options.val_split else None
    test = stream(options.test_split, None) if options.test_split else None
    where = "" if options.data_dir is None else f" in {options.data_dir}"
    description = f"{options.dataset}{where}, read in one direction: {train.name}"
    return Opened(train, validation, test, glance, description)
