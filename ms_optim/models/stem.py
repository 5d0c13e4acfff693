"""The stem for small images: what takes the place of a stride of 2 and a pooling that 32×32 images are too small for.

timm's ResNets, and what is built like them, begin with ``conv1`` (7×7 of stride 2, or three 3×3 of which the first has
stride 2, a "deep" stem) and ``maxpool``; four times smaller images reach their stages.  Here ``conv1`` is a 3×3
convolution of stride 1, or a deep stem without its stride, and ``maxpool`` is nothing.  All else (projection shortcuts,
zero-initialised last γ of each block, in-place ReLUs) stays timm's.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .residual import convolution

Network = TypeVar("Network", bound=nn.Module)


def small_stem(model: Network) -> Network:
    """Give a ResNet of timm the stem for small images, in place.

    The 3×3 convolution that takes the place of the 7×7 one is drawn anew, also in a pretrained network; the weights of
    a deep stem stay, as those of a stem that is small already.

    Args:
        model: A network with ``conv1``, a convolution or a sequence that begins with one, and ``maxpool``.

    Returns:
        The same network.

    Raises:
        ValueError: If it has no such stem.
    """
    conv: Any = getattr(model, "conv1", None)
    first = conv[0] if isinstance(conv, nn.Sequential) and len(conv) else conv
    if not isinstance(first, nn.Conv2d) or not isinstance(getattr(model, "maxpool", None), nn.Module):
        found = ", ".join(name for name, _ in model.named_children()) or "nothing"
        raise ValueError(
            f"{type(model).__name__} has no stem of conv1 and maxpool, as timm's ResNets have, that could be made one "
            f"for small images; it consists of {found}. Take it as it is, or one that ms_optim.models makes for them"
        )
    if first is not conv:
        first.stride = (1, 1)
    elif max(first.stride) > 1:
        small = convolution(first.in_channels, first.out_channels, 3)
        model.conv1 = small.to(first.weight)
    model.maxpool = nn.Identity()
    return model


def resnet18(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """ResNet-18 of timm with the stem for 32×32 images: 11,173,962 parameters.

    Args:
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Returns:
        The network, for inputs ``[N, in_chans, 32, 32]``.
    """
    import timm  # here, so that importing ms_optim does not import it

    model: nn.Module = timm.create_model("resnet18", num_classes=num_classes, in_chans=in_chans)
    return small_stem(model)
