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


def _resnet50(classes: int) -> nn.Module:
    """timm's resnet50."""
    import timm

    model: nn.Module = timm.create_model("resnet50", num_classes=classes)
    return model


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
    """timm's, of one block, with four tokens."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    model: nn.Module = VisionTransformer(num_classes=classes, **sizes)
    return model


_GREY, _SMALL, _COLOUR, _TINY = (1, 28, 28), (1, 8, 8), (3, 32, 32), (3, 8, 8)

NETWORKS: dict[str, Network] = {
    "mlp": Network(models.mlp, _GREY, 256, _tiny_mlp, _SMALL),
    "lenet": Network(models.lenet, _GREY, 256, _tiny_cnn, _SMALL),
    "small_cnn": Network(models.small_cnn, _GREY, 256, _tiny_cnn, _SMALL),
    "small_fcnn": Network(models.small_fcnn, _GREY, 256, _tiny_mlp, _SMALL),
    "resnet18": Network(models.resnet18, _COLOUR, 32, _tiny_timm_resnet, _COLOUR),
    "vit_tiny": Network(models.vit_tiny, _COLOUR, 32, _tiny_vit, _TINY),
    "resnet8": Network(functools.partial(models.cifar_resnet, 8), _COLOUR, 64, _tiny_resnet, _TINY),
    "resnet50": Network(_resnet50, (3, 64, 64), 16, _tiny_timm_resnet, _COLOUR),
    "resnet50_224": Network(_resnet50, (3, 224, 224), 16, _tiny_timm_resnet, _COLOUR),
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
