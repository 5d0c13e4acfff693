r"""Spectra by the definitions: matrices written out, all their eigenvalues, formulas applied to them.

    hessian        ∂²L / ∂w ∂wᵀ over all parameters together          (a derivative of every entry of the gradient)
    gauss-newton   (1/n) Σ_i J_iᵀ P_i J_i over all of them            (whole Jacobians)

Slow, for small networks, and without code in common with what they judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import scipy.linalg
import torch
from torch import Tensor, nn

from .curvature import jacobians, logit_hessian, logits_of, mean_loss, trainable


def hessian(model: nn.Module, inputs: Any, targets: Tensor, loss: str = "cross_entropy") -> Tensor:
    """∂²L / ∂w ∂wᵀ, row by row.

    Args:
        model: The model, called as it is.
        inputs: As in :func:`~ms_optim.reference.curvature.logits_of`.
        targets: As in :func:`~ms_optim.reference.curvature.mean_loss`.
        loss: As there.

    Returns:
        ``[d, d]`` over the trainable parameters in their order.
    """
    parameters = list(trainable(model).values())
    value = mean_loss(logits_of(model, inputs), targets, loss)
    first = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True, allow_unused=True)
    rows = []
    for entry in torch.cat([grad.flatten() for grad in first]):
        if entry.requires_grad:
            second = torch.autograd.grad(
                entry, parameters, retain_graph=True, materialize_grads=True, allow_unused=True
            )
        else:
            second = tuple(torch.zeros_like(p) for p in parameters)
        rows.append(torch.cat([part.detach().flatten() for part in second]))
    return torch.stack(rows)


def gauss_newton(model: nn.Module, inputs: Any, loss: str = "cross_entropy") -> Tensor:
    """(1/n) Σ_i J_iᵀ P_i J_i, blocks between parameters included.

    Args:
        model: The model, called as it is.
        inputs: As in :func:`~ms_optim.reference.curvature.logits_of`.
        loss: As in :func:`~ms_optim.reference.curvature.mean_loss`.

    Returns:
        ``[d, d]`` over the trainable parameters in their order.
    """
    logits, parts = jacobians(model, inputs)
    jacobian = torch.cat(list(parts.values()), dim=2)
    return torch.einsum("nki,nkl,nlj->ij", jacobian, logit_hessian(logits.detach(), loss), jacobian) / len(logits)


def block(matrix: Tensor, model: nn.Module, names: Sequence[str]) -> Tensor:
    """The rows and columns of some parameters.

    Args:
        matrix: ``[d, d]``.
        model: The model.
        names: The parameters.

    Returns:
        The block, in the order of the model.
    """
    chosen = torch.cat([torch.full((p.numel(),), name in names) for name, p in trainable(model).items()])
    return matrix[chosen][:, chosen]


def renyi(matrix: Tensor, order: float) -> float:
    """−(1/(1−a)) log( Σ|λ|^a / (Σλ)^a ), and Σ p log p with p = |λ| / Σ|λ| for a = 1.

    Args:
        matrix: ``[d, d]``, symmetric.
        order: a.

    Returns:
        The number; NaN where Σλ is not positive.
    """
    values = torch.linalg.eigvalsh(matrix).tolist()
    largest = max(abs(x) for x in values)
    values = [x for x in values if abs(x) > 1e-14 * largest]  # what is below is rounding of 0
    if order == 1.0:
        size = sum(abs(x) for x in values)
        return sum(abs(x) / size * math.log(abs(x) / size) for x in values)
    trace = sum(values)
    if trace <= 0:
        return math.nan
    return -1 / (1 - order) * math.log(sum(abs(x) ** order for x in values) / trace**order)


def riemannian_norm(matrix: Tensor, model: nn.Module) -> float:
    """max |ξᵀ H ξ| / Σ_p ‖ξ_p‖² / ‖W_p‖², a generalised eigenvalue.

    Args:
        matrix: H, ``[d, d]``.
        model: The model, none of whose parameters is 0.

    Returns:
        The number.
    """
    norms = [p.detach().square().sum().expand(p.numel()) for p in trainable(model).values()]
    metric = 1.0 / torch.cat(norms)
    values = scipy.linalg.eigh(matrix.numpy(), metric.diag().numpy(), eigvals_only=True)
    return float(max(abs(values)))


def log_determinant(matrix: Tensor, epsilon: float | None) -> float:
    """log det( I + H₊ / ε ), H₊ from the eigenvectors; without ε Σ log λ over the eigenvalues that are positive.

    Args:
        matrix: ``[d, d]``, symmetric.
        epsilon: ε.

    Returns:
        The number.
    """
    values, vectors = torch.linalg.eigh(matrix)
    if epsilon is None:
        return sum(math.log(x) for x in values.tolist() if x > 1e-14 * float(values.abs().max()))
    positive = vectors @ values.clamp_min(0.0).diag() @ vectors.T
    return float(torch.logdet(torch.eye(len(matrix), dtype=matrix.dtype) + positive / epsilon))
