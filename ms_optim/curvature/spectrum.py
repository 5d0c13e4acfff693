r"""The spectrum of a symmetric matrix that is known by its products only: traces of functions of it, and its ends.

*Stochastic Lanczos quadrature.*  From a vector v, k steps give a tridiagonal T with eigenpairs (θ_i, u_i), and

    vᵀ f(M) v ≈ ‖v‖² Σ_i (e₁ᵀ u_i)² f(θ_i) ,        E vᵀ f(M) v = Tr f(M)   for signs v, ‖v‖² = d .

That is Gauss quadrature: exact for polynomials of degree 2k − 1 (so Tr M and Tr M² have no error but that of the
probes), and for every f once k reaches the number of distinct eigenvalues that v sees.  Vectors are orthogonalised
against all before them, twice, in float64.

*Exactly.*  The matrix itself costs d products and m probes of k steps cost m k, so that where d ≤ m k the exact
spectrum is the cheaper one, and it is taken (up to d = 2048, for the sake of the dense eigenvalues).  There k ≥ d is a
special case, and nothing is random.

*The ends.*  Lanczos from a random vector, with a basis that is cut back to the best Ritz vectors when it is full (thick
restart).  A Ritz value is never above the largest eigenvalue, and an eigenvalue lies within its residual ‖M v − θ v‖.

Source: Ubaru, Chen, Saad 2017 for the quadrature; Golub, Welsch 1969; Wu, Simon 2000 for the restart; Parlett 1998,
chapter 4, for the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .operator import Operator

# Dense eigenvalues of more than that take longer than a product of any network whose matrix is so small.
_DENSE = 2048

# A new direction whose length is this part of T's entries is rounding, and the space is invariant.
_INVARIANT = 64 * torch.finfo(torch.float64).eps

# Eigenvalues below this part of the largest, in units of the products' rounding, are zeros.
_ZERO = 8.0


@dataclass(frozen=True)
class Spectrum:
    """A spectral measure: Tr f(M) is the mean over probes of Σ_i weight_i f(node_i).

    Attributes:
        nodes: ``[m, k]``, those within rounding of 0 set to 0.
        weights: ``[m, k]``, not negative; each row adds up to d.
        dimension: d.
        exact: Whether the nodes are the eigenvalues themselves, each with weight 1.
        coarse: What half of the steps give from the same probes, an indication (no bound) of the error of the
            quadrature, of which the spread over probes shows nothing. ``None`` if exact, or for one step.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int
    exact: bool
    coarse: Spectrum | None = None

    def samples(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """An estimate of Tr f(M) from each probe.

        Args:
            function: f, entry by entry.

        Returns:
            ``[m]``.
        """
        values = function(self.nodes)
        # A node of weight 0 is no part of the measure, and f may be infinite there.
        return torch.where(self.weights > 0, self.weights * values, 0.0).sum(1)

    def trace(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Tr f(M) and its standard error over the probes.

        Args:
            function: f, entry by entry.

        Returns:
            The mean, and the error: 0 if exact, NaN for one probe.
        """
        samples = self.samples(function)
        return float(samples.mean()), self.standard_error(samples)

    def standard_error(self, samples: Tensor) -> float:
        """The standard error of a mean over probes.

        Args:
            samples: One number per probe, ``[m]``.

        Returns:
            The error: 0 if exact, NaN for one probe.
        """
        if self.exact:
            return 0.0
        return float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan


def lanczos(operator: Operator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Tridiagonal matrices from each of several vectors, with full re-orthogonalisation.

    Args:
        operator: The matrix.
        start: ``[m, d]``, none of them 0.
        steps: k ≥ 1; at most d are made.

    Returns:
        The diagonals ``[m, k]`` and what is beside them ``[m, k − 1]``. Where a space is invariant after fewer steps,
        the rest is 0.
    """
    steps = min(steps, operator.dimension)
    basis = start.new_zeros(steps, *start.shape)
    diagonal, beside = start.new_zeros(len(start), steps), start.new_zeros(len(start), steps)
    q = start / start.norm(dim=1, keepdim=True)
    for j in range(steps):
        basis[j] = q
        w = operator(q)
        diagonal[:, j] = (q * w).sum(1)
        if j == steps - 1:
            break
        for _ in range(2):  # twice is enough (Parlett, section 6.9)
            w = w - torch.einsum("jm,jmd->md", torch.einsum("jmd,md->jm", basis[: j + 1], w), basis[: j + 1])
        length = w.norm(dim=1)
        largest = torch.maximum(diagonal.abs().amax(1), beside.amax(1))
        ended = length <= _INVARIANT * largest
        if bool(ended.all()):
            break
        beside[:, j] = length.masked_fill(ended, 0.0)
        q = (w / length.masked_fill(ended, 1.0)[:, None]).masked_fill(ended[:, None], 0.0)
    return diagonal, beside[:, : steps - 1]


def spectrum(
    operator: Operator,
    probes: int,  # m
    steps: int,  # k
    generator: torch.Generator,
    exact: bool | None = None,
) -> Spectrum:
    """The spectral measure, exactly or by stochastic Lanczos quadrature.

    Args:
        operator: The matrix.
        probes: m ≥ 1, vectors of signs.
        steps: k ≥ 1, products for each.
        generator: Draws the signs.
        exact: Whether to make the matrix by d products; ``None``: if that costs no more than the probes, or k ≥ d.

    Returns:
        The measure, on the CPU.
    """
    d, coarse = operator.dimension, None
    if exact is None:
        exact = d <= min(_DENSE, probes * steps)
    if exact:
        nodes = torch.linalg.eigvalsh(operator.dense().cpu())[None]
        weights = torch.ones_like(nodes)
    else:
        found = [
            lanczos(operator, operator.draw(count, generator), steps)
            for count in operator.together(probes, min(steps, d) + 4)
        ]
        diagonal, beside = (torch.cat(part).cpu() for part in zip(*found, strict=True))
        nodes, weights = _gauss(diagonal, beside, d)
        made = diagonal.shape[1]
        if made > 1:
            half = made // 2
            few, their_weights = _gauss(diagonal[:, :half], beside[:, : half - 1], d)
            coarse = Spectrum(few.masked_fill(few.abs() <= _zero(operator, nodes), 0.0), their_weights, d, False)
    return Spectrum(nodes.masked_fill(nodes.abs() <= _zero(operator, nodes), 0.0), weights, d, exact, coarse)


def _gauss(diagonal: Tensor, beside: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss quadrature from tridiagonal matrices ``[m, k]``, ``[m, k − 1]``."""
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes, dimension * vectors[:, 0].square()


def _zero(operator: Operator, nodes: Tensor) -> Tensor:
    """The size below which an eigenvalue is rounding."""
    return _ZERO * operator.rounding * nodes.abs().max()


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues at an end of the spectrum.

    Attributes:
        values: Rayleigh quotients, the wanted end first.
        residuals: ‖M v − θ v‖ for each: an eigenvalue lies within that distance.
        vectors: Unit vectors, ``[count, d]``.
        converged: Whether every residual is within the tolerance.
        products: The number of products taken.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    vectors: Tensor
    converged: bool
    products: int


def extreme_eigenpairs(
    operator: Operator,
    count: int,
    generator: torch.Generator,
    end: Literal["largest", "magnitude"] = "largest",
    tolerance: float = 1e-4,
    products: int = 200,
    basis: int = 40,
) -> Eigenpairs:
    """The largest eigenvalues, by Lanczos with thick restarts.

    Of a multiple eigenvalue one copy is sure to be found, not all.  A small residual proves that an eigenvalue is near,
    not that it is the largest; that rests on the random start.

    Args:
        operator: The matrix.
        count: How many; at most d are returned.
        generator: Draws the start.
        end: ``"largest"``: by value; ``"magnitude"``: by absolute value.
        tolerance: The residual to reach, as a part of the eigenvalue of largest magnitude.
        products: The number of products after which to stop (and ``count`` more for the residuals).
        basis: Vectors that are kept at a time.

    Returns:
        The eigenpairs.
    """
    d = operator.dimension
    count = min(count, d)
    basis = min(d, max(basis, 2 * count + 2))
    q = operator.draw(1, generator, "normal")[0]
    q = q / q.norm()
    space, projected = q.new_zeros(basis, d), q.new_zeros(basis, basis)
    taken = j = 0
    while True:
        space[j] = q
        w = operator(q[None])[0]
        taken += 1
        w, coefficients = _orthogonal(w, space[: j + 1])
        projected[: j + 1, j] = projected[j, : j + 1] = coefficients
        ritz, u = torch.linalg.eigh(projected[: j + 1, : j + 1])
        order = _wanted(ritz, end)
        length, largest = float(w.norm()), float(ritz.abs().max())
        left = length * u[j, order[:count]].abs()
        if (len(left) == count and bool((left <= tolerance * largest).all())) or taken >= products or j + 1 == d:
            break
        if j + 1 == basis:  # keep the best half, and the next vector
            j = basis // 2
            space[:j] = u[:, order[:j]].T @ space
            projected.zero_()
            projected[:j, :j] = ritz[order[:j]].diag()
        else:
            j += 1
        if length <= _INVARIANT * largest:  # an invariant space that lacks some of the wanted: anywhere outside of it
            w, _ = _orthogonal(operator.draw(1, generator, "normal")[0], space[:j])
            length = float(w.norm())
        q = w / length
    vectors = u[:, order[:count]].T @ space[: len(u)]
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    images = operator(vectors)
    values = (vectors * images).sum(1)
    residuals = (images - values[:, None] * vectors).norm(dim=1)
    first = _wanted(values, end)
    return Eigenpairs(
        values=tuple(values[first].tolist()),
        residuals=tuple(residuals[first].tolist()),
        vectors=vectors[first],
        converged=len(values) == count and bool((residuals <= tolerance * largest).all()),
        products=taken + len(vectors),
    )


def _orthogonal(w: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """What of w is orthogonal to the rows of a space, and its coefficients in them."""
    first = space @ w
    w = w - first @ space
    second = space @ w
    return w - second @ space, first + second


def _wanted(values: Tensor, end: str) -> Tensor:
    """The order of eigenvalues, the wanted end first."""
    return (values.abs() if end == "magnitude" else values).argsort(descending=True)
