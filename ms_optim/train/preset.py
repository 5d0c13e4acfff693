"""Presets: what the images of a well-known data set are like, and what is usually done to them in training.

timm takes the size, mean and deviation of images from the model, and crops them as ImageNet's: a random part of 8 to
100 percent, resized.  For images of 32 × 32 pixels that is neither what models are made for nor what papers do: they
pad four pixels, crop at random and flip (He et al., arXiv 1512.03385, section 4.2).  A preset says so for a data set,
by its name.  What the user gives always wins.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ..errors import CommandLineError

PAD = "pad"  # the crop mode that timm has not: zeros around the image, and a part of its size back
_TIMM_HFLIP, _TIMM_COLOR_JITTER, _TIMM_SCALE = 0.5, 0.4, (0.08, 1.0)


@dataclass(frozen=True)
class Preset:
    """What a data set's images are like.

    Attributes:
        name: Of the data set.
        input_size: Channels, height, width.
        mean: Of the pixels of each channel, in units of the brightest.
        std: Their standard deviation.
        num_classes: Number of classes.
        crop_padding: Pixels of zeros around a training image before a part of its size is cropped at random.
        hflip: Probability that a training image is mirrored.
        description: In words.
    """

    name: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    crop_padding: int
    hflip: float
    description: str


def _gray(name: str, side: int, mean: float, std: float, description: str) -> Preset:
    """Signs: a mirrored one is another sign or none."""
    return Preset(name, (1, side, side), (mean,), (std,), 10, 0, 0.0, description)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "cifar10",
            (3, 32, 32),
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            10,
            4,
            0.5,
            "CIFAR-10, photographs of 10 kinds of things",
        ),
        Preset(
            "cifar100",
            (3, 32, 32),
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
            100,
            4,
            0.5,
            "CIFAR-100, photographs of 100 kinds of things",
        ),
        _gray("mnist", 28, 0.1307, 0.3081, "MNIST, handwritten digits"),
        _gray("fashion_mnist", 28, 0.2860, 0.3530, "Fashion-MNIST, articles of clothing"),
        _gray("kmnist", 28, 0.1918, 0.3483, "Kuzushiji-MNIST, handwritten hiragana"),
        _gray("qmnist", 28, 0.1307, 0.3081, "QMNIST, MNIST with its whole test set"),
        # Pixels 0 … 16, stored as fifteenfold bytes (ms_optim/train/datasets.py): of the training images 4.8709 and
        # 6.0101, times 15 / 255.
        _gray("digits", 8, 0.28652, 0.35353, "scikit-learn's handwritten digits"),
    )
}


def resolve(options: argparse.Namespace) -> Preset | None:
    """The preset that a command line asks for.

    Args:
        options: ``preset`` (``auto``: that of the data set's name; ``none``; or a name) and ``dataset``.

    Returns:
        The preset, or ``None``.

    Raises:
        CommandLineError: If there is none of that name.
    """
    asked = options.preset or "none"
    if asked == "none":
        return None
    if asked == "auto":
        prefix, slash, name = (options.dataset or "").partition("/")
        if not slash:
            return PRESETS.get(prefix) if prefix == "digits" else None
        # Data sets of other prefixes belong to whoever made them: `hfds/someone/cifar10` may hold anything.
        return PRESETS.get(name.lower()) if prefix.lower() == "torch" else None
    if asked not in PRESETS:
        raise CommandLineError(f"--preset {asked} is neither auto, none nor one of {', '.join(PRESETS)}")
    return PRESETS[asked]


def fill(options: argparse.Namespace) -> None:
    """Give values to the options that a preset, or else timm, decides, where the user gave none.

    These are ``num_classes``, ``input_size``, ``in_chans``, ``mean``, ``std``, ``crop_pct`` (a preset's images are
    evaluated whole), ``hflip``, ``color_jitter``, ``train_crop_mode`` (``pad``, where neither it nor ``scale`` is
    given), ``crop_padding`` and ``scale``.  A second call changes nothing.

    Args:
        options: The command line; changed.

    Raises:
        CommandLineError: If options contradict each other.
    """
    preset = resolve(options)
    _fill_crop(options, preset)
    if preset is None:
        _default(options, "hflip", _TIMM_HFLIP)
        _default(options, "color_jitter", _TIMM_COLOR_JITTER)
        return
    _default(options, "hflip", preset.hflip)
    _default(options, "color_jitter", 0.0)
    _default(options, "num_classes", preset.num_classes)
    _default(options, "crop_pct", 1.0)
    if options.input_size is None:
        channels, height, width = preset.input_size
        if options.img_size is not None:
            height = width = options.img_size
        options.input_size = [channels if options.in_chans is None else options.in_chans, height, width]
    channels = options.input_size[0]
    _default(options, "in_chans", channels)
    if options.in_chans != channels:
        raise CommandLineError(
            f"--in-chans {options.in_chans} and --input-size {' '.join(map(str, options.input_size))} do not agree; "
            "the latter begins with the channels, so leave the former out"
        )
    for name in ("mean", "std"):
        if getattr(options, name) is None:
            setattr(options, name, _per_channel(getattr(preset, name), channels, name, preset))


def _default(options: argparse.Namespace, name: str, value: object) -> None:
    if getattr(options, name) is None:
        setattr(options, name, value)


def _fill_crop(options: argparse.Namespace, preset: Preset | None) -> None:
    """Which part of a training image is taken: timm's ways and ours exclude each other."""
    padding, mode = options.crop_padding, options.train_crop_mode
    if padding is not None and padding < 0:
        raise CommandLineError(f"--crop-padding must be at least 0, got {padding}; 0 takes the whole image")
    if mode is None and options.scale is not None:
        mode = "rrc"  # timm's, whose part `scale` is
    elif mode is None and (preset is not None or padding):
        mode = PAD
    if mode == PAD:
        _default(options, "crop_padding", 0 if preset is None else preset.crop_padding)
        if options.scale is not None:
            raise CommandLineError(
                f"--scale {' '.join(map(str, options.scale))} is of timm's random resized crop, and --train-crop-mode "
                f"{PAD} crops without resizing; leave one of them out"
            )
        options.train_crop_mode = PAD
        return
    if padding:
        raise CommandLineError(
            f"--crop-padding {padding} and timm's random resized crop (--train-crop-mode, --scale) are two ways to "
            "crop an image; give one of them"
        )
    options.crop_padding = 0
    if options.scale is None:
        options.scale = list(_TIMM_SCALE)
    elif preset is not None:
        options.train_crop_mode = mode


def _per_channel(values: tuple[float, ...], channels: int, name: str, preset: Preset) -> list[float]:
    """One value per channel; a gray image in colours has the same in each."""
    if len(values) == channels:
        return list(values)
    if len(values) == 1:
        return list(values) * channels
    raise CommandLineError(
        f"the preset {preset.name} has {len(values)} channels, and images of {channels} are asked for; pass --{name}"
    )
