"""What optimizers are compared on: few images, noisy labels, and a network of each kind.

Development rows may be looked at as often as one likes; the judging rows are for a comparison with everything frozen.
A seed draws the images, the noise, the held-out part, the weights and the order of the batches, the same for every
optimizer.  Labels are noisy in what is trained on and in what is held out to choose by, never in the test images, which
are the whole test set.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ms_optim import models

from . import networks

HELD_OUT = 5_000
Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A row of the tables.

    Attributes:
        data: ``"mnist"``; ``"cifar10"``, at 16×16; ``"cifar10-32"``, as it is.
        images: How many of the training images there are, the held-out ones not counted; ``None``: all others.
        noise: The share of labels that is redrawn (a tenth of them stays right by chance).
        build: Makes the network for ten classes.
        epochs: How long is trained.
        batch: Images per step.
        judging: Whether nothing was chosen by looking at it.
    """

    data: str
    images: int | None
    noise: float
    build: Callable[[], nn.Module]
    epochs: int
    batch: int = 64
    judging: bool = False

    @property
    def size(self) -> dict[str, Any]:
        """What a training on it depends on, to be kept among its settings."""
        return {
            **{"data": self.data, "images": self.images, "noise": self.noise, "network": self.build.__name__},
            **{"epochs": self.epochs, "batch": self.batch},
        }


def small_vgg() -> nn.Sequential:
    """A network of stacked 3×3 convolutions without normalisation, after arXiv 1409.1556, for 16×16 images."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 96, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(96 * 2 * 2, 96), nn.ReLU(), nn.Linear(96, 10)),
    )
    # Channels last: the same function, and on a CPU a step takes a quarter to a third less time, most of it pooling.
    return model.to(memory_format=torch.channels_last)


def small_resmlp() -> nn.Module:
    """ResMLP of arXiv 2105.03404 for 16×16 images: patches of 4×4, embedding 64, depth 3."""
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    model: nn.Module = MlpMixer(
        10, img_size=16, patch_size=4, num_blocks=3, embed_dim=64, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine
    )
    return model


def small_resnet() -> nn.Module:
    """The package's small ResNet with BatchNorm, for colour images."""
    return models.small_resnet(in_channels=3)


def resnet18() -> nn.Module:
    """The package's ResNet-18 for 32×32 images."""
    return models.resnet18()


PROBLEMS: dict[str, Problem] = {
    "MNIST 2,000, 20 % noise, MLP": Problem("mnist", 2_000, 0.2, models.mlp, 30),
    "MNIST 2,000, 20 % noise, LeNet": Problem("mnist", 2_000, 0.2, models.lenet, 12),
    "MNIST 10,000, 60 % noise, MLP": Problem("mnist", 10_000, 0.6, models.mlp, 12, 128, judging=True),
    "CIFAR-10 2,000, BatchNorm ResNet": Problem("cifar10", 2_000, 0.0, small_resnet, 15, judging=True),
    "CIFAR-10 2,000, ResMLP": Problem("cifar10", 2_000, 0.0, small_resmlp, 15, judging=True),
    "CIFAR-10 2,000, VGG": Problem("cifar10", 2_000, 0.0, small_vgg, 20, judging=True),
}

#: On a GPU: all of CIFAR-10, as it is, 200 epochs without augmentation.
PAPER: dict[str, Problem] = {
    "CIFAR-10, ResNet-18": Problem("cifar10-32", None, 0.0, resnet18, 200, 128, judging=True),
}


def problem_of(name: str, scale: str) -> Problem:
    """A row at a scale.

    Args:
        name: Of :data:`PROBLEMS` or :data:`PAPER`.
        scale: ``"smoke"`` is a row of its own: random images of 8×8 and the smallest network of the kind.

    Returns:
        The problem.
    """
    problem = {**PROBLEMS, **PAPER}[name]
    return tiny(problem) if scale == "smoke" else problem


def tiny(problem: Problem) -> Problem:
    """A row of the same kind at the scale ``"smoke"``.

    Args:
        problem: The row.

    Returns:
        The row on few random images of 8×8, with the smallest network of the kind.
    """
    convolutional = problem.build in (small_resnet, resnet18, small_resmlp)
    build = _smoke_resnet if convolutional else _smoke_mlp
    return replace(problem, data="random", images=40, build=build, epochs=2, batch=16)


def _smoke_mlp() -> nn.Module:
    return models.MLP((64, 8, 10))


def _smoke_resnet() -> nn.Module:
    return models.small_resnet(channels=4)


@dataclass(frozen=True)
class Data:
    """Images ``[n, C, H, W]`` and labels: to train on, held out, and the test set."""

    train: Images
    held_out: Images
    test: Images


def drawn(problem: Problem, seed: int) -> Data:
    """What a seed trains on.

    Args:
        problem: The row.
        seed: Draws images, noise and the held-out part.

    Returns:
        The data.
    """
    (x, y), test = images_of(problem.data, "train"), images_of(problem.data, "test")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draw)
    y = y.clone()
    noisy = torch.rand(len(y), generator=draw) < problem.noise
    y[noisy] = torch.randint(10, (int(noisy.sum()),), generator=draw)
    split = min(HELD_OUT, len(x) // 4)
    held, rest = order[:split], order[split:][: problem.images]
    return Data((x[rest], y[rest]), (x[held], y[held]), test)


@functools.lru_cache(maxsize=4)
def images_of(data: str, part: str) -> Images:
    """A part of a data set, read once per process.

    Args:
        data: As of :class:`Problem`, or ``"random"``.
        part: ``"train"`` or ``"test"``.

    Returns:
        Images and labels.

    Raises:
        FileNotFoundError: If ``MS_OPTIM_DATA`` does not name a folder with the data.
    """
    if data in ("mnist", "random"):
        return networks.mnist(data == "mnist", "train" if part == "train" else "t10k")
    return _cifar10(part, 16 if data == "cifar10" else 32)


def _cifar10(part: str, side: int) -> Images:
    """CIFAR-10 from ``cifar10/{train,test}.tar``, folders of JPEG files by class.

    Args:
        part: ``"train"`` or ``"test"``.
        side: 32, or 16: means of 2×2 pixels.

    Returns:
        Images ``[N, 3, side, side]``, scaled to mean 0 and variance 1 of each channel of the training set, and labels.
    """
    from PIL import Image

    path = Path(os.environ.get("MS_OPTIM_DATA", "")) / "cifar10" / f"{part}.tar"
    if not path.is_file():
        raise FileNotFoundError(
            f"MS_OPTIM_DATA={os.environ.get('MS_OPTIM_DATA')} must name a folder with cifar10/{part}.tar, folders of "
            "images by class; --scale smoke does without"
        )
    pixels, folders = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                with Image.open(io.BytesIO(file.read())) as image:
                    pixels.append(np.asarray(image.convert("RGB")))
                folders.append(member.name.split("/")[-2])
    classes = sorted(set(folders))
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    x = (x - mean[:, None, None]) / std[:, None, None]
    if side == 16:
        x = torch.nn.functional.avg_pool2d(x, 2)
    return x.contiguous(), torch.tensor([classes.index(folder) for folder in folders])
