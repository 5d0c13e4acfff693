"""Perturbation: what is added to the weights in a pass, unmultiplied, and the norm that it is divided by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteWarning

_PORTION_BYTES = 2**26


class DeviceNorm:
    """A norm on a device that runs behind: the host reads it when a whole pass has been queued after it.

    Args:
        norm: A number on the device.
    """

    def __init__(self, norm: Tensor) -> None:
        self._copy = norm.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if norm.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(norm.device))

    def check(self) -> None:
        """Warn if it is not finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if not math.isfinite(float(self._copy)):
            warn_of_norm()


def warn_of_norm() -> None:
    """Say that a step has no perturbation."""
    message = "the gradient norm is not finite; the step's gradient is taken without a perturbation"
    warnings.warn(message, NonFiniteWarning, stacklevel=3)


@dataclass(frozen=True)
class Scaled:
    """ε_p = s f_p d_p, unmultiplied: the products would be a temporary as large as the model.

    Attributes:
        directions: d, entry by entry, of this rank's part; ``None`` where a parameter is not perturbed.
        factors: f, one number per entry.
        scale: s, a number on the directions' device, 0 if there is to be no perturbation; ``None``: 1.
        norm: What s was made of, to be checked when the pass is over.
    """

    directions: list[Tensor | None]
    factors: list[float]
    scale: Tensor | None = None
    norm: DeviceNorm | None = None


Perturbation = Scaled | list[Tensor | None] | None


def nothing_finite(grads: list[Tensor | None], quiet: bool) -> Scaled | None:
    """What is added where a gradient is not finite: 0 and a warning, since another gradient may be.

    Args:
        grads: One per parameter.
        quiet: Whether that is to be expected, as with a loss scale: then the step needs no other pass.

    Returns:
        A perturbation that is none, or ``None``.
    """
    if quiet:
        return None
    warn_of_norm()
    return Scaled([None] * len(grads), [0.0] * len(grads))


def add_scaled(
    tensors: list[Tensor], directions: list[Tensor], factors: list[float], scale: Tensor | None = None
) -> None:
    """tensor += scale · factor · direction, entry by entry.

    Args:
        tensors: Changed in place.
        directions: Of the same shapes; sparse ones, too, without a scale.
        factors: Numbers.
        scale: A number on a device, where a 0 means that nothing is added, not even 0 times what is not finite.
    """
    equal = len(set(factors)) == 1
    with torch.no_grad():
        if scale is not None:
            _add_scaled_on_device(tensors, directions, factors, scale)
        elif equal and not any(d.is_sparse for d in directions):
            torch._foreach_add_(tensors, directions, alpha=factors[0])
        elif not tensors[0].is_cuda or any(d.is_sparse for d in directions):
            for tensor, direction, factor in zip(tensors, directions, factors, strict=True):
                tensor.add_(direction, alpha=factor)
        else:
            # On a GPU one kernel for many tensors beats one for each; their products are a temporary, so in portions.
            for some in _portions(directions):
                torch._foreach_add_(tensors[some], torch._foreach_mul(directions[some], factors[some]))


def _add_scaled_on_device(
    tensors: list[Tensor], directions: list[Tensor], factors: list[float], scale: Tensor
) -> None:
    """The same where the host does not know the scale: in one flat piece of memory per portion, a few kernels each."""
    order = sorted(range(len(directions)), key=lambda i: str(directions[i].dtype))
    for some in _portions([directions[i] for i in order]):
        for dtype in dict.fromkeys(directions[i].dtype for i in order[some]):
            taken = [i for i in order[some] if directions[i].dtype == dtype]
            sizes = [directions[i].numel() for i in taken]
            # In half precision neither 1 over a norm nor the products need be among the numbers.
            wide = torch.float32 if dtype in (torch.half, torch.bfloat16) else dtype
            flat = torch.empty(sum(sizes), dtype=wide, device=scale.device)
            pieces = [
                piece.view(directions[i].shape) for i, piece in zip(taken, flat.split(sizes), strict=True)
            ]
            torch._foreach_copy_(pieces, [directions[i] for i in taken])
            if len(set(factors)) == 1:
                scaled = scale * factors[0]
            else:
                scaled = scale
                torch._foreach_mul_(pieces, [factors[i] for i in taken])
            flat.mul_(scaled).nan_to_num_(0.0, 0.0, 0.0)
            torch._foreach_add_([tensors[i] for i in taken], pieces)


def _portions(tensors: list[Tensor]) -> Iterator[slice]:
    """Slices of about equal size in bytes."""
    start = size = 0
    for end, tensor in enumerate(tensors, 1):
        size += tensor.numel() * tensor.element_size()
        if size >= _PORTION_BYTES or end == len(tensors):
            yield slice(start, end)
            start, size = end, 0
