"""Pipeline: what is done to one image on the host before it is in a batch, and how a batch is mixed.

Both are timm's; ours are two steps among them, random crop of a padded image and cutout.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ..errors import CommandLineError
from .augmentation import DeviceAugmentation, RandomCrop, RandomCutout
from .preset import PAD


@dataclass(frozen=True)
class Format:
    """What images are made into.

    Attributes:
        input_size: Channels, height, width.
        mean: Per channel.
        std: Per channel.
        interpolation: With which images are resized.
        crop_pct: Share of the resized image's sides that is kept when a model is evaluated.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def keeps_whole_images(self) -> bool:
        """Whether an image of this size is evaluated as it is, without being resized."""
        # timm resizes to floor(side / crop_pct) before it crops.
        return all(math.floor(side / self.crop_pct) == side for side in self.input_size[1:])


def training_transform(options: argparse.Namespace, form: Format, prefetcher: bool) -> Callable[[Any], Any]:
    """timm's training transform with our steps in their places.

    Args:
        options: The command line.
        form: What images are made into.
        prefetcher: Whether it ends with bytes, which are normalised, erased and cut in batches on the device.

    Returns:
        PIL image -> tensor ``[C, H, W]``.
    """
    create: Any = import_module("timm.data").create_transform
    crop = options.train_crop_mode
    transform = create(
        form.input_size,
        is_training=True,
        no_aug=options.no_aug,
        train_crop_mode=None if crop == PAD else crop,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter or None,
        color_jitter_prob=options.color_jitter_prob,
        grayscale_prob=options.grayscale_prob or 0.0,
        gaussian_blur_prob=options.gaussian_blur_prob or 0.0,
        auto_augment=options.aa or None,
        interpolation=(not options.no_aug and options.train_interpolation) or form.interpolation,
        mean=form.mean,
        std=form.std,
        re_prob=0.0 if prefetcher else options.reprob,
        re_mode=options.remode,
        re_count=options.recount,
        re_num_splits=2 if options.resplit else 0,
        use_prefetcher=prefetcher,
    )
    if options.no_aug:
        return transform
    steps = list(transform.transforms)
    if crop == PAD:
        # The first step is timm's random resized crop; before ours the image is brought to its size, as evaluated.
        whole = create(form.input_size, interpolation=form.interpolation, crop_pct=1.0, use_prefetcher=True)
        steps[:1] = [*whole.transforms[:-1], *([RandomCrop(options.crop_padding)] if options.crop_padding else [])]
    if options.cutout and not prefetcher:
        steps.append(RandomCutout(options.cutout))
    return type(transform)(steps)


def evaluation_transform(form: Format) -> Callable[[Any], Any]:
    """timm's evaluation transform, which ends with bytes.

    Args:
        form: What images are made into.

    Returns:
        PIL image -> bytes ``[C, H, W]``.
    """
    create: Any = import_module("timm.data").create_transform
    return create(form.input_size, interpolation=form.interpolation, crop_pct=form.crop_pct, use_prefetcher=True)


def why_not_on_device(options: argparse.Namespace) -> str | None:
    """What of a training image's augmentation batches on the device have no step for.

    Args:
        options: The command line.

    Returns:
        In words; ``None``: nothing.
    """
    if options.no_aug:
        return None
    asked = {
        "random resized crop": options.train_crop_mode != PAD,
        f"--aa {options.aa}": options.aa,
        "colour jitter": options.color_jitter,
        "--grayscale-prob": options.grayscale_prob,
        "--gaussian-blur-prob": options.gaussian_blur_prob,
    }
    return ", ".join(name for name, value in asked.items() if value) or None


def device_augmentation(
    options: argparse.Namespace, rank: int, device: torch.device, everything: bool
) -> DeviceAugmentation:
    """What is done to training batches on the device.

    Args:
        options: The command line.
        rank: Of this process.
        device: Where batches are.
        everything: Crop and mirror as well as erase and cut; else the host has cropped and mirrored.

    Returns:
        The augmentation, which may be none.
    """
    if options.no_aug:
        return DeviceAugmentation(options.seed, rank, device)
    erasing = None
    if options.reprob > 0:
        from timm.data.random_erasing import RandomErasing

        erasing = RandomErasing(
            options.reprob,
            mode=options.remode,
            max_count=options.recount,
            num_splits=2 if options.resplit else 0,
            device=device,
        )
    first = {"padding": options.crop_padding, "hflip": options.hflip, "vflip": options.vflip} if everything else {}
    return DeviceAugmentation(options.seed, rank, device, **first, cutout=options.cutout, erasing=erasing)


def mixing(options: argparse.Namespace, num_classes: int) -> dict[str, Any] | None:
    """The arguments of timm's ``Mixup`` and ``FastCollateMixup``.

    Args:
        options: The command line.
        num_classes: Of the model.

    Returns:
        The arguments; ``None``: nothing is mixed.

    Raises:
        CommandLineError: If batches cannot be mixed.
    """
    if not (options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None):
        return None
    if options.batch_size % 2:
        raise CommandLineError(
            f"mixup and cutmix mix pairs of images, and --batch-size {options.batch_size} is odd; take an even one"
        )
    return {
        "mixup_alpha": options.mixup,
        "cutmix_alpha": options.cutmix,
        "cutmix_minmax": options.cutmix_minmax,
        "prob": options.mixup_prob,
        "switch_prob": options.mixup_switch_prob,
        "mode": options.mixup_mode,
        "label_smoothing": options.smoothing,
        "num_classes": num_classes,
    }


def mixes_in(options: argparse.Namespace, epoch: int) -> bool:
    """Whether batches of an epoch are mixed, if any are.

    Args:
        options: The command line.
        epoch: From 0.

    Returns:
        Whether.
    """
    return not options.mixup_off_epoch or epoch < options.mixup_off_epoch
