"""The group of a network's hidden units: every unit (channel) is rescaled on its own, and the function stays.

An element t has one number per unit, and acts entry by entry,

    W_p → e^{a_p} W_p ,     a_p,ji = r_j(t) − c_i(t)     (a weight: its outputs' scales minus its inputs')

so that a_p is a sum of *factors*, each a sparse matrix times t that broadcasts to the parameter: rows [out, 1, ...] and
columns [1, in, ...] of a weight, one vector for biases and affine parameters.  Gradients, an optimizer's state and
running statistics move along as in :class:`ms_optim.ScaleGroup`, of which this is the finer twin: the layer-wise group
is the subgroup in which all units of a layer move alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import SymmetryError
from .element import Element, model_parameters, read_element, scale_factor
from .group import Opaque
from .invariance import Check, compared, lowest_variance, undisturbed
from .linear_system import FIXED, LinearSystem, LogScale
from .optimizer_state import moving_state

#: What one parameter is rescaled by: the log-scale of all of it, or terms that broadcast to it.
LogScales = float | list[Tensor]

# What acts, and what finds such a group: for messages.
_NAMES = ("rescaling of units", "neuron_symmetries")

# A running variance this far below zero, in units of ε, is the rounding of a variance at its bound.
_VARIANCE_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Factor:
    """One term of a parameter's log-scale: ``(matrix @ t).reshape(shape)``.

    Attributes:
        matrix: Sparse, ``[prod(shape), U]``.
        shape: Broadcasts to the parameter.
    """

    matrix: scipy.sparse.csr_matrix
    shape: tuple[int, ...]

    def at(self, t: Tensor) -> Tensor:
        """The term, float64."""
        return torch.from_numpy(np.asarray(self.matrix @ t.numpy())).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """The running statistics of one BatchNorm, and how they move.

    Attributes:
        mean: Buffer name of running_mean.
        variance: Buffer name of running_var.
        eps: ε, which is added to the variance.
        rows: Sparse, ``[channels, U]``: channel c of the input has the log-scale rows[c] · t.
    """

    mean: str
    variance: str
    eps: float
    rows: scipy.sparse.csr_matrix


@dataclass(frozen=True, eq=False, repr=False)
class NeuronGroup:
    """The rescalings of single hidden units that leave a model's logits unchanged.

    Attributes:
        parameters: Names of ``model.named_parameters()``; tied parameters once, under their first name.
        shapes: Their shapes.
        units: U, the number of independent scales.
        factors: Parameter name → the terms of its log-scale; none for what does not move.
        opaque: What no scale passes, and where.
        statistics: How running statistics move, one per BatchNorm that keeps them.
        inexact_normalizers: Number of LayerNorm-like normalisers, whose ε makes even evaluation mode inexact.
    """

    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    units: int
    factors: dict[str, tuple[Factor, ...]]
    opaque: tuple[Opaque, ...] = ()
    statistics: tuple[UnitStatistics, ...] = ()
    inexact_normalizers: int = 0

    def __len__(self) -> int:
        """U, the number of units."""
        return self.units

    @property
    def moving(self) -> tuple[str, ...]:
        """The parameters that some element moves."""
        return tuple(name for name in self.parameters if self.factors[name])

    def terms(self, t: Element) -> dict[str, list[Tensor]]:
        """The terms of every parameter's log-scale, float64; their sum broadcasts to the parameter.

        Args:
            t: A group element ``[U]``.

        Returns:
            Parameter name → terms; nothing for what this element does not move.

        Raises:
            ValueError: If t has another shape or is not finite.
        """
        element = read_element(t, self.units)
        found = {name: [factor.at(element) for factor in factors] for name, factors in self.factors.items()}
        return {name: kept for name, ts in found.items() if (kept := [term for term in ts if bool(term.any())])}

    def log_scale(self, t: Element) -> dict[str, Tensor]:
        """a_p(t), the logarithm of the factor of every entry.

        Args:
            t: A group element ``[U]``.

        Returns:
            Parameter name → a_p, float64 on the CPU, in a shape that broadcasts to the parameter's.

        Raises:
            ValueError: If t has another shape or is not finite.
        """
        terms = self.terms(t)
        found: dict[str, Tensor] = {}
        for name, shape in zip(self.parameters, self.shapes, strict=True):
            found[name] = torch.zeros((1,) * len(shape), dtype=torch.float64)
            for term in terms.get(name, []):
                found[name] = found[name] + term
        return found

    def random(self, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """A random group element: t ~ N(0, std²), independent per unit.

        Args:
            std: Standard deviation of each entry.
            generator: Random stream; ``None``: torch's own.

        Returns:
            t, float64 ``[U]``.
        """
        return std * torch.randn(self.units, dtype=torch.float64, generator=generator)

    def fixing(self, names: Collection[str]) -> NeuronGroup:
        """The subgroup that leaves some parameters alone: those of another optimizer, or frozen since.

        Args:
            names: Parameters with a_p = 0.

        Returns:
            The subgroup; this group itself where it moves none of them.
        """
        held = [self.factors[name] for name in names if self.factors.get(name)]
        if not held:
            return self
        system = LinearSystem()
        variables = [system.variable() for _ in range(self.units)]
        for factors in held:
            rows = [_combinations(factor.matrix, variables) for factor in factors]
            if len(rows) == 1:
                system.equal(FIXED, *rows[0])
                continue
            # Rows plus columns vanish: all rows are equal and so are all columns (one for each row, in groups).
            first, second = rows
            tables = len(second) // factors[1].shape[1]
            for g in range(tables):
                columns = second[g * factors[1].shape[1] : (g + 1) * factors[1].shape[1]]
                own = first if tables == 1 else [first[g]]
                system.equal(*(-row for row in own), *columns)
        left: dict[int, int] = {}
        solved = [system.solution(variable) for variable in variables]
        for scale in solved:
            for variable in scale.terms:
                left.setdefault(variable, len(left))
        entries = [(i, left[v], float(c)) for i, scale in enumerate(solved) for v, c in scale.terms.items()]
        i, j, c = zip(*entries, strict=True) if entries else ((), (), ())
        inclusion = scipy.sparse.csr_matrix((c, (i, j)), shape=(self.units, len(left)), dtype=float)
        return replace(
            self,
            units=len(left),
            factors={
                name: ()
                if name in names
                else moving_factors(Factor(_cleaned(factor.matrix @ inclusion), factor.shape) for factor in factors)
                for name, factors in self.factors.items()
            },
            statistics=tuple(replace(s, rows=_cleaned(s.rows @ inclusion)) for s in self.statistics),
        )

    def rescale_(
        self, model: nn.Module, t: Element, optimizer: torch.optim.Optimizer | None = None, *, clamp: bool = False
    ) -> None:
        """Act on the model in place; gradients, running statistics and optimizer state move along.

        Everything is validated before anything is changed.  Tensors keep their storage.

        Args:
            model: The model the group was read from, or one with the same parameters.
            t: The group element ``[U]``.
            optimizer: Its state moves along: SGD, Adam or AdamW, or a wrapper that holds one of them as ``base``.
            clamp: Let a running variance that would become negative become 0.

        Raises:
            ValueError: If t has another shape or is not finite.
            SymmetryError: If the model has other parameters, a factor leaves the range of its dtype, or a running
                variance would become negative.
            UnsupportedError: If it is not known how the optimizer's state moves.
        """
        terms = self.terms(t)
        parameters = model_parameters(model, self.parameters, self.shapes, "neuron_symmetries")
        # In-place products to come: a tensor, the terms of its logarithm, and k.
        products: list[tuple[Tensor, list[Tensor], int]] = []
        for name, parts in terms.items():
            _check_range(name, parts, 1, parameters[name])
            products.append((parameters[name], parts, 1))
            gradient = parameters[name].grad
            if gradient is not None:
                _check_range(f"the gradient of {name}", parts, -1, gradient)
                products.append((gradient, parts, -1))
        if optimizer is not None:
            for name, key, state, k in moving_state(optimizer, {p: name for name, p in parameters.items()}):
                if name in terms:
                    _check_range(f"{key} of {name}", terms[name], k, state)
                    products.append((state, terms[name], k))
        statistics = self._moved_statistics(model, read_element(t, self.units), clamp)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for tensor, parts, k in products:
                multiply_(tensor, parts, k)
            for name, value in statistics.items():
                buffers[name].copy_(value)
        torch.clear_autocast_cache()  # of the weights as they were, which it does not see change in place

    def bound(
        self, model: nn.Module, t: Element, agreed: Callable[[list[float]], list[float]] | None = None
    ) -> Tensor:
        """An element near t under which no running variance becomes negative.

        e^{2s} (v + ε) ≥ ε for every channel of a BatchNorm is one half-space in t; those that are violated are
        projected upon, one after the other, until none is (at once, where every channel has a unit of its own).

        Args:
            model: The model whose running variances count.
            t: The group element ``[U]``.
            agreed: Takes the smallest log-scales of all channels and gives those to keep to instead.

        Returns:
            t', float64 ``[U]``; t itself where it is within the bounds.

        Raises:
            ValueError: If t has another shape or is not finite.
            SymmetryError: If the model lacks a buffer of the group, or a running variance is negative or not finite.
        """
        element = read_element(t, self.units)
        limited = [(s.rows, limit) for s, _, limit in self._limits(model) if s.rows.nnz]
        if not limited:
            return element
        rows = scipy.sparse.vstack([r for r, _ in limited]).tocsr()
        limits = np.concatenate([limit for _, limit in limited])
        if agreed is not None:
            limits = np.asarray(agreed(limits.tolist()), dtype=float)
        squares = np.asarray(rows.multiply(rows).sum(axis=1)).ravel()
        found = element.numpy().copy()
        for _ in range(200):
            missing = np.where(squares > 0, limits - rows @ found, 0.0)
            if not (missing > 0).any():
                break
            step = np.zeros_like(missing)
            np.divide(np.maximum(missing, 0.0), squares, out=step, where=squares > 0)
            # One unit may have several channels: the largest of their steps serves all.
            moves = scipy.sparse.diags(step) @ rows
            found = found + np.asarray(moves.maximum(0).max(axis=0).todense()).ravel()
            found = found - np.asarray((-moves).maximum(0).max(axis=0).todense()).ravel()
        return torch.from_numpy(found)

    def check(
        self,
        model: nn.Module,
        example_inputs: Any,
        std: float = 0.5,
        generator: torch.Generator | None = None,
        tolerance: float | None = None,
    ) -> Check:
        """Prove the function unchanged: compare the logits before and after a random element.

        Nothing is disturbed; all as in :meth:`ms_optim.ScaleGroup.check`.

        Args:
            model: The model.
            example_inputs: A batch.
            std: Standard deviation of the random element.
            generator: Random stream of the element; ``None``: torch's own, which is put back.
            tolerance: Largest relative error in evaluation mode; ``None``: 4096 units of rounding of the logits' dtype,
                at most 0.1, and at least 1e-2 with LayerNorm-like ε.

        Returns:
            The errors in both modes.

        Raises:
            SymmetryError: If the evaluation-mode error exceeds the tolerance.
        """
        batch = Batch.of(example_inputs, model)
        with undisturbed(model):
            element = self.bound(model, self.random(std, generator))
            terms = self.terms(element)
            before: dict[str, Tensor] = {}
            after: dict[str, Tensor] = {}
            parameters = model_parameters(model, self.parameters, self.shapes, "neuron_symmetries")
            for name, parameter in parameters.items():
                unseen = parameter.requires_grad and not bool(parameter.any())
                before[name] = 0.1 * torch.randn_like(parameter) if unseen else parameter.detach()
                after[name] = multiply_(before[name].clone(), terms.get(name, []), 1)
            after |= self._moved_statistics(model, element)
            return compared(model, batch, before, after, tolerance, self.inexact_normalizers > 0, *_NAMES)

    def __repr__(self) -> str:
        moved = sum(bool(factors) for factors in self.factors.values())
        counts = f"{self.units} units, {moved} of {len(self.parameters)} parameters move"
        return f"NeuronGroup({counts}, {len(self.opaque)} opaque operations)"

    def _limits(self, model: nn.Module) -> Iterator[tuple[UnitStatistics, Tensor, np.ndarray]]:
        """Each BatchNorm's running variance, and the smallest log-scale of every channel: e^{2s} (v + ε) = ε."""
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for statistics in self.statistics:
            lowest_variance(model, buffers, statistics.mean, statistics.variance, _NAMES[1])
            variance = buffers[statistics.variance].detach().cpu().double()
            with np.errstate(divide="ignore"):
                limit = -0.5 * np.log1p(variance.numpy() / statistics.eps) if statistics.eps > 0 else None
            yield statistics, variance, np.full(len(variance), -math.inf) if limit is None else limit

    def _moved_statistics(self, model: nn.Module, element: Tensor, clamp: bool = False) -> dict[str, Tensor]:
        """Running statistics after the element, by buffer name; those that do not move are left out."""
        moved: dict[str, Tensor] = {}
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for statistics, variance, limit in self._limits(model):
            s = torch.from_numpy(np.asarray(statistics.rows @ element.numpy()))
            if not bool(s.any()):
                continue
            for extreme in (float(s.min()), float(s.max())):
                scale_factor(statistics.variance, 2 * extreme, buffers[statistics.variance])
            # In float64: the variance may be a small difference of e^{2s} (v + ε) and ε. (Exact where s = 0.)
            grown = torch.where(s == 0, variance, (variance + statistics.eps) * torch.exp(2 * s) - statistics.eps)
            lowest = float(grown.min())
            if lowest < -_VARIANCE_ROUNDING * statistics.eps and not clamp:
                c = int(grown.argmin())
                raise SymmetryError(
                    f"channel {c} of buffer {statistics.variance} would become {lowest:.3g} (ε = {statistics.eps:g}): "
                    f"its input is scaled by e^{float(s[c]):.3f} and may be scaled by no less than "
                    f"e^{float(limit[c]):.3f}; pass group.bound(model, t)"
                )
            mean = buffers[statistics.mean]
            moved[statistics.variance] = grown.clamp(min=0).to(buffers[statistics.variance])
            moved[statistics.mean] = (mean.detach().cpu().double() * torch.exp(s)).to(mean)
        return moved


