"""Sources: images by their index, as PIL images, from timm's readers, from torchvision, or from bytes in memory."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .images import Integers


class TimmSource:
    """Images of timm's readers: folders, tars, Hugging Face.

    timm's data set takes the next image where one cannot be read; here that is an error, as its label is another's.

    Args:
        dataset: timm's ``ImageDataset``.
        name: In words.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.name, self._reader, self._process = name, dataset.reader, os.getpid()
        weakref.finalize(self, _close_tars, self._reader)

    def read(self, index: int, mode: str) -> Any:
        """One image."""
        from PIL import Image

        if self._process != os.getpid():  # a worker's own position in a tar
            self.close()
            self._process = os.getpid()
        try:
            file = self._reader[index][0]
            with file:
                return Image.open(file).convert(mode)
        except OSError as error:
            where = self._reader.filename(index)
            raise DataError(
                f"image {index} of {self.name}, {where}, cannot be read: {error}; mend or remove it"
            ) from error

    def pixels(self, indices: Integers, mode: str) -> Tensor | None:
        """They have to be decoded."""
        return None

    def close(self) -> None:
        """Close tars."""
        _close_tars(self._reader)


def _close_tars(reader: Any) -> None:
    """Close the files that timm's tar reader keeps open; it opens them again when it needs them."""
    states = getattr(reader, "tar_state", {})  # of one tar, or of several by their names
    pending = list(states.values()) if isinstance(states, dict) else [states]
    while pending:
        state = pending.pop()
        pending += state.children.values()
        if state.tf is not None:
            state.tf.close()
            state.tf = None


class TorchSource:
    """Images of a data set of torchvision's.

    Args:
        dataset: The data set, without transforms.
        name: In words.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.name, self._dataset = name, dataset

    def read(self, index: int, mode: str) -> Any:
        """One image."""
        return self._dataset[index][0].convert(mode)

    def pixels(self, indices: Integers, mode: str) -> Tensor | None:
        """MNIST's and CIFAR's are bytes already."""
        data = torch.as_tensor(getattr(self._dataset, "data", ()))
        own = {3: "L", 4: "RGB"}.get(data.ndim)  # [N, H, W] and [N, H, W, 3]
        if own != mode or data.dtype != torch.uint8:
            return None
        chosen = data[torch.from_numpy(indices)]
        return chosen.unsqueeze(1) if own == "L" else chosen.permute(0, 3, 1, 2).contiguous()

    def close(self) -> None:
        """It keeps none open."""


class PixelSource:
    """Images that are bytes in memory.

    Args:
        pixels: ``[N, C, H, W]``.
        mode: Of PIL, that the channels stand for.
        name: In words.
    """

    def __init__(self, pixels: Tensor, mode: str, name: str) -> None:
        self.name, self._pixels, self._mode = name, pixels, mode

    def read(self, index: int, mode: str) -> Any:
        """One image."""
        from PIL import Image

        pixels = self._pixels[index].permute(1, 2, 0).contiguous().numpy()
        image = Image.fromarray(pixels[:, :, 0] if self._mode == "L" else pixels)
        return image if image.mode == mode else image.convert(mode)

    def pixels(self, indices: Integers, mode: str) -> Tensor | None:
        """The bytes themselves."""
        return self._pixels[torch.from_numpy(indices)] if mode == self._mode else None

    def close(self) -> None:
        """It keeps none open."""
