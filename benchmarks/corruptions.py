r"""What a trained network withstands: noise on its weights, few bits per weight, corrupted images.

Noise on weights is in units of each tensor's own size, so that it does not depend on how the network happens to be
scaled between its layers; T_p = ‖W_p‖ below, d_p entries in W_p:

    gaussian      W_p + σ T_p z / √d_p ,  z ~ N(0, I)                                   mean over draws
    adversarial   W_p + ε_p of largest loss with  Σ_p ‖ε_p‖² / T_p² ≤ r² , five projected steps of the ascent in T
    bits          W_p rounded to 2^b − 1 levels, symmetric about 0, from −max|W_p| to max|W_p|
    image noise   x + σ z ,  z ~ N(0, I), images as the network sees them (MNIST in [−1, 1]; CIFAR-10 of variance 1)
    erased        a square of the given share of the side of every image set to its mean, channel by channel

The adversary climbs the loss of 500 of the images that it is judged by, with their right labels.  Its ball is the one
that layer-wise ASAM trains in.  Vectors (biases, normalisers) are perturbed by noise like all others and stay as they
are when weights are rounded, as is usual; statistics of BatchNorm stay those of the training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problems import Data, Images

SIZES: dict[str, tuple[float, ...]] = {
    "gaussian": (0.1, 0.2, 0.4, 0.8),
    "adversarial": (0.0025, 0.005, 0.01, 0.02),
    "bits": (8, 4, 3, 2),
    "image noise": (0.25, 0.5, 1.0),
    "erased": (0.25, 0.5),
}
#: Test images that are looked at, drawn once for all networks, those of them that the adversary sees, its steps, draws
#: of random weights.
TEST, ATTACKED, STEPS, DRAWS = 2_000, 500, 5, 3


def withstood(model: nn.Module, data: Data, accuracy: Callable[..., float]) -> dict[str, dict[str, float]]:
    """Test accuracy under every corruption.

    Args:
        model: A trained network; its weights are the same afterwards.
        data: What it was trained and is tested on.
        accuracy: Of a model, on images and labels.

    Returns:
        Corruption → size → accuracy; size 0, the same images without corruption, under ``"none"``.
    """
    draw = torch.Generator().manual_seed(0)
    # At random: CIFAR-10's files are in the order of their classes, and the first ones would be of two of them.
    shown = torch.randperm(len(data.test[0]), generator=draw)[:TEST].to(data.test[1].device)
    x, y = data.test[0][shown], data.test[1][shown]
    found: dict[str, dict[str, float]] = {"none": {"0": accuracy(model, x, y)}}
    for name, sizes in SIZES.items():
        cells = found.setdefault(name, {})
        for size in sizes:
            if name in ("image noise", "erased"):
                images = noisy(x, size, draw) if name == "image noise" else erased(x, size, draw)
                cells[f"{size:g}"] = accuracy(model, images, y)
                continue
            draws = DRAWS if name == "gaussian" else 1
            total = 0.0
            for _ in range(draws):
                with moved(model, steps(model, name, size, (x[:ATTACKED], y[:ATTACKED]), draw)):
                    total += accuracy(model, x, y)
            cells[f"{size:g}"] = total / draws
    return found


@torch.no_grad()
def steps(model: nn.Module, name: str, size: float, seen: Images, draw: torch.Generator) -> list[Tensor]:
    """What is added to the weights.

    Args:
        model: The network.
        name: ``"gaussian"``, ``"adversarial"`` or ``"bits"``.
        size: σ, r or b.
        seen: What the adversary sees.
        draw: Random stream.

    Returns:
        One tensor per trainable parameter.
    """
    weights = trainable(model)
    if name == "gaussian":
        norms = [torch.linalg.vector_norm(w) for w in weights]
        drawn = [torch.randn(w.shape, generator=draw).to(w) for w in weights]
        return [size * t / w.numel() ** 0.5 * z for t, w, z in zip(norms, weights, drawn, strict=True)]
    if name == "adversarial":
        return worst(model, size, seen)
    # (A vector may have dimensions of size one, as the gains of a ResMLP.)
    return [rounded(w, int(size)) - w if sum(n > 1 for n in w.shape) > 1 else torch.zeros_like(w) for w in weights]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a training moves."""
    return [p for p in model.parameters() if p.requires_grad]


def worst(model: nn.Module, radius: float, seen: Images) -> list[Tensor]:
    """ε that raises the loss most, as far as projected ascent finds it: ε ← Π(ε + (r/2) T² g / ‖T g‖).

    Args:
        model: The network.
        radius: r.
        seen: Images and labels of the loss, in evaluation mode.

    Returns:
        One tensor per trainable parameter, Σ ‖ε_p‖² / T_p² ≤ r².
    """
    with torch.no_grad():
        sizes = [torch.linalg.vector_norm(w) for w in trainable(model)]
        found = [torch.zeros_like(w) for w in trainable(model)]
    for _ in range(STEPS):
        with moved(model, found):
            slope = gradient(model, seen)
        with torch.no_grad():
            length = _length([t * g for t, g in zip(sizes, slope, strict=True)])
            if not (math.isfinite(length) and length > 0.0):
                break  # there is no way up, or no number to say where it is
            for e, t, g in zip(found, sizes, slope, strict=True):
                e.add_(t**2 * g, alpha=radius / 2 / length)
            # A parameter that is 0 has a ball of size 0 and has not been moved.
            outside = _length([e / t for e, t in zip(found, sizes, strict=True) if t > 0]) / radius
            for e in found:
                e.div_(max(1.0, outside))
    return found


def _length(tensors: list[Tensor]) -> float:
    """The norm of all of them together."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors))


def gradient(model: nn.Module, seen: Images) -> list[Tensor]:
    """The gradient of the loss in evaluation mode.

    Args:
        model: The network.
        seen: Images and labels.

    Returns:
        One tensor per trainable parameter.
    """
    model.eval()
    with torch.enable_grad():
        return list(torch.autograd.grad(F.cross_entropy(model(seen[0]), seen[1]), trainable(model)))


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A tensor at the nearest of 2^bits − 1 levels, symmetric about 0.

    Args:
        weight: The tensor.
        bits: At least 2.

    Returns:
        The rounded one.
    """
    step = weight.abs().max().clamp_min(1e-30) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


@contextlib.contextmanager
def moved(model: nn.Module, by: list[Tensor]) -> Iterator[None]:
    """The network at other weights, and back, to the bit.

    Args:
        model: The network.
        by: What is added to each trainable parameter.

    Yields:
        Nothing.
    """
    parameters = trainable(model)
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, step in zip(parameters, by, strict=True):
            p.add_(step)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, saved, strict=True):
                p.copy_(value)


def noisy(x: Tensor, size: float, draw: torch.Generator) -> Tensor:
    """Images with noise.

    Args:
        x: Images.
        size: σ.
        draw: Random stream.

    Returns:
        Other images.
    """
    return x + size * torch.randn(x.shape, generator=draw).to(x)


def erased(x: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Images with a square set to the image's mean.

    Args:
        x: Images ``[N, C, H, W]``.
        share: Of the side of the image.
        draw: Random stream, for where.

    Returns:
        Other images.
    """
    side = max(1, round(share * x.shape[-1]))
    place = torch.randint(x.shape[-1] - side + 1, (len(x), 2), generator=draw)
    rows = torch.arange(x.shape[-2])[None, :, None] - place[:, 0, None, None]
    columns = torch.arange(x.shape[-1])[None, None, :] - place[:, 1, None, None]
    inside = ((rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)).to(x.device)
    return torch.where(inside[:, None], x.mean((2, 3), keepdim=True), x)
