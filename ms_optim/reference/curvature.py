r"""Curvature by the definitions: second derivatives one by one, Jacobians row by row, matrices written out.

Three independent roads to the diagonal of a parameter's block, whose sum is its trace, for a loss L that is the mean of
n samples' losses of their logits o, with Hessian P in those:

    hessian       ∂²L / ∂W_j²                                       (labels enter, and must cancel)
    gauss-newton  (1/n) Σ_i (J_iᵀ P_i J_i)_jj ,   J_i = ∂o_i / ∂W    (no labels)
    paper         (1/n) Σ_i ( Σ_l p_l (∂o_l/∂W_j)² − (∂ ln Z/∂W_j)² )    (cross-entropy; K + 1 passes per sample)

The losses and their P, as torch means them with ``reduction="mean"``:

    cross_entropy     P = diag(p) − p pᵀ ,     p = softmax(o)                  mean over the N samples
    bce_with_logits   P = diag(s (1 − s)) / K , s = sigmoid(o)                 mean over all N·K entries
    mse               P = (2 / K) I                                            mean over all N·K entries, no ½

All are slow, hold in any floating-point type, call the model as it is (its mode included) and share no code with what
they judge.

Source: arXiv 2106.12612, Prop. 1 and App. H; the norms are squared here, as its derivation needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with ``requires_grad``.

    Args:
        model: The model.

    Returns:
        Name → parameter, each tensor once.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Call the model.

    Args:
        model: The model.
        inputs: One tensor, a tuple of positional arguments or a dictionary of keyword arguments.

    Returns:
        The logits ``[N, K]``.
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        if isinstance(inputs, Mapping):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def mean_loss(logits: Tensor, targets: Tensor, loss: str = "cross_entropy") -> Tensor:
    """The loss by torch's own function, with its default reduction.

    Args:
        logits: ``[N, K]``.
        targets: ``[N]`` classes, or ``[N, K]``.
        loss: ``"cross_entropy"``, ``"bce_with_logits"`` or ``"mse"``.

    Returns:
        A scalar.

    Raises:
        ValueError: If the loss has another name.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(logits, targets)
    if loss == "bce_with_logits":
        return F.binary_cross_entropy_with_logits(logits, targets)
    if loss == "mse":
        return F.mse_loss(logits, targets)
    raise ValueError(f"loss must be 'cross_entropy', 'bce_with_logits' or 'mse', got {loss!r}")


def logit_hessian(logits: Tensor, loss: str = "cross_entropy") -> Tensor:
    """P, the Hessian of one sample's loss in its logits, where n·L is the sum of these losses.

    Args:
        logits: ``[N, K]``.
        loss: As in :func:`mean_loss`.

    Returns:
        ``[N, K, K]``.

    Raises:
        ValueError: If the loss has another name.
    """
    classes = logits.shape[-1]
    if loss == "cross_entropy":
        p = logits.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if loss == "bce_with_logits":
        s = logits.sigmoid()
        return torch.diag_embed(s * (1 - s)) / classes
    if loss == "mse":
        return torch.diag_embed(torch.full_like(logits, 2.0 / classes))
    raise ValueError(f"loss must be 'cross_entropy', 'bce_with_logits' or 'mse', got {loss!r}")


def factor_error(columns: Tensor, logits: Tensor) -> float:
    """max |Σ_c S_c S_cᵀ − P|.

    Args:
        columns: S as columns ``[C, N, K]``.
        logits: ``[N, K]``.

    Returns:
        The largest deviation of any entry of any sample.
    """
    product = torch.einsum("cnk,cnl->nkl", columns, columns)
    return float((product - logit_hessian(logits)).abs().max().detach())


def cholesky_columns(log_p: Tensor, start: int, stop: int) -> Tensor:
    """Columns ``start … stop − 1`` of the Cholesky factor of diag(p) − p pᵀ, from log p, in the order of the classes.

    Args:
        log_p: ``[N, K]``.
        start: The first column.
        stop: One past the last, at most K − 1.

    Returns:
        ``[stop − start, N, K]``: S_kk = √(p_k q_{k+1} / q_k) and S_jk = −(p_j / q_{k+1}) S_kk with q_k = Σ_{j≥k} p_j.
    """
    log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
    columns = []
    for k in range(start, stop):
        diagonal = (0.5 * (log_p[:, k] + log_q[:, k + 1] - log_q[:, k])).exp()
        column = -(log_p - log_q[:, k + 1, None]).exp() * diagonal[:, None]
        column[:, :k] = 0.0
        column[:, k] = diagonal
        columns.append(column)
    return torch.stack(columns) if columns else log_p.new_zeros(0, *log_p.shape)


def brute_force_hessian_diagonals(
    model: nn.Module, inputs: Any, targets: Tensor, loss: str = "cross_entropy"
) -> dict[str, Tensor]:
    """∂²L / ∂W_j² of the mean loss, a derivative of a derivative for every entry of every parameter.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        targets: As in :func:`mean_loss`.
        loss: As in :func:`mean_loss`.

    Returns:
        Parameter name → diagonal of its Hessian block, shaped as the parameter.
    """
    value = mean_loss(logits_of(model, inputs), targets, loss)
    diagonals = {}
    for name, parameter in trainable(model).items():
        (first,) = torch.autograd.grad(value, parameter, create_graph=True, allow_unused=True)
        entries = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        for j in range(parameter.numel()):
            if first is not None and first.requires_grad:
                (second,) = torch.autograd.grad(first.flatten()[j], parameter, retain_graph=True, allow_unused=True)
                entries[j] = 0.0 if second is None else second.flatten()[j].detach()
        diagonals[name] = entries.view_as(parameter)
    return diagonals


