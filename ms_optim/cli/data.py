"""Data: batches of what the model is measured on, which every measure can read from the beginning.

    digits                  scikit-learn's handwritten digits, as the demo has them: [N, 1, 8, 8]
    random                  N(0, 1), for models without data: structure can be read off, no sharpness that was learnt
    a folder                images in a folder per class
    torch/cifar10, hfds/…   timm's data sets
    module:function         the user's own: batches, tensors or a Dataset

Images are prepared as timm evaluates: resized, cropped and normalised to the model's own configuration, without
augmentation, so that every measure sees the same numbers.  Of a data set a random part is taken where not all of it is:
folders are sorted by class.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..batch import Batch, peek
from ..curvature.evaluation import evaluation
from ..errors import CommandLineError, MsOptimError
from .models import LoadedModel, pair
from .named_object import call, is_named_object

_OTHERS = "digits, random, a folder of images, a data set of timm (torch/cifar10, …), or module:function"


@dataclass(frozen=True)
class Data:
    """Batches on the model's device and in its type; to be read as often as one likes.

    Attributes:
        source: Where they come from: an iterable that begins anew each time.
        description: What they are, in words.
        model: What they are for.
        samples: No more than these; ``None``: all.
    """

    source: Iterable[Any]
    description: str
    model: LoadedModel
    samples: int | None = None

    def __iter__(self) -> Iterator[Any]:
        """The batches, the last one cut where there would be too many samples."""
        left = self.samples
        for example in self.source:
            # One argument to everything in it: inputs and targets are moved, and cut, alike.
            batch = Batch((example,)).to(self.model.device)
            if left is not None:
                count = batch.samples
                if count is None:
                    raise CommandLineError("--samples cannot cut batches whose tensors differ in their first axis")
                batch = batch if count <= left else batch.rows(slice(0, left))
                left -= min(left, count)
            yield _in_type(batch.args[0], self.model.dtype)
            if left == 0:
                return

    def __len__(self) -> int:
        """The number of batches, for progress bars.

        Raises:
            TypeError: If it is not known.
        """
        if self.samples is not None:
            raise TypeError("how many batches make up so many samples is not known before")
        return len(self.source)  # type: ignore[arg-type]  # which raises the TypeError

    def example(self) -> Any:
        """The first batch.

        Raises:
            DataError: If there is none.
        """
        batch, _ = peek(self, self.model.module)
        return batch

    def labelled(self) -> bool:
        """Whether the first batch has targets."""
        first = next(iter(self), None)
        return isinstance(first, (tuple, list)) and len(first) == 2 and first[1] is not None

    def logits(self) -> Tensor:
        """The model's logits on the first batch.

        Raises:
            CommandLineError: If the model cannot be called with it.
        """
        return logits_on(self.model.module, self.example(), self.description)

    def __str__(self) -> str:
        return self.description


def logits_on(model: nn.Module, batch: Batch, description: str) -> Tensor:
    """A model's logits in evaluation mode.

    Args:
        model: The model.
        batch: The batch.
        description: Of the data, for messages.

    Returns:
        The logits, outside of any graph.

    Raises:
        CommandLineError: If the model cannot be called with it.
    """
    try:
        with evaluation(model), torch.no_grad():
            return batch.logits(model)
    except MsOptimError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in batch.tensors)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CommandLineError(
            f"{type(model).__name__} cannot be called with a batch of {shapes} ({description}): {text}; check --data, "
            "--input-size and --model-kwargs"
        ) from error


def add_data_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options that name data.

    Args:
        parser: Of a command.
        default: What is read if nothing is said; ``None``: something has to be.
    """
    group = parser.add_argument_group("the data")
    told = f" (default: {default})" if default else ""
    group.add_argument("--data", required=default is None, default=default, metavar="DATA", help=_OTHERS + told)
    group.add_argument("--data-dir", metavar="FOLDER", help="where timm's data sets lie")
    group.add_argument("--download", action="store_true", help="let timm fetch the data set into --data-dir")
    group.add_argument("--split", default="train", metavar="NAME", help="train, validation, … (default: train)")
    group.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: 128)")
    group.add_argument("--samples", type=int, metavar="N", help="take no more than N, at random (default: all)")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    group.add_argument(
        "--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="of images (default: as timm's model has it)"
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X", help="of pixels, one or per channel (default: same)"
        )
    group.add_argument(
        "--crop-pct", type=float, metavar="X", help="of the resized image that is kept; 1 keeps all (default: same)"
    )
    group.add_argument(
        "--data-kwargs", type=pair, nargs="+", default=[], metavar="KEY=VALUE", help="arguments of module:function"
    )


def load_data(options: argparse.Namespace, model: LoadedModel) -> Data:
    """Open the data; the model is called once, to know that they fit.

    Args:
        options: As of :func:`add_data_arguments`.
        model: What is to be measured.

    Returns:
        The data.

    Raises:
        CommandLineError: If they are not there, cannot be read, or do not fit the model.
    """
    for name in ("batch_size", "samples"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise CommandLineError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    name = options.data
    if name == "random":
        data = _random(options, model)
    elif name == "digits":
        data = _digits(options, model)
    elif Path(name).is_dir() or (":" not in name and "/" in name):
        data = _images(options, model)
    elif is_named_object(name):
        data = _named(options, model)
    else:
        raise CommandLineError(f"--data {name} is neither of: {_OTHERS}")
    data.logits()
    return data


def _random(options: argparse.Namespace, model: LoadedModel) -> Data:
    """Inputs and labels that mean nothing."""
    shape = _configuration(options, model)["input_size"]
    count = options.samples or options.batch_size
    generator = torch.Generator().manual_seed(options.seed)
    inputs = torch.randn(count, *shape, generator=generator, dtype=model.dtype)
    description = f"random, {count:,} samples of N(0, 1) {list(shape)} and random labels: not what was trained on"
    logits = logits_on(model.module, Batch((inputs[:1].to(model.device),)), description)
    labels = torch.randint(max(1, logits.shape[-1]), (count,), generator=generator)
    return Data(_batches(inputs, labels, options.batch_size), description, model)


def _digits(options: argparse.Namespace, model: LoadedModel) -> Data:
    """The handwritten digits of the demo, split as its first seed splits them."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise CommandLineError("--data digits needs scikit-learn: pip install 'ms_optim[cli]'") from error
    from ..demo.training import digits

    if options.split not in ("train", "validation"):
        raise CommandLineError(f"--split {options.split} is not one of the digits': train, validation")
    both = digits(seed=0)
    inputs, labels = (both.x, both.y) if options.split == "train" else (both.x_test, both.y_test)
    inputs, labels = inputs[: options.samples].to(model.dtype), labels[: options.samples]
    description = f"digits, {options.split}, {len(labels):,} samples"
    return Data(_batches(inputs, labels, options.batch_size), description, model)


def _named(options: argparse.Namespace, model: LoadedModel) -> Data:
    """What the user's own function returns."""
    name = options.data
    found = call(name, "--data", **dict(options.data_kwargs))
    if isinstance(found, Dataset):
        return _of_dataset(found, name, options, model)
    if isinstance(found, Tensor):
        return Data(found.split(options.batch_size), name, model, options.samples)
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        return Data(_batches(*found, options.batch_size), name, model, options.samples)
    if isinstance(found, Iterator):  # it can be read once, and measures read it again and again
        found = list(found if options.samples is None else itertools.islice(found, options.samples))
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, Mapping, tuple)):
        raise CommandLineError(
            f"--data {name} returned a {type(found).__name__}; return batches (a DataLoader, a list), a Dataset, "
            "inputs, or the tuple (inputs, targets)"
        )
    return Data(found, name, model, options.samples)


