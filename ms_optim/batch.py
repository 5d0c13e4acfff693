"""A batch: one call of the model, and the logits it returns.

Everything in the package that takes ``data`` reads it here, so that all of it accepts the same things.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .errors import DataError


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Any, model: nn.Module) -> Batch:
        """Read one batch: a tensor, a dictionary, or ``(inputs, targets)``, whose targets are dropped.

        A dictionary becomes keyword arguments where the model's ``forward`` takes its keys, else one argument.

        Args:
            example: The batch. Inputs that are themselves a tuple or list are positional arguments.
            model: The model that will be called; only the signature of its ``forward`` is read.

        Returns:
            The batch.

        Raises:
            DataError: If the example is none of these.
        """
        if isinstance(example, Batch):
            return example
        if isinstance(example, (tuple, list)):
            if not example:
                raise DataError(f"a batch is an empty {type(example).__name__}; pass inputs or (inputs, targets)")
            example = example[0]
            if isinstance(example, (tuple, list)):
                return cls(args=tuple(example))
        if isinstance(example, Mapping):
            inputs = {str(key): value for key, value in example.items()}
            try:
                inspect.signature(model.forward).bind(**inputs)
            except TypeError:
                return cls(args=(dict(example),))
            return cls(kwargs=inputs)
        if isinstance(example, Tensor):
            return cls(args=(example,))
        raise DataError(
            f"a batch is a {type(example).__name__}; pass a tensor, a dictionary, or (inputs, targets)"
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order, in containers however deep."""

        def inside(value: Any) -> list[Tensor]:
            if isinstance(value, Tensor):
                return [value]
            parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
            return [tensor for part in parts for tensor in inside(part)]

        return inside((*self.args, *self.kwargs.values()))

    @property
    def samples(self) -> int | None:
        """The length of the first axis that all tensors share; ``None`` if they do not."""
        lengths = {tensor.shape[0] if tensor.ndim else -1 for tensor in self.tensors}
        return lengths.pop() if len(lengths) == 1 and -1 not in lengths else None

    def rows(self, part: slice) -> Batch:
        """Some of the samples, where all tensors share their first axis.

        Args:
            part: Which.

        Returns:
            A batch of views.
        """
        return self._map(lambda tensor: tensor[part])

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device (the same object where nothing has to move)."""
        if all(tensor.device == device for tensor in self.tensors):
            return self
        return self._map(lambda tensor: tensor.to(device))

    def outside_inference(self) -> Batch:
        """The same batch with copies of tensors made in inference mode, which autograd cannot keep."""
        if not any(tensor.is_inference() for tensor in self.tensors):
            return self
        return self._map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor among the arguments replaced."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, Mapping):
                return {key: apply(v) for key, v in value.items()}
            if isinstance(value, (tuple, list)):
                make = getattr(type(value), "_make", type(value))  # named tuples have a constructor of their own
                return make([apply(v) for v in value])
            return value

        return Batch(tuple(apply(a) for a in self.args), {k: apply(v) for k, v in self.kwargs.items()})

    def check_finite(self, index: int | None = None) -> None:
        """Refuse inputs that are not finite.

        Args:
            index: The position of the batch in its iterable, for the message.

        Raises:
            DataError: If a floating-point tensor of the batch holds NaN or infinity.
        """
        for tensor in self.tensors:
            # One pass over the data: a sum is finite only if all terms are. (Finite ones may overflow: hence another.)
            if tensor.is_floating_point() and not math.isfinite(float(tensor.detach().sum())):
                bad = int((~torch.isfinite(tensor)).sum())
                if bad == 0:
                    continue
                where = "the batch" if index is None else f"batch {index}"
                raise DataError(
                    f"{where} holds {bad} non-finite values of {tensor.numel()} in an input of shape "
                    f"{tuple(tensor.shape)}; clean the data before measuring"
                )

    def logits(self, model: nn.Module) -> Tensor:
        """Call the model and return its logits; see :func:`logits_of`."""
        return logits_of(model(*self.args, **self.kwargs))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, an object or a dictionary with ``logits``.

    Args:
        output: What ``model(...)`` returned.

    Returns:
        The logits, of whatever shape the model gave them.

    Raises:
        DataError: If there is no single tensor to take.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise DataError(
        f"the model returned a {type(output).__name__} without a tensor `.logits`; wrap the model in a module that "
        "returns the logits alone"
    )


def class_logits(logits: Tensor) -> Tensor:
    """The logits, once they are known to be ``[N, K]`` with N ≥ 1, K ≥ 2.

    Args:
        logits: What the model returned.

    Returns:
        The same tensor.

    Raises:
        DataError: If the shape is another one.
    """
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise DataError(
            f"the model's logits have shape {tuple(logits.shape)}; the trace needs [N, K] with K >= 2 classes: "
            "flatten positions into samples, or wrap the model"
        )
    return logits


def batches(data: Any, model: nn.Module) -> Iterator[Batch]:
    """Read ``data`` as a stream of batches.

    Args:
        data: Inputs ``[N, ...]``, a dictionary or a bare tuple ``(inputs, targets)``: one batch. Any other iterable
            (a DataLoader, a list): a batch per element.
        model: The model that will be called.

    Yields:
        The batches, in order.

    Raises:
        DataError: If data is a Dataset (its elements are samples), one batch as a list (a DataLoader's element), not
            iterable, or empty.
    """
    if isinstance(data, Dataset):
        raise DataError(
            f"data is a Dataset ({type(data).__name__}), whose elements are samples, not batches; "
            "pass torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if isinstance(data, (Tensor, Batch, tuple, Mapping)):
        yield Batch.of(data, model)
        return
    if isinstance(data, list) and _looks_like_one_batch(data):
        raise DataError(
            f"data is a list of inputs {tuple(data[0].shape)} and integers {tuple(data[1].shape)}, which looks like "
            "one batch with its targets, but a list is read as a batch per element; pass tuple(data), or the inputs"
        )
    if not isinstance(data, Iterable):
        raise DataError(f"data is a {type(data).__name__}; pass inputs [N, ...] or an iterable of batches")
    count = 0
    for example in data:
        count += 1
        yield Batch.of(example, model)
    if count == 0:
        raise DataError(f"data ({type(data).__name__}) holds no batch; is the loader empty or already used up?")


def _looks_like_one_batch(data: list[Any]) -> bool:
    """Whether a list is ``[inputs, targets]``, as a DataLoader yields it: its targets would be measured as inputs."""
    if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        return False
    inputs, targets = data
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return integer and targets.ndim == 1 and inputs.ndim >= 2 and len(inputs) == len(targets)


def peek(data: Any, model: nn.Module) -> tuple[Batch, Any]:
    """The first batch of ``data`` as an example input, and the data with nothing lost.

    Args:
        data: As in :func:`batches`; that function says what is read and what is raised.
        model: The model that will be called.

    Returns:
        The first batch, and what to iterate over afterwards (an iterator is consumed once, hence chained).
    """
    if isinstance(data, Iterator):
        stream = batches(data, model)
        first = next(stream)
        return first, itertools.chain([first], stream)
    # A loader draws from torch's global stream when iteration starts; looking ahead must not be seen there.
    with torch.random.fork_rng(devices=[]):
        return next(batches(data, model)), data