def hessian_traces(model: nn.Module, inputs: Any, labels: Tensor, loss: str = "cross_entropy") -> dict[str, float]:
    """Sums of :func:`brute_force_hessian_diagonals`.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        labels: As in :func:`mean_loss`.
        loss: As in :func:`mean_loss`.

    Returns:
        Parameter name → trace of the diagonal Hessian block.
    """
    diagonals = brute_force_hessian_diagonals(model, inputs, labels, loss)
    return {name: float(diagonal.sum()) for name, diagonal in diagonals.items()}


def jacobians(model: nn.Module, inputs: Any, create_graph: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits and J = ∂o / ∂W, by one backward pass for every sample and class.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        create_graph: Whether the Jacobians can be differentiated.

    Returns:
        Logits ``[N, K]`` and parameter name → ``[N, K, W.numel()]``.
    """
    parameters = trainable(model)
    logits = logits_of(model, inputs)
    samples, classes = logits.shape
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(samples):
        for k in range(classes):
            grads = torch.autograd.grad(
                logits[n, k], list(parameters.values()), retain_graph=True, create_graph=create_graph, allow_unused=True
            )
            for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
                rows[name].append((torch.zeros_like(parameter) if grad is None else grad).flatten())
    return logits, {name: torch.stack(row).unflatten(0, (samples, classes)) for name, row in rows.items()}


def gauss_newton_blocks(
    model: nn.Module, inputs: Any, create_graph: bool = False, loss: str = "cross_entropy"
) -> dict[str, Tensor]:
    """(1/n) Σ_i J_iᵀ P_i J_i, written out.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        create_graph: Whether the blocks can be differentiated, P included.
        loss: As in :func:`mean_loss`.

    Returns:
        Parameter name → ``[W.numel(), W.numel()]``.
    """
    logits, jacobian = jacobians(model, inputs, create_graph)
    curvature = logit_hessian(logits if create_graph else logits.detach(), loss)
    return {name: torch.einsum("nki,nkl,nlj->ij", j, curvature, j) / logits.shape[0] for name, j in jacobian.items()}


def gauss_newton_traces(model: nn.Module, inputs: Any, loss: str = "cross_entropy") -> dict[str, float]:
    """Tr of each :func:`gauss_newton_blocks`.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        loss: As in :func:`mean_loss`.

    Returns:
        Parameter name → trace.
    """
    return {name: float(block.trace()) for name, block in gauss_newton_blocks(model, inputs, loss=loss).items()}


def exact_diagonals(model: nn.Module, inputs: Any, loss: str = "cross_entropy") -> dict[str, Tensor]:
    """(1/n) Σ_i (J_iᵀ P_i J_i)_jj from whole Jacobians and whole P, without the rest of the blocks.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        loss: As in :func:`mean_loss`.

    Returns:
        Parameter name → diagonal of its Gauss-Newton block, shaped as the parameter.
    """
    logits, jacobian = jacobians(model, inputs)
    curvature = logit_hessian(logits.detach(), loss)
    diagonals = {}
    for name, parameter in trainable(model).items():
        j = jacobian[name]
        diagonals[name] = torch.einsum("nki,nkl,nli->i", j, curvature, j).view_as(parameter) / logits.shape[0]
    return diagonals


def weighted_trace(model: nn.Module, inputs: Any, weights: Mapping[str, float]) -> Tensor:
    """Σ_p w_p c_p, exact and differentiable, the derivative of the probabilities included.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        weights: Parameter name → w_p; what is missing counts as 0.

    Returns:
        A scalar in the graph of the parameters.
    """
    blocks = gauss_newton_blocks(model, inputs, create_graph=True)
    return torch.stack([weights.get(name, 0.0) * block.trace() for name, block in blocks.items()]).sum()


def paper_diagonals(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """(1/n) Σ_i ( Σ_l p_l (∂o_l/∂W)² − (∂ ln Z/∂W)² ): the algorithm of the paper, sample by sample, K + 1 passes each.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.

    Returns:
        Parameter name → diagonal of its block for the cross-entropy, without ever holding a Jacobian.

    Source: arXiv 2106.12612, App. H.
    """
    diagonals = {name: torch.zeros_like(p, requires_grad=False) for name, p in trainable(model).items()}
    for factor, grads in paper_passes(model, inputs):
        for name, grad in grads.items():
            diagonals[name] += factor * grad.square()
    return diagonals


def paper_traces(model: nn.Module, inputs: Any) -> dict[str, float]:
    """(1/n) Σ_i ( Σ_l p_l ‖∂o_l/∂W‖² − ‖∂ ln Z/∂W‖² ): the same algorithm with norms in place of squares.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.

    Returns:
        Parameter name → trace.
    """
    traces = dict.fromkeys(trainable(model), 0.0)
    for factor, grads in paper_passes(model, inputs):
        for name, grad in grads.items():
            traces[name] += factor * float(grad.square().sum())
    return traces


def paper_passes(model: nn.Module, inputs: Any) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """The K + 1 backward passes of every sample: of o_l with weight p_l / n, and of ln Z with weight −1 / n.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.

    Yields:
        The weight, and parameter name → gradient, of the parameters that the output depends on.
    """
    parameters = trainable(model)
    logits = logits_of(model, inputs)
    for o in logits:
        weights = [*o.detach().softmax(-1).tolist(), -1.0]
        for output, weight in zip([*o, torch.logsumexp(o, 0)], weights, strict=True):
            grads = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
            named = zip(parameters, grads, strict=True)
            yield weight / len(logits), {name: grad for name, grad in named if grad is not None}