def moving_factors(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Those that are not zero.

    Args:
        factors: Of one parameter.

    Returns:
        What is left.
    """
    return tuple(factor for factor in factors if factor.matrix.nnz)


def multiply_(tensor: Tensor, terms: LogScales, k: int = 1) -> Tensor:
    """Multiply a tensor by e^{k Σ terms}, in place: the same products, bit for bit, as in ``rescale_``.

    Args:
        tensor: Changed.
        terms: A log-scale, or several that broadcast to the tensor.
        k: The power.

    Returns:
        The tensor.
    """
    if not isinstance(terms, list):
        return tensor.mul_(math.exp(k * terms))
    for term in terms:
        tensor.mul_(torch.exp(k * term).to(tensor))
    return tensor


def _check_range(name: str, terms: list[Tensor], k: int, tensor: Tensor) -> None:
    """Refuse factors, and products of factors, that the dtype cannot hold."""
    for extremes in ([float(term.max()) for term in terms], [float(term.min()) for term in terms]):
        for value in (*extremes, sum(extremes)):
            scale_factor(name, k * value, tensor)


def _combinations(matrix: scipy.sparse.csr_matrix, variables: list[LogScale]) -> list[LogScale]:
    """The rows of a matrix as linear combinations; equal rows once would do, but order is kept."""
    rows = []
    for i in range(matrix.shape[0]):
        span = slice(matrix.indptr[i], matrix.indptr[i + 1])
        pairs = zip(matrix.indices[span].tolist(), matrix.data[span].tolist(), strict=True)
        rows.append(sum((variables[j] * Fraction(c).limit_denominator(64) for j, c in pairs), FIXED))
    return rows


def _cleaned(matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Without the zeros that cancellation leaves."""
    matrix = matrix.tocsr()
    matrix.eliminate_zeros()
    return matrix
