r"""Curvature by the definitions: second derivatives one by one, Jacobians row by row, matrices written out.

Three independent roads to the trace of a parameter's diagonal block, for a mean cross-entropy L over n samples with
logits o, probabilities p and P = diag(p) − p pᵀ:

    hessian       Σ_j ∂²L / ∂W_j²                                   (labels enter, and must cancel)
    gauss-newton  (1/n) Σ_i Tr(J_iᵀ P_i J_i) ,   J_i = ∂o_i / ∂W    (no labels)
    paper         (1/n) Σ_i ( Σ_l p_l ‖∂o_l/∂W‖² − ‖∂ ln Z/∂W‖² )    (K + 1 backward passes per sample)

All are slow, hold in any floating-point type, call the model as it is (its mode included) and share no code with what
they judge.

Source: arXiv 2106.12612, Prop. 1; the norms are squared here, as its derivation needs.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def logit_hessian(logits: Tensor) -> Tensor:
    """P = diag(p) − p pᵀ, the Hessian of the cross-entropy of one sample in its logits.

    Args:
        logits: ``[N, K]``.

    Returns:
        ``[N, K, K]``.
    """
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


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


def hessian_traces(model: nn.Module, inputs: Any, labels: Tensor) -> dict[str, float]:
    """Σ_j ∂²L / ∂W_j² of the mean cross-entropy, a derivative of a derivative for every entry of every parameter.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        labels: ``[N]``.

    Returns:
        Parameter name → trace of the diagonal Hessian block.
    """
    loss = F.cross_entropy(logits_of(model, inputs), labels)
    traces = {}
    for name, parameter in trainable(model).items():
        (first,) = torch.autograd.grad(loss, parameter, create_graph=True, allow_unused=True)
        traces[name] = 0.0
        for j in range(parameter.numel()):
            if first is not None and first.requires_grad:
                (second,) = torch.autograd.grad(first.flatten()[j], parameter, retain_graph=True, allow_unused=True)
                traces[name] += 0.0 if second is None else float(second.flatten()[j].detach())
    return traces


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


def gauss_newton_blocks(model: nn.Module, inputs: Any, create_graph: bool = False) -> dict[str, Tensor]:
    """(1/n) Σ_i J_iᵀ P_i J_i, written out.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.
        create_graph: Whether the blocks can be differentiated, P included.

    Returns:
        Parameter name → ``[W.numel(), W.numel()]``.
    """
    logits, jacobian = jacobians(model, inputs, create_graph)
    curvature = logit_hessian(logits if create_graph else logits.detach())
    return {name: torch.einsum("nki,nkl,nlj->ij", j, curvature, j) / logits.shape[0] for name, j in jacobian.items()}


def gauss_newton_traces(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Tr of each :func:`gauss_newton_blocks`.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.

    Returns:
        Parameter name → trace.
    """
    return {name: float(block.trace()) for name, block in gauss_newton_blocks(model, inputs).items()}


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


def paper_traces(model: nn.Module, inputs: Any) -> dict[str, float]:
    """(1/n) Σ_i ( Σ_l p_l ‖∂o_l/∂W‖² − ‖∂ ln Z/∂W‖² ): the algorithm of the paper, sample by sample, K + 1 passes each.

    Args:
        model: The model.
        inputs: As in :func:`logits_of`.

    Returns:
        Parameter name → trace, without ever holding a Jacobian.
    """
    parameters = trainable(model)
    logits = logits_of(model, inputs)
    traces = dict.fromkeys(parameters, 0.0)

    def add_squares(output: Tensor, factor: float) -> None:
        grads = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            traces[name] += 0.0 if grad is None else factor * float(grad.square().sum())

    for o in logits:
        p = o.detach().softmax(-1)
        for o_l, p_l in zip(o, p.tolist(), strict=True):
            add_squares(o_l, p_l / len(logits))
        add_squares(torch.logsumexp(o, 0), -1.0 / len(logits))
    return traces
