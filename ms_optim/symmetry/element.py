"""Elements of groups: what is read of them, and what is checked before they act on a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SymmetryError

Element = Tensor | np.ndarray | Sequence[float]


def read_element(t: Element, size: int) -> Tensor:
    """Read a group element as float64 on the CPU, or refuse it.

    Args:
        t: The element.
        size: How many numbers it has to have.

    Returns:
        A copy, ``[size]``.

    Raises:
        ValueError: If it has another shape or is not finite.
    """
    element = torch.as_tensor(t, dtype=torch.float64).detach().to("cpu", copy=True)
    if element.shape != (size,):
        raise ValueError(
            f"t has shape {tuple(element.shape)}, but the group has {size} generators; pass a number for each"
        )
    if not bool(element.isfinite().all()):
        bad = int((~element.isfinite()).sum())
        raise ValueError(f"t holds {bad} non-finite values of {size}; a group element is finite log-scales")
    return element


def model_parameters(
    model: nn.Module, parameters: Sequence[str], shapes: Sequence[tuple[int, ...]], discovery: str
) -> dict[str, nn.Parameter]:
    """The model's parameters, once they are known to be a group's.

    Args:
        model: The model.
        parameters: The group's names.
        shapes: Their shapes; those that are missing are not compared.
        discovery: The function that finds such a group, for the message.

    Returns:
        Name → parameter.

    Raises:
        SymmetryError: If the model has others.
    """
    found = dict(model.named_parameters())
    missing, foreign = set(parameters) - found.keys(), found.keys() - set(parameters)
    if missing or foreign:
        differences = [f"lacks {shortened(sorted(missing), 3)}"] if missing else []
        differences += [f"also has {shortened(sorted(foreign), 3)}"] if foreign else []
        raise SymmetryError(
            f"{type(model).__name__} {' and '.join(differences)}, so it is not the model of this group; "
            f"call {discovery}(model, example_inputs) again"
        )
    for name, shape in zip(parameters, shapes, strict=False):
        if found[name].shape != shape:
            raise SymmetryError(
                f"parameter {name} of {type(model).__name__} has shape {tuple(found[name].shape)}, but {shape} in "
                f"this group; call {discovery}(model, example_inputs) again"
            )
    return {name: found[name] for name in parameters}


def scale_factor(name: str, a: float, tensor: Tensor) -> float:
    """e^a, if the tensor's dtype can hold it and its inverse.

    Args:
        name: Of the tensor.
        a: The log-scale.
        tensor: What is to be scaled.

    Returns:
        The factor.

    Raises:
        SymmetryError: If it leaves the range of the dtype.
    """
    largest = -math.log(torch.finfo(tensor.dtype).tiny)
    if abs(a) > largest:
        raise SymmetryError(
            f"{name} ({tensor.dtype}) would be scaled by e^{a:.1f}, beyond what its dtype can hold (e^±{largest:.0f}); "
            "use a smaller t"
        )
    return math.exp(a)


def shortened(names: Sequence[str], length: int) -> str:
    """The first names, and how many more there are.

    Args:
        names: The names.
        length: How many to show.

    Returns:
        One line.
    """
    return " ".join(names[:length]) + (f" … and {len(names) - length} more" if len(names) > length else "")