def _images(options: argparse.Namespace, model: LoadedModel) -> Data:
    """A folder of images, or one of timm's data sets."""
    timm_data: Any = import_module("timm.data")
    name, folder = options.data, Path(options.data).is_dir()
    if not folder and options.data_dir is None:
        raise CommandLineError(f"--data {name} is no folder; if it is a data set of timm, say where with --data-dir")
    configuration = _configuration(options, model)
    channels = configuration["input_size"][0]
    for key in ("mean", "std"):
        if len(configuration[key]) != channels:
            raise CommandLineError(
                f"images of {channels} channels need a {key} for each or one for all: pass --{key}, got "
                f"{list(configuration[key])} from the model's configuration"
            )
    transform = _Prepared("L" if channels == 1 else "RGB", timm_data.create_transform(**configuration))
    try:
        dataset = timm_data.create_dataset(
            "" if folder else name,
            root=name if folder else options.data_dir,
            split=options.split,
            download=options.download,
            batch_size=options.batch_size,
            transform=transform,
        )
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CommandLineError(f"timm cannot open --data {name} ({options.split}): {text}") from error
    description = f"{name}, {options.split}, {list(configuration['input_size'])}"
    return _of_dataset(dataset, description, options, model)


@dataclass(frozen=True)
class _Prepared:
    """An image as the model takes it: in the colours that it has channels for, then as timm transforms it."""

    mode: str
    transform: Any

    def __call__(self, image: Any) -> Any:
        """Prepare one."""
        return self.transform(image.convert(self.mode))


def _of_dataset(
    dataset: Dataset[Any], description: str, options: argparse.Namespace, model: LoadedModel
) -> Data:
    """Batches of a data set in its order, or of a random part of it."""
    limit = options.samples
    if not isinstance(dataset, IterableDataset):
        count = len(dataset)  # type: ignore[arg-type]
        if limit is not None and limit < count:
            chosen = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))[:limit]
            dataset = Subset(dataset, chosen.sort().values.tolist())
            description += f", {limit:,} samples of {count:,}"
        else:
            description += f", {count:,} samples"
        limit = None
    loader = DataLoader(dataset, options.batch_size, num_workers=options.workers)
    return Data(loader, description, model, limit)


def _configuration(options: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """How timm prepares images for the model: size, mean, deviation, interpolation, crop."""
    if options.input_size is None and not getattr(model.module, "pretrained_cfg", None):
        raise CommandLineError(
            f"--model {model.name} does not say how large its images are, as timm's models do; pass --input-size C H W"
        )
    timm_data: Any = import_module("timm.data")
    configuration: dict[str, Any] = timm_data.resolve_data_config(
        {"input_size": options.input_size}, model=model.module
    )
    channels = configuration["input_size"][0]
    for name in ("mean", "std"):
        given = getattr(options, name)
        if given is not None:
            configuration[name] = tuple(given) * channels if len(given) == 1 else tuple(given)
    if options.crop_pct is not None:
        configuration["crop_pct"] = options.crop_pct
    return configuration


def _batches(inputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Tensors in parts."""
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def _in_type(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another type, in whatever containers a batch is made of."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _in_type(each, dtype) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        make = getattr(type(value), "_make", type(value))
        return make([_in_type(each, dtype) for each in value])
    return value
