"""Which loss: a name or torch's own loss module, read as one whose curvature is exact without targets.

Refused is what makes the curvature depend on the targets, since a trace is measured from inputs alone: class weights
and ignored classes of the cross-entropy, positive weights of the binary one, weights of samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from .loss import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError

_NAMES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "bce_with_logits": BinaryCrossEntropy,
    "mse": SquaredError,
    "squared_error": SquaredError,
}

# timm is not imported for their sake. Both are means over samples of −Σ_k y_k log p_k.
_TIMM_CROSS_ENTROPIES = ("LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy")

_SUPPORTED = (
    f"supported are {', '.join(repr(name) for name in _NAMES)}, torch.nn.CrossEntropyLoss, BCEWithLogitsLoss and "
    f"MSELoss, and timm's {' and '.join(_TIMM_CROSS_ENTROPIES)}"
)


def loss_of(loss: str | nn.Module | Loss) -> Loss:
    """The loss in what a caller names.

    ``reduction="mean"`` and ``"sum"`` are both exact.  Label smoothing and soft labels change nothing (see
    :class:`~ms_optim.curvature.losses.loss.CrossEntropy`).  A negative ``ignore_index``, as is torch's default, is no
    class, and every sample counts.

    Args:
        loss: ``"cross_entropy"``, ``"bce_with_logits"``, ``"mse"`` or ``"squared_error"``; a module of torch
            (``CrossEntropyLoss``, ``BCEWithLogitsLoss``, ``MSELoss``) or of timm (``LabelSmoothingCrossEntropy``,
            ``SoftTargetCrossEntropy``); or what this function returned.

    Returns:
        The loss, with what it needs of the module copied.

    Raises:
        UnsupportedError: If the loss is another one, or its curvature depends on the targets.

    >>> loss_of("cross_entropy").rank(10)
    9
    >>> loss_of(nn.MSELoss(reduction="sum"))
    SquaredError(mean=False)
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and loss in _NAMES:
        return _NAMES[loss]()
    kind: Any = type(loss)
    if kind.__module__.partition(".")[0] == "timm" and kind.__name__ in _TIMM_CROSS_ENTROPIES:
        return CrossEntropy()
    # A subclass is the loss that it computes: with a forward of its own it is another one.
    if isinstance(loss, nn.CrossEntropyLoss) and kind.forward is nn.CrossEntropyLoss.forward:
        return _cross_entropy(loss)
    if isinstance(loss, nn.BCEWithLogitsLoss) and kind.forward is nn.BCEWithLogitsLoss.forward:
        return _binary_cross_entropy(loss)
    if isinstance(loss, nn.MSELoss) and kind.forward is nn.MSELoss.forward:
        return SquaredError(mean=_is_mean(loss))
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise UnsupportedError(f"loss is the class {loss.__name__}; pass a loss module, such as {loss.__name__}()")
    raise UnsupportedError(f"loss={_described(loss)} has no exact curvature here; {_SUPPORTED}")


def _cross_entropy(loss: nn.CrossEntropyLoss) -> CrossEntropy:
    """Without class weights and without an ignored class."""
    if loss.weight is not None:
        raise UnsupportedError(
            f"loss=CrossEntropyLoss(weight={_described(loss.weight)}) weights each sample by its label, so the "
            "curvature depends on the labels, which are never read; pass loss='cross_entropy' for the unweighted "
            "curvature, or resample the data by the weights"
        )
    if loss.ignore_index >= 0:
        raise UnsupportedError(
            f"loss=CrossEntropyLoss(ignore_index={loss.ignore_index}) leaves out the samples of class "
            f"{loss.ignore_index}, so the curvature depends on the labels, which are never read; drop those samples "
            "from the data and pass loss='cross_entropy'"
        )
    return CrossEntropy(mean=_is_mean(loss))


def _binary_cross_entropy(loss: nn.BCEWithLogitsLoss) -> BinaryCrossEntropy:
    """Without positive weights, and with a weight that is per output."""
    if loss.pos_weight is not None:
        raise UnsupportedError(
            f"loss=BCEWithLogitsLoss(pos_weight={_described(loss.pos_weight)}) weights the positive targets alone, so "
            "the curvature depends on the targets, which are never read; pass loss='bce_with_logits' for the "
            "unweighted curvature"
        )
    weight: Tensor | None = loss.weight
    if weight is None:
        return BinaryCrossEntropy(mean=_is_mean(loss))
    if weight.ndim > 2 or (weight.ndim == 2 and weight.shape[0] != 1):
        raise UnsupportedError(
            f"loss=BCEWithLogitsLoss(weight={_described(weight)}) has a batch axis: it weights the samples of one "
            "particular batch; pass a weight of shape [K], one per output, or loss='bce_with_logits' without one"
        )
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise UnsupportedError(
            f"loss=BCEWithLogitsLoss(weight={weight.flatten().tolist()}) is negative or not finite somewhere, and the "
            "curvature then has no real factor; pass weights >= 0"
        )
    return BinaryCrossEntropy(mean=_is_mean(loss), weight=tuple(weight.flatten().tolist()))


def _is_mean(loss: nn.CrossEntropyLoss | nn.BCEWithLogitsLoss | nn.MSELoss) -> bool:
    """True for a mean, False for a sum."""
    if loss.reduction not in ("mean", "sum"):
        raise UnsupportedError(
            f"loss={type(loss).__name__}(reduction={loss.reduction!r}) is not a number, and only a number has a "
            "Hessian; pass reduction='mean' or 'sum'"
        )
    return loss.reduction == "mean"


def _described(value: Any) -> str:
    """A tensor by its shape, a string in quotes, a module by its name, a function by its own."""
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__qualname__", None) or repr(value)
