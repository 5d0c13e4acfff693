r"""The Fisher-Rao norm: how fast the loss changes as all weights grow together.

    ‖w‖²_fr = ⟨w, I(w) w⟩ = E ⟨w, ∇ℓ⟩²

With u = J w ∈ R^K, the derivative of one sample's logits along the weights themselves, ⟨w, ∇ℓ(y)⟩ = ⟨∂ℓ(y)/∂o, u⟩, so
that one Jacobian-vector product per batch is all that it takes.  For the cross-entropy

    "model"       mean over y ~ p exactly:  Σ_y p_y (Σ_k p_k u_k − u_y)² = uᵀ P u,   P = diag(p) − p pᵀ     (no labels)
    "empirical"   at the labels:            (Σ_k p_k u_k − u_y)²

*Invariant* under every rescaling that keeps the function: ∇ moves against w, tensor by tensor, row by row, entry by
entry.  A chain of D layers without biases has u = D o, so ‖w‖²_fr = D² E⟨∂ℓ/∂o, o⟩².  Not invariant under what adds to
weights: an offset that moves from a bias into the running mean of the BatchNorm behind it, or from one bias to a later
one, leaves the function and changes ⟨w, ∇ℓ⟩.

Source: Liang, Poggio, Rakhlin, Stokes, arXiv 1711.01530 (definition and the identity for chains); uᵀ P u by algebra.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batch import Batch, batches, class_logits, logits_of
from ..curvature.evaluation import evaluation
from ..curvature.parallel import unwrapped
from ..curvature.request import trainable
from ..curvature.risk import Loss, read_risk
from ..errors import CurvatureError, UnsupportedError
from .value import Sharpness

Version = Literal["model", "empirical"]


def fisher_rao_norm(
    model: nn.Module,
    data: Any,
    version: Version = "model",
    parameters: Collection[str] | None = None,
    *,
    loss: Loss = "cross_entropy",
) -> Sharpness:
    r"""The squared Fisher-Rao norm, :math:`\|w\|_{fr}^2 = \frac1n \sum_i E_y \langle w, \nabla \ell(x_i, y) \rangle^2`.

    Costs one forward-mode Jacobian-vector product over the data: about two forward passes, no backward pass.

    Args:
        model: Measured in evaluation mode, unchanged.
        data: Inputs or batches, as in :func:`ms_optim.hessian_trace`; with their targets for ``"empirical"``.
        version: ``"model"``: y is drawn from the model's own p, exactly. ``"empirical"``: y is the label.
        parameters: Names of the parameters that w holds; ``None``: all trainable ones.
        loss: For ``"empirical"``, a name or a callable ``loss(logits, targets)`` that returns the mean over its batch;
            the model's version is that of the cross-entropy.

    Returns:
        The squared norm, in units of loss squared; ``details`` holds the number of ``samples``.

    Raises:
        CurvatureError: If no parameter is trainable, or the value is not finite.
        DataError: If data is not batches, is empty or not finite, or lacks targets that are needed.
        UnsupportedError: If an operation of the model has no forward-mode derivative, or the model's version is asked
            for with another loss.
        ValueError: If ``version`` is another word, or a name is not that of a trainable parameter.

    Source: arXiv 1711.01530.

    >>> net = nn.Linear(1, 2, bias=False)
    >>> net.weight.data = torch.tensor([[1.0], [-1.0]])
    >>> value = fisher_rao_norm(net, torch.ones(3, 1))  # u = (1, −1): the variance of ±1 with p = sigmoid(±2)
    >>> abs(value - (1 - math.tanh(1.0) ** 2)) < 1e-6
    True
    """
    if version not in ("model", "empirical"):
        raise ValueError(f"version must be 'model' or 'empirical', got {version!r}")
    if version == "model" and loss != "cross_entropy":
        raise UnsupportedError(
            f"version='model' averages over labels drawn from softmax probabilities, and loss={loss!r}; pass "
            "loss='cross_entropy', or version='empirical'"
        )
    with evaluation(model):
        model = unwrapped(model)
        weights = _chosen(trainable(model), parameters)
        total, samples = 0.0, 0
        for batch, targets, function in _stream(model, data, version, loss):
            logits, along = _derivative(model, batch, weights)
            squares = _of_model(logits, along) if function is None else _empirical(logits, along, targets, function)
            total, samples = total + float(squares.sum()), samples + len(logits)
    value = total / samples
    if not math.isfinite(value):
        raise CurvatureError(
            f"the Fisher-Rao norm is {value}; the weights or activations overflow: check them, or measure in float64 "
            "with model.double()"
        )
    return Sharpness(value, details={"samples": float(samples)})


def _chosen(all_parameters: Mapping[str, nn.Parameter], names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that w holds."""
    if names is None:
        return dict(all_parameters)
    if isinstance(names, str):
        raise ValueError(f"parameters must be a collection of names, got the string {names!r}; pass [{names!r}]")
    unknown = sorted(set(names) - set(all_parameters))
    if unknown or not names:
        what = f"names {', '.join(map(repr, unknown[:3]))}, not trainable here" if unknown else "is empty"
        raise ValueError(f"parameters {what}; there are {', '.join(list(all_parameters)[:5])}, …")
    return {name: p for name, p in all_parameters.items() if name in set(names)}


def _stream(
    model: nn.Module, data: Any, version: Version, loss: Loss
) -> Iterator[tuple[Batch, Any, Callable[[Tensor, Any], Tensor] | None]]:
    """Batches on the model's device; with targets and the loss where labels count."""
    if version == "empirical":
        risk = read_risk(model, data, loss)
        for batch, targets, _ in risk.batches:
            yield batch, targets, risk.loss
        return
    device = next(model.parameters()).device
    for index, batch in enumerate(batches(data, model)):
        batch.check_finite(index)
        yield batch.to(device).outside_inference(), None, None


def _derivative(model: nn.Module, batch: Batch, weights: Mapping[str, nn.Parameter]) -> tuple[Tensor, Tensor]:
    """The logits and u = J w, in float64."""
    point = {name: p.detach() for name, p in weights.items()}

    def logits(values: dict[str, Tensor]) -> Tensor:
        return logits_of(torch.func.functional_call(model, values, batch.args, batch.kwargs))

    try:
        # Fused attention has no forward-mode derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # The first forward-mode derivative of a process compiles decompositions of torch's own, by old means.
            warnings.filterwarnings("ignore", r".*torch\.jit\.script.* is deprecated")
            found = torch.func.jvp(logits, (point,), (point,))
    except NotImplementedError as error:
        raise UnsupportedError(
            f"an operation of {type(model).__name__} has no forward-mode derivative ({str(error).splitlines()[0]}); "
            "replace it by one that has, or freeze what is before it"
        ) from error
    return found[0].detach().double(), found[1].detach().double()


def _of_model(logits: Tensor, along: Tensor) -> Tensor:
    """uᵀ P u of every sample: the variance of u_y over y ~ p, ``[N]``."""
    p = class_logits(logits).softmax(-1)
    mean = (p * along).sum(-1, keepdim=True)
    return (p * (along - mean).square()).sum(-1)


def _empirical(logits: Tensor, along: Tensor, targets: Any, loss: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """⟨∂ℓ_i/∂o_i, u_i⟩² of every sample, ``[N]``; a sample's loss is N times its part of the mean."""
    point = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point, targets), point)
    return (len(logits) * gradient * along).flatten(1).sum(1).square()
