r"""The empirical risk: the true loss on labelled batches, as a function of the weights that can be differentiated.

    L(w) = Σ_b (n_b / n) loss(model(x_b), y_b)

Unlike the Gauss-Newton blocks, which need no labels, derivatives of L do.  Batches are read once and kept, so that
every probe sees the same data, whatever a loader shuffles or augments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..batch import Batch
from ..errors import CurvatureError, DataError, UnsupportedError

Loss = str | Callable[[Tensor, Any], Tensor]

_LOSSES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "squared_error": F.mse_loss,
}


@dataclass(frozen=True)
class Risk:
    """L(w) = Σ_b (n_b / n) loss(model(x_b), y_b): what is differentiated.

    Attributes:
        model: The model.
        parameters: Name → the parameters that L is differentiated in.
        loss: A mean over one batch.
        batches: Inputs, targets and n_b / n.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    loss: Callable[[Tensor, Any], Tensor]
    batches: list[tuple[Batch, Any, float]]

    def terms(self) -> Iterator[Tensor]:
        """The summands of L, in the graph of the parameters."""
        for batch, targets, share in self.batches:
            value = self.loss(batch.logits(self.model), targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                raise ValueError(f"the loss must return one number, the mean over its batch, got {what}")
            if not value.requires_grad:
                raise CurvatureError(
                    "the loss is not in autograd's graph (a detach, torch.no_grad or .item() in the model or the "
                    "loss?); its diagonal needs a differentiable forward pass"
                )
            yield share * value.reshape(())

    def gradient(self) -> list[Tensor]:
        """∇L at the weights as they are, per parameter."""
        found: list[Tensor] = []
        for term in self.terms():
            grads = torch.autograd.grad(term, list(self.parameters.values()), materialize_grads=True, allow_unused=True)
            found = [old + new for old, new in zip(found, grads, strict=True)] if found else list(grads)
        return found

    def zeros(self) -> list[Tensor]:
        """Zeros in float64, shaped as the parameters: sums of many probes are kept in them."""
        return [torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for p in self.parameters.values()]

    def named(self, estimates: Iterable[Tensor]) -> dict[str, Tensor]:
        """Name → estimate in the parameter's type, once all are known to be finite."""
        named = {name: e.to(p.dtype) for (name, p), e in zip(self.parameters.items(), estimates, strict=True)}
        bad = [name for name, estimate in named.items() if not bool(torch.isfinite(estimate).all())]
        if bad:
            raise CurvatureError(
                f"the estimated diagonal of {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''} is not finite; check "
                "data and weights, or measure in float64 with model.double()"
            )
        return named


def read_risk(model: nn.Module, data: Any, loss: Loss) -> Risk:
    """Read what is to be differentiated, and refuse what cannot be.

    Args:
        model: Its parameters with ``requires_grad`` are the variables.
        data: ``(inputs, targets)``, or an iterable of those.
        loss: A name, or a callable ``loss(logits, targets)`` that returns the mean over its batch.

    Returns:
        The risk, its batches on the model's device.

    Raises:
        CurvatureError: If no parameter is trainable.
        DataError: If a batch has no targets, or data is not batches.
        UnsupportedError: If the loss has an unknown name, or a parameter is not float32 or float64.
        ValueError: If the loss is no callable, or a torch module with another reduction than the mean.
    """
    function = named_loss(loss)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise CurvatureError(
            f"{type(model).__name__} has no parameter with requires_grad=True; call model.requires_grad_() "
            "to measure a frozen copy"
        )
    require_precise(parameters)
    device = next(iter(parameters.values())).device
    read = [
        (_inputs(x, model, index).to(device), Batch((y,)).to(device).args[0])
        for index, (x, y) in enumerate(_labelled(data))
    ]
    counts = [batch.tensors[0].shape[0] for batch, _ in read]
    shares = [count / sum(counts) for count in counts]
    return Risk(model, parameters, function, [(x, y, share) for (x, y), share in zip(read, shares, strict=True)])


def named_loss(loss: Loss) -> Callable[[Tensor, Any], Tensor]:
    """The function in what a caller names.

    Args:
        loss: A name, or a callable ``loss(logits, targets)`` that returns the mean over its batch.

    Returns:
        The callable.

    Raises:
        UnsupportedError: If the loss has an unknown name.
        ValueError: If the loss is no callable, or a torch module with another reduction than the mean.
    """
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise UnsupportedError(f"loss={loss!r} has no name here; pass one of {', '.join(_LOSSES)}, or a callable")
        return _LOSSES[loss]
    if not callable(loss):
        raise ValueError(f"loss must be a name or a callable loss(logits, targets), got {loss!r}")
    # A sum cannot be told from a mean by looking at it, but torch's modules say which they are.
    if isinstance(loss, nn.modules.loss._Loss) and loss.reduction != "mean":
        raise ValueError(f"loss has reduction={loss.reduction!r}; batches are averaged, so pass reduction='mean'")
    return loss


@contextmanager
def weights_restored(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Write the weights back on leaving, bit for bit: subtracting a step would not give the same.

    Args:
        parameters: What is written to inside.

    Yields:
        Copies of the weights as they are.
    """
    kept = [p.detach().clone() for p in parameters]
    try:
        yield kept
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, kept, strict=True):
                parameter.copy_(weight)


def require_precise(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters in half precision.

    Args:
        parameters: Name → parameter.

    Raises:
        UnsupportedError: If one is neither float32 nor float64.
    """
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(
                f"parameter {name} is {parameter.dtype}, too coarse for differences of gradients; measure a copy "
                "with model.float() or model.double()"
            )


def _labelled(data: Any) -> Iterator[tuple[Any, Any]]:
    """The batches of ``data`` as (inputs, targets)."""
    if isinstance(data, Dataset):
        raise DataError(
            f"data is a Dataset ({type(data).__name__}), whose elements are samples, not batches; "
            "pass torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if isinstance(data, (Tensor, Mapping, Batch, tuple)):
        yield _pair(data, "data")
        return
    if not isinstance(data, Iterable):
        raise DataError(f"data is a {type(data).__name__}; pass (inputs, targets) or an iterable of those")
    index = -1
    for index, example in enumerate(data):
        yield _pair(example, f"batch {index} of data")
    if index < 0:
        raise DataError(f"data ({type(data).__name__}) holds no batch; is the loader empty or already used up?")


def _pair(example: Any, name: str) -> tuple[Any, Any]:
    """One batch, which must have targets: this is the true loss, and they enter it."""
    if not isinstance(example, (tuple, list)) or len(example) != 2 or example[1] is None:
        what = f"a {type(example).__name__}"
        if isinstance(example, (tuple, list)):
            what += f" of {len(example)}" + (" whose targets are None" if len(example) == 2 else "")
        raise DataError(
            f"{name} is {what}, without targets; these estimates differentiate the true loss, so pass the tuple "
            "(inputs, targets) or an iterable of those"
        )
    return example[0], example[1]


def _inputs(inputs: Any, model: nn.Module, index: int) -> Batch:
    """The inputs as a batch of at least one sample, finite."""
    batch = Batch.of((inputs,), model)
    if not batch.tensors or batch.tensors[0].ndim == 0 or batch.tensors[0].shape[0] == 0:
        raise DataError(f"batch {index} of data ({type(inputs).__name__}) has no tensor with samples on its first axis")
    batch.check_finite(index)
    return batch
