"""Images: some of the images of a split, each with its label: all, those held out, those left, or a random choice.

Choices are stratified: every class has its share of them, to the nearest image.  They follow from ``--split-seed``
alone, so runs that differ by their seed train, validate and test on the same images.

Label noise redraws a share of the labels of the training split uniformly over the classes, before anything is held out:
whether and how an image is relabelled depends on its place in the split only, not on what else is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import CommandLineError, DataError
from .order import Purpose, entropy

Integers = npt.NDArray[np.int64]


class Source(Protocol):
    """Where images come from, each by its index."""

    @property
    def name(self) -> str:
        """The data set and the split, in words."""

    def read(self, index: int, mode: str) -> Any:
        """One image, as a PIL image of a mode."""

    def pixels(self, indices: Integers, mode: str) -> Tensor | None:
        """Bytes ``[N, C, H, W]`` of many images where they are at hand as such, else ``None``."""

    def close(self) -> None:
        """Close files that this process has opened to read images, so that no forked worker shares them."""


@dataclass(frozen=True)
class Images(Dataset[tuple[Any, int]]):
    """Images of one source, with labels.

    Attributes:
        source: Where they come from.
        indices: ``[N]``, their places in the source.
        labels: ``[N]``, from 0.
        mode: Of PIL, into which they are converted: L, RGB, …
        transform: What is done to each; ``None``: nothing.
    """

    source: Source
    indices: Integers
    labels: Integers
    mode: str
    transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        """One image, transformed, and its label."""
        image = self.source.read(int(self.indices[place]), self.mode)
        return image if self.transform is None else self.transform(image), int(self.labels[place])

    def chosen(self, places: Integers) -> Images:
        """Some of these.

        Args:
            places: Which.

        Returns:
            The images.
        """
        return replace(self, indices=self.indices[places], labels=self.labels[places])

    def transformed(self, transform: Callable[[Any], Any] | None) -> Images:
        """The same with another transform.

        Args:
            transform: What is done to each image.

        Returns:
            The images.
        """
        return replace(self, transform=transform)


def stratified(labels: Integers, count: int, purpose: Purpose, seed: int) -> Integers:
    """Choose images so that every class has its share of them.

    Each class has the whole part of its share; what is left goes to those that lost most (largest remainders).

    Args:
        labels: ``[N]``.
        count: How many.
        purpose: What for: choices for different purposes are independent.
        seed: Of the choice.

    Returns:
        ``[count]``, their places, ascending.
    """
    random = np.random.default_rng(entropy(purpose, seed))
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, random within
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    share = sizes * (count / len(labels))
    whole = np.floor(share).astype(np.int64)
    whole[np.argsort(whole - share, kind="stable")[: count - whole.sum()]] += 1
    return np.sort(np.concatenate([order[a : a + n] for a, n in zip(first, whole, strict=True)]).astype(np.int64))


def held_out(labels: Integers, holdout: float, seed: int) -> tuple[Integers, Integers]:
    """Split a training split.

    Args:
        labels: ``[N]``, without noise.
        holdout: Share (< 1) or number (>= 1) of the images that are held out.
        seed: Of the split.

    Returns:
        Places of those left, and of those held out.

    Raises:
        DataError: If there is none of the one or of the other.
    """
    count = round(holdout * len(labels)) if holdout < 1 else int(holdout)
    if not 0 < count < len(labels):
        raise DataError(
            f"--holdout {holdout} of {len(labels):,} training images is {count:,}, and both parts need one; give a "
            "share between 0 and 1, or 0 for no validation"
        )
    out = stratified(labels, count, Purpose.HELD_OUT, seed)
    return np.setdiff1d(np.arange(len(labels)), out), out


def some(images: Images, count: int | None, option: str, seed: int) -> Images:
    """A stratified choice of a number of images.

    Args:
        images: Of these.
        count: How many; ``None``: all.
        option: Which asks for it, for messages.
        seed: Of the choice.

    Returns:
        The images.

    Raises:
        CommandLineError: If there are not so many.
    """
    if count is None:
        return images
    if not 0 < count <= len(images):
        raise CommandLineError(
            f"{option} {count:,} must be between 1 and the {len(images):,} images of {images.source.name}"
        )
    return images.chosen(stratified(images.labels, count, Purpose.CHOICE, seed))


def with_label_noise(labels: Integers, share: float, classes: int, seed: int) -> Integers:
    """Redraw a share of labels uniformly (of which one in ``classes`` stays right by chance).

    Args:
        labels: ``[N]``.
        share: Probability of each to be redrawn.
        classes: Number of classes.
        seed: Of the noise.

    Returns:
        ``[N]``.

    Raises:
        CommandLineError: If the share is none.
    """
    if not 0 <= share <= 1:
        raise CommandLineError(f"--label-noise must be a share between 0 and 1, got {share}")
    random = np.random.default_rng(entropy(Purpose.LABEL_NOISE, seed))
    # Both are drawn for all, so that more noise is the same noise and more.
    chance, drawn = random.random(len(labels)), random.integers(classes, size=len(labels))
    return np.where(chance < share, drawn, labels).astype(np.int64)


def to_bytes(image: Any) -> Tensor:
    """The pixels of a PIL image.

    Args:
        image: The image.

    Returns:
        Bytes ``[C, H, W]``.
    """
    pixels = np.array(image, dtype=np.uint8)  # a copy: PIL's own memory is read-only
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)
