"""The networks and the images that the tables are about.

Time and memory do not depend on the images, so those are random.  Errors do depend on them and on the weights: there
the images are MNIST's, and the network has been trained for a few hundred steps, since at its initialisation the
probabilities are all alike and the curvature is not that of a network in use.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ms_optim import models

MNIST = Path("MNIST/raw")


@dataclass(frozen=True)
class Network:
    """A network of the tables, and a tiny stand-in of its kind.

    Attributes:
        build: Number of classes → the network.
        shape: Of one image.
        batch: The number of images.
        tiny: Number of classes → the stand-in.
        tiny_shape: Of its images.
    """

    build: Callable[[int], nn.Module]
    shape: tuple[int, int, int]
    batch: int
    tiny: Callable[[int], nn.Module]
    tiny_shape: tuple[int, int, int]


def _vit(classes: int, **sizes: Any) -> nn.Module:
    """timm's vit_tiny_patch16_224 for 32×32 images in patches of 4×4."""
    import timm

    shape = {"img_size": 32, "patch_size": 4, **sizes}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **shape)
    return model


def _resnet50(classes: int) -> nn.Module:
    """timm's resnet50."""
    import timm

    model: nn.Module = timm.create_model("resnet50", num_classes=classes)
    return model


def _ten(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """A network that has ten classes and no other number."""

    def checked(classes: int) -> nn.Module:
        if classes != 10:
            raise ValueError(f"classes must be 10 for {build.__name__}, got {classes}; mlp and resnet8 take any number")
        return build()

    return checked


def _mlp(classes: int) -> nn.Module:
    """The MLP of :func:`ms_optim.models.mlp` with any number of logits."""
    return models.MLP((784, 512, 128, 512, classes))


def _tiny_mlp(classes: int) -> nn.Module:
    return models.MLP((64, 8, classes))


def _tiny_cnn(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, classes))


def _tiny_resnet(classes: int) -> nn.Module:
    return models.small_resnet(channels=4, in_channels=3, num_classes=classes)


def _tiny_timm_resnet(classes: int) -> nn.Module:
    """timm's ResNet, a block of a few channels in each stage."""
    from timm.models.resnet import BasicBlock, ResNet

    model: nn.Module = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=classes, channels=(4, 8, 8, 8))
    return model


def _tiny_vit(classes: int) -> nn.Module:
    return _vit(classes, img_size=8, embed_dim=8, depth=1, num_heads=2)


_GREY, _SMALL, _COLOUR, _TINY = (1, 28, 28), (1, 8, 8), (3, 32, 32), (3, 8, 8)

NETWORKS: dict[str, Network] = {
    "mlp": Network(_mlp, _GREY, 256, _tiny_mlp, _SMALL),
    "lenet": Network(_ten(models.lenet), _GREY, 256, _tiny_cnn, _SMALL),
    "small_cnn": Network(_ten(models.small_cnn), _GREY, 256, _tiny_cnn, _SMALL),
    "small_fcnn": Network(_ten(models.small_fcnn), _GREY, 256, _tiny_mlp, _SMALL),
    "resnet18": Network(models.resnet18, _COLOUR, 32, _tiny_timm_resnet, _COLOUR),
    "vit_tiny": Network(_vit, _COLOUR, 32, _tiny_vit, _TINY),
    "resnet8": Network(functools.partial(models.cifar_resnet, 8), _COLOUR, 64, _tiny_resnet, _TINY),
    "resnet50": Network(_resnet50, (3, 64, 64), 16, _tiny_timm_resnet, _COLOUR),
}

Problem = tuple[nn.Module, Tensor, Tensor]


def problem(name: str, full: bool, device: str = "cpu", classes: int = 10, batch: int | None = None) -> Problem:
    """A network in evaluation mode at its initialisation, with random images and labels.

    Args:
        name: Of :data:`NETWORKS`.
        full: The network itself, or its stand-in with three images.
        device: Where to put all.
        classes: K.
        batch: The number of images of the network itself; by default its own.

    Returns:
        Model, images ``[N, C, H, W]``, labels ``[N]``.
    """
    network = NETWORKS[name]
    torch.manual_seed(0)
    build, shape = (network.build, network.shape) if full else (network.tiny, network.tiny_shape)
    model = build(classes).to(device).eval()
    count = (batch or network.batch) if full else 3
    x, y = torch.randn(count, *shape), torch.randint(0, classes, (count,))
    return model, x.to(device), y.to(device)


def mnist(full: bool, part: str = "train") -> tuple[Tensor, Tensor]:
    """MNIST's images, scaled to [−1, 1] as in the experiments of arXiv 2106.12612.

    Args:
        full: The images, or random ones, 8×8, for a trial without data.
        part: ``"train"``, or ``"t10k"`` for the test images.

    Returns:
        Images ``[60000, 1, 28, 28]``, or 10,000 of them, and labels.

    Raises:
        FileNotFoundError: If ``MS_OPTIM_DATA`` does not name a folder with ``MNIST/raw/*-ubyte``.
    """
    if not full:
        draw = torch.Generator().manual_seed(0)
        return torch.randn(64, *_SMALL, generator=draw), torch.randint(0, 10, (64,), generator=draw)
    folder = os.environ.get("MS_OPTIM_DATA")
    if not folder or not (Path(folder) / MNIST / f"{part}-images-idx3-ubyte").is_file():
        raise FileNotFoundError(
            f"MS_OPTIM_DATA={folder} must name a folder with {MNIST}/{part}-images-idx3-ubyte; "
            "--scale smoke does without"
        )

    def read(name: str, header: int) -> Tensor:
        # bytearray: torch warns about memory that cannot be written
        return torch.frombuffer(bytearray((Path(folder) / MNIST / name).read_bytes()), dtype=torch.uint8)[header:]

    images = read(f"{part}-images-idx3-ubyte", 16).reshape(-1, *_GREY)
    return images.float() / 127.5 - 1, read(f"{part}-labels-idx1-ubyte", 8).long()


def trained(name: str, full: bool, device: str = "cpu", steps: int = 300) -> Problem:
    """A network after a few hundred steps of SGD on MNIST, with images and labels it has not been trained on.

    Batches of 128, learning rate 0.05, momentum 0.9.

    Args:
        name: Of :data:`NETWORKS`; one for 28×28 images.
        full: The network itself, or its stand-in, hardly trained, on random images.
        device: Where to put all.
        steps: The number of steps.

    Returns:
        Model in evaluation mode, images ``[N, 1, 28, 28]``, labels ``[N]``.
    """
    model, x, _ = problem(name, full, device)
    images, labels = (part.to(device) for part in mnist(full))
    count = len(x)
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=draw)
    mine, rest = order[:count], order[count:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps if full else 3):
        chosen = rest[torch.randint(0, len(rest), (128,), generator=draw)].to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model, images[mine.to(device)], labels[mine.to(device)]
