"""Scale symmetries: positive rescalings of parameters that leave the network's function unchanged.

A group element is a vector t, and acts by

    W_p -> e^{a_p} W_p,    a = Bᵀ t,

with B (``generators``, ``[G, P]``) an integer matrix read off the network's graph.  Gradients and an optimizer's state
move along, and so does a BatchNorm whose input grows by e^s:

    running_mean -> e^s running_mean,    running_var + ε -> e^{2s} (running_var + ε),

which is exact in evaluation mode as long as no variance becomes negative, hence ``bound``.  Where a normaliser computes
its statistics from the batch, ε stands still while the variance moves: LayerNorm, GroupNorm and RMSNorm always,
BatchNorm in training mode.  There the function is unchanged up to ε over the variance, and ``check`` says how far.

Elements add: t + t' acts as one after the other, −t undoes t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import SymmetryError
from .element import Element, model_parameters, read_element, scale_factor, shortened
from .invariance import Check, compared, lowest_variance, undisturbed
from .linear_system import FIXED, LinearSystem, LogScale, integer_basis
from .optimizer_state import moving_state

# What acts, and what finds such a group: for messages.
_NAMES = ("rescaling", "scale_symmetries")

# A running variance this far below zero, in units of ε, is the rounding of a variance at its bound.
_VARIANCE_ROUNDING = 1e-6


@dataclass(frozen=True)
class Opaque:
    """One operation that no scale passes: s = 0 on its inputs and outputs.

    Attributes:
        operation: The operation, such as ``aten.gelu.default``.
        where: Path of the module that called it; empty for the model itself.
        reason: Why.
    """

    operation: str
    where: str
    reason: str


@dataclass(frozen=True, eq=False)
class Statistics:
    """The running statistics of one BatchNorm, and how they move.

    Attributes:
        mean: Buffer name of running_mean.
        variance: Buffer name of running_var.
        eps: ε, which is added to the variance.
        row: Integers, float64 ``[G]``: the input's log-scale is s = row · t.
    """

    mean: str
    variance: str
    eps: float
    row: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class ScaleGroup:
    """The rescalings of a model's parameters that leave its logits unchanged.

    Attributes:
        parameters: Names of ``model.named_parameters()``, P of them; tied parameters once, under their first name.
        generators: B, integers in float64 ``[G, P]``; zero columns for parameters that cannot move.
        opaque: What no scale passes, and where.
        statistics: How running statistics move, one per BatchNorm that keeps them.
        shapes: Shapes of the parameters, to recognise the model; empty: not compared.
        inexact_normalizers: Number of LayerNorm-like normalisers, whose ε makes even evaluation mode inexact.
    """

    parameters: tuple[str, ...]
    generators: Tensor
    opaque: tuple[Opaque, ...] = ()
    statistics: tuple[Statistics, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    inexact_normalizers: int = 0

    def __len__(self) -> int:
        """G, the number of generators."""
        return self.generators.shape[0]

    @property
    def moving(self) -> tuple[str, ...]:
        """The parameters that some element moves."""
        moves = zip(self.parameters, self.generators.any(0).tolist(), strict=True)
        return tuple(name for name, moved in moves if moved)

    def log_scale(self, t: Element) -> dict[str, float]:
        """a = Bᵀ t, the logarithm of the factor of every parameter.

        Args:
            t: A group element ``[G]``.

        Returns:
            Parameter name -> a_p.

        Raises:
            ValueError: If t has another shape or is not finite.
        """
        return dict(zip(self.parameters, (self.generators.T @ self._element(t)).tolist(), strict=True))

    def fixing(self, names: Collection[str]) -> ScaleGroup:
        """The subgroup that leaves some parameters alone: those of another optimizer, or frozen since.

        Args:
            names: Parameters with a_p = 0.

        Returns:
            The subgroup; this group itself where it moves none of them.
        """
        columns = {name: self.generators[:, i] for i, name in enumerate(self.parameters)}
        held = [columns[name] for name in names if name in columns and bool(columns[name].any())]
        if not held:
            return self
        system = LinearSystem()
        t = [system.variable() for _ in range(len(self))]

        def combination(column: Tensor) -> LogScale:
            return sum((t[g] * int(c) for g, c in enumerate(column.tolist()) if c), FIXED)

        for column in held:
            system.equal(combination(column), FIXED)
        watched = [combination(c) for c in (*columns.values(), *(s.row for s in self.statistics))]
        matrix = integer_basis(system, watched, leading=len(columns))
        rows = [replace(s, row=matrix[:, len(columns) + i]) for i, s in enumerate(self.statistics)]
        return replace(self, generators=matrix[:, : len(columns)], statistics=tuple(rows))

    def random(self, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """A random group element: t ~ N(0, std²), independent per generator.

        A parameter that m generators move by one each has a log-scale of standard deviation √m std.

        Args:
            std: Standard deviation of each entry.
            generator: Random stream; ``None``: torch's own.

        Returns:
            t, float64 ``[G]``.
        """
        return std * torch.randn(len(self), dtype=torch.float64, generator=generator)

    def rescale_(
        self, model: nn.Module, t: Element, optimizer: torch.optim.Optimizer | None = None, *, clamp: bool = False
    ) -> None:
        """Act on the model in place: W_p ← e^{a_p} W_p; gradients, running statistics and optimizer state move along.

        Everything is validated before anything is changed.  Tensors keep their storage.

        Args:
            model: The model the group was read from, or one with the same parameters.
            t: The group element ``[G]``.
            optimizer: Its state moves along: SGD, Adam or AdamW, or a wrapper that holds one of them as ``base``.
                Parameters it has beyond the model's are left alone.
            clamp: Let a running variance that would become negative become 0, as for an average of the weights whose
                variances lag behind: there the function is changed, by less than ε over the variance.

        Raises:
            ValueError: If t has another shape or is not finite.
            SymmetryError: If the model has other parameters, a factor leaves the range of its dtype, or a running
                variance would become negative.
            UnsupportedError: If it is not known how the optimizer's state moves.
        """
        a = {name: value for name, value in self.log_scale(t).items() if value}
        parameters = self._parameters(model)
        # In-place products to come: a tensor and the factor e^{ka} that it gets.
        products: list[tuple[Tensor, float]] = []
        for name in a:
            products.append((parameters[name], scale_factor(name, a[name], parameters[name])))
            gradient = parameters[name].grad
            if gradient is not None:
                products.append((gradient, scale_factor(f"the gradient of {name}", -a[name], gradient)))
        if optimizer is not None:
            for name, key, state, k in moving_state(optimizer, {p: name for name, p in parameters.items()}):
                if name in a:
                    products.append((state, scale_factor(f"{key} of {name}", k * a[name], state)))
        statistics = self._moved_statistics(model, self._element(t), clamp)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for tensor, factor in products:
                tensor.mul_(factor)
            for name, value in statistics.items():
                buffers[name].copy_(value)
        torch.clear_autocast_cache()  # of the weights as they were, which it does not see change in place

    def bound(
        self, model: nn.Module, t: Element, agreed: Callable[[list[float]], list[float]] | None = None
    ) -> Tensor:
        """The nearest group element under which no running variance becomes negative.

        e^{2s} (v + ε) ≥ ε for every channel of a BatchNorm is one half-space in t; the nearest point of their
        intersection minimises ‖Bᵀ(t' − t)‖², the change of the parameters' log-scales.

        Args:
            model: The model whose running variances count.
            t: The group element ``[G]``.
            agreed: Takes the smallest log-scale of each BatchNorm's input and gives the one to keep to instead: where
                several processes hold the same weights beside running variances of their own, the largest.

        Returns:
            t', float64 ``[G]``; t itself where it is within the bounds.

        Raises:
            ValueError: If t has another shape or is not finite.
            SymmetryError: If the model lacks a buffer of the group, or a running variance is negative or not finite.
        """
        element = self._element(t)
        limited = [(statistics.row, limit) for statistics, limit in self._limits(model) if bool(statistics.row.any())]
        if not limited:
            return element
        rows, limits = torch.stack([row for row, _ in limited]), [limit for _, limit in limited]
        missing = torch.tensor(limits if agreed is None else agreed(limits), dtype=torch.float64) - rows @ element
        if not bool((missing > 0).any()):
            return element
        return element + _shortest_step(self.generators, rows, missing)

    def check(
        self,
        model: nn.Module,
        example_inputs: Any,
        std: float = 0.5,
        generator: torch.Generator | None = None,
        tolerance: float | None = None,
    ) -> Check:
        """Prove the function unchanged: compare the logits before and after a random element.

        The element is bounded by :meth:`bound`.  The model is called with other tensors in place of its own; it is not
        changed, nor are its modes and the random streams.  Where a trainable parameter is all zeros (a new head, a
        bias, the last γ of a block), both sides have random values there: through zeros nothing would be seen.

        Args:
            model: The model.
            example_inputs: A batch.
            std: Standard deviation of the random element.
            generator: Random stream of the element; ``None``: torch's own, which is put back.
            tolerance: Largest relative error in evaluation mode; ``None``: 4096 units of rounding of the logits' dtype
                (9e-13 in float64, 5e-4 in float32, at most 0.1), and at least 1e-2 with LayerNorm-like ε.

        Returns:
            The errors in both modes.

        Raises:
            SymmetryError: If the evaluation-mode error exceeds the tolerance.
        """
        batch = Batch.of(example_inputs, model)
        with undisturbed(model):
            element = self.bound(model, self.random(std, generator))
            a = self.log_scale(element)
            before: dict[str, Tensor] = {}
            for name, parameter in self._parameters(model).items():
                unseen = parameter.requires_grad and not bool(parameter.any())
                before[name] = 0.1 * torch.randn_like(parameter) if unseen else parameter.detach()
            after = {name: w * scale_factor(name, a[name], w) for name, w in before.items()}
            after |= self._moved_statistics(model, element)
            return compared(model, batch, before, after, tolerance, self.inexact_normalizers > 0, *_NAMES)

    def __repr__(self) -> str:
        counts = f"{len(self)} generators, {len(self.parameters)} parameters, {len(self.opaque)} opaque operations"
        return f"ScaleGroup({counts})"

    def __str__(self) -> str:
        """Which parameters scale together, and what stood in the way."""
        lines = [f"ScaleGroup: {len(self)} independent rescalings of {len(self.parameters)} parameters"]
        for g, row in enumerate(self.generators.tolist()):
            moved = [f"{name}^{int(e):+d}" for name, e in zip(self.parameters, row, strict=True) if e]
            lines.append(f"  t[{g}]: {shortened(moved, 8)}")
        moving = set(self.moving)
        fixed = [name for name in self.parameters if name not in moving]
        if fixed:
            lines.append(f"  fixed: {shortened(fixed, 8)}")
        if self.statistics:
            lines.append(f"  running statistics of {len(self.statistics)} BatchNorms move along")
        if self.inexact_normalizers:
            lines.append(f"  inexact by their ε: {self.inexact_normalizers} LayerNorm-like normalisers")
        places: dict[tuple[str, str], list[str]] = {}
        for o in self.opaque:
            places.setdefault((o.operation, o.reason), []).append(o.where or "(model)")
        for (operation, reason), where in places.items():
            modules = shortened(list(dict.fromkeys(where)), 4)
            lines.append(f"  opaque: {len(where)} x {operation} ({reason}) in {modules}")
        return "\n".join(lines)

    def _element(self, t: Element) -> Tensor:
        """Read a group element as float64 ``[G]`` on the CPU, or refuse it."""
        return read_element(t, len(self))

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters, once they are known to be the group's."""
        return model_parameters(model, self.parameters, self.shapes, "scale_symmetries")

    def _limits(self, model: nn.Module) -> Iterator[tuple[Statistics, float]]:
        """The smallest log-scale s of each BatchNorm's input: e^{2s} (min v + ε) = ε."""
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for statistics in self.statistics:
            lowest = lowest_variance(model, buffers, statistics.mean, statistics.variance, _NAMES[1])
            # With ε = 0 and a variance of 0 any scale keeps it at 0.
            yield statistics, -0.5 * math.log1p(lowest / statistics.eps) if statistics.eps > 0 else -math.inf

    def _moved_statistics(self, model: nn.Module, element: Tensor, clamp: bool = False) -> dict[str, Tensor]:
        """Running statistics after the element, by buffer name; those that do not move are left out."""
        moved: dict[str, Tensor] = {}
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for statistics, limit in self._limits(model):
            s = float(statistics.row @ element)
            if s == 0:
                continue
            mean, variance, eps = buffers[statistics.mean], buffers[statistics.variance], statistics.eps
            factor = scale_factor(statistics.variance, 2 * s, variance)
            # In float64: the variance may be a small difference of e^{2s} (v + ε) and ε.
            grown = (variance.detach().double() + eps) * factor - eps
            lowest = float(grown.min())
            if lowest < -_VARIANCE_ROUNDING * eps and not clamp:
                raise SymmetryError(
                    f"buffer {statistics.variance} would become {lowest:.3g} (ε = {eps:g}): its input is scaled by "
                    f"e^{s:.3f} and may be scaled by no less than e^{limit:.3f}; pass group.bound(model, t)"
                )
            moved[statistics.variance] = grown.clamp(min=0).to(variance.dtype)
            moved[statistics.mean] = (mean.detach().double() * math.exp(s)).to(mean.dtype)
        return moved


def _shortest_step(generators: Tensor, rows: Tensor, missing: Tensor) -> Tensor:
    """The step Δ of least ‖Bᵀ Δ‖² with rows · Δ ≥ missing.

    Least distance programming (Lawson & Hanson, Solving Least Squares Problems, chapter 23): with B Bᵀ = L Lᵀ and
    u = Lᵀ Δ, the shortest u with A u ≥ b, A = rows L⁻ᵀ, is −r / r_last, where r is the residual of the non-negative
    least squares problem min ‖(Aᵀ; bᵀ) z − (0, ..., 0, 1)‖.
    """
    cholesky = torch.linalg.cholesky(generators @ generators.T)
    a_transposed = torch.linalg.solve_triangular(cholesky, rows.T, upper=False)
    matrix = torch.cat([a_transposed, missing[None]]).numpy()
    target = np.zeros(len(matrix))
    target[-1] = 1.0
    z, _ = scipy.optimize.nnls(matrix, target)
    r = torch.from_numpy(matrix @ z - target)
    u = -r[:-1] / r[-1]
    return torch.linalg.solve_triangular(cholesky.T, u[:, None], upper=True)[:, 0]
