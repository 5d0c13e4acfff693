r"""Losses of the outputs o ∈ R^K of one sample, by what the curvature needs of them: P = ∂²ℓ / ∂o² = S Sᵀ.

    cross-entropy              P = diag(p) − p pᵀ ,               p = softmax(o)
    binary cross-entropy       P = diag(w_k s_k (1 − s_k)) · m ,  s = sigmoid(o)
    squared error Σ (o − y)²   P = 2 I · m

m = 1/K for torch's mean of the last two, which is over all N K elements, and m = 1 for their sum; the first has no m,
as torch divides by N alone.  The targets y are in none of them, since each loss is A(o) − c ⟨y, o⟩ and terms without
o (for the first, where Σ_k y_k = 1), so that nothing here reads a target.  P is that of *one* sample; the measured
trace is the mean over samples, or the sum (:attr:`Loss.mean`), of Tr(J_iᵀ P_i J_i) = ‖S_iᵀ J_i‖².

Per sample, the columns of S have an order of descending size, in which r *leading* columns are exact and the rest
shares signed columns (:meth:`Loss.sampled`), or is left out (:meth:`Loss.numerical_rank`).  What varies between losses
is only S: triangular for cross-entropy, diagonal for the other two.

Source: arXiv 2106.12612, Prop. 1, for cross-entropy; the others by differentiating twice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...batch import class_logits
from ...errors import DataError, UnsupportedError
from . import logit_factor
from .probabilities import largest, probabilities


@dataclass(frozen=True)
class Loss(ABC):
    """A loss whose curvature in the outputs does not depend on the targets.

    Attributes:
        mean: Whether the loss is the mean over the samples of a batch (``reduction="mean"``) or their sum.
        name: The name that selects it.
    """

    mean: bool = True
    name: ClassVar[str]

    @abstractmethod
    def logits(self, output: Tensor) -> Tensor:
        """The output of a model as ``[N, K]``; a :class:`~ms_optim.errors.DataError` where its shape does not fit."""

    @abstractmethod
    def rank(self, classes: int) -> int:
        """The number of columns of S for K outputs."""

    @abstractmethod
    def exact(self, logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns ``start … stop − 1`` of S in the order of the classes, ``[stop − start, N, K]``, detached."""

    @abstractmethod
    def leading(self, logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """As :meth:`exact`, in each sample's own descending order.

        Another S with S Sᵀ = P; cross-entropy descends in p_k, the diagonal losses in P_kk, ties in the order of the
        classes.  Sorting costs little, but only this order makes the first columns matter most.
        """

    @abstractmethod
    def split(self, logits: Tensor, columns: int, eps: Tensor) -> tuple[Tensor, Tensor]:
        """r leading columns, and Σ_{k≥r} ε_k S_k for signs ``[probes, N, rank]``; see :meth:`sampled`."""

    @abstractmethod
    def remaining(self, logits: Tensor) -> Tensor:
        """Σ_i Tr R_i^{(r)} for r = 0 … rank, R_i = P_i − (r leading columns)(…)ᵀ: ``[rank + 1]`` in float64."""

    @abstractmethod
    def probe(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """One signed column s, ``[N, K]``, with E s sᵀ = P; the gradient includes its dependence on the logits."""

    @abstractmethod
    def product(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """P x for x of the logits' shape, ``[N, K]``, detached, in O(N K)."""

    def noise(self, samples: int, classes: int, probes: int, generator: torch.Generator) -> Tensor:
        """The signs of a whole batch, so that results do not depend on how it is then cut into chunks of samples.

        Args:
            samples: N, of the whole batch.
            classes: K.
            probes: The number of independent signed columns.
            generator: The source of randomness; the global streams are not touched.

        Returns:
            ±1 as int8 ``[probes, N, rank]`` on the generator's device, one for each column; which one is that of which
            column is for the loss to say.
        """
        return logit_factor.coins((probes, samples, self.rank(classes)), generator)

    def sampled(self, logits: Tensor, columns: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The r leading columns A of each sample, and for each probe one signed column b of all the others.

        E (A Aᵀ + b bᵀ) = P over the signs, for each probe.  From r = rank − 1 on there is nothing to sample: a single
        column is deterministic up to its sign, so all are returned as leading ones.

        Args:
            logits: ``[N, K]``, all samples of a batch or a chunk of them.
            columns: r ≥ 0.
            noise: :meth:`noise`, cut to the samples of the chunk: ``[probes, N, rank]``.

        Returns:
            Leading columns ``[r, N, K]`` and signed columns ``[probes, N, K]``; or ``[rank, N, K]`` and ``[0, N, K]``.

        Raises:
            ValueError: If r is negative or the noise is not that of these samples.
        """
        samples, classes = logits.shape
        rank = self.rank(classes)
        if columns < 0:
            raise ValueError(f"columns must be >= 0, got {columns}; 0 leaves every column to the signed ones")
        if noise.shape[1:] != (samples, rank):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, and logits {tuple(logits.shape)} need [probes, {samples}, "
                f"{rank}]; draw it for the whole batch and cut it to the same samples, noise[:, i:j] for logits[i:j]"
            )
        if columns >= rank - 1:
            whole = self.leading(logits)
            return whole, whole[:0]
        return self.split(logits, columns, noise)

    def numerical_rank(self, logits: Tensor, tolerance: float) -> int:
        r"""The smallest r with Σ_i Tr R_i ≤ tolerance · Σ_i Tr P_i, where R_i = P_i − (r leading columns)(…)ᵀ.

        In closed form from the outputs, in float64, before any backpropagation.  (Columns add their own rounding: in
        float32 they replace probabilities below e⁻⁸⁰ by that number.)  Each R_i is positive semidefinite, so
        that its trace is its nuclear norm, and r proves for the batch

            Σ_i ‖P_i − S_{i,r} S_{i,r}ᵀ‖_* ≤ tolerance · Σ_i ‖P_i‖_* .

        The trace of a parameter computed from r columns is therefore never too large, and too small by at most
        tolerance · max_i σ_max(J_i)² · Σ_i Tr P_i (over n, for a mean).  This is not a bound relative to the trace
        itself: a J that is blind to all but the smallest directions of P would have its trace left out.

        Args:
            logits: ``[N, K]``.
            tolerance: ≥ 0; at the unit roundoff of the outputs' type, what is left out is what P's own rounding is.

        Returns:
            r, from 0 (also where every P vanishes) to the rank.

        Raises:
            ValueError: If the tolerance is negative or not a number.
        """
        if not tolerance >= 0.0:
            raise ValueError(f"tolerance must be >= 0, got {tolerance}; 0 keeps every column that is not zero")
        left = self.remaining(logits)
        return int((left <= tolerance * left[0]).to(torch.uint8).argmax())


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """P = diag(p) − p pᵀ with p = softmax(o), of rank K − 1.

    Label smoothing and soft labels change nothing: the loss −Σ_k y_k log p_k is linear in y, and its second
    derivative is (Σ_k y_k) P = P for every y that sums to 1.
    """

    name: ClassVar[str] = "cross_entropy"

    def logits(self, output: Tensor) -> Tensor:
        """``[N, K]`` with K ≥ 2."""
        return class_logits(output)

    def rank(self, classes: int) -> int:
        """K − 1: a constant added to all logits changes nothing."""
        return classes - 1

    def exact(self, logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """See :func:`~ms_optim.curvature.losses.logit_factor.exact_columns`."""
        return logit_factor.exact_columns(logits, start, stop)

    def leading(self, logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """See :func:`~ms_optim.curvature.losses.logit_factor.leading_columns`."""
        return logit_factor.leading_columns(logits, start, stop)

    def split(self, logits: Tensor, columns: int, eps: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`~ms_optim.curvature.losses.logit_factor.split_columns`."""
        return logit_factor.split_columns(logits, columns, eps)

    def remaining(self, logits: Tensor) -> Tensor:
        """See :func:`~ms_optim.curvature.losses.logit_factor.remaining_traces`."""
        return logit_factor.remaining_traces(logits)

    def probe(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """See :func:`~ms_optim.curvature.losses.logit_factor.probe`."""
        return logit_factor.probe(logits, generator)

    def product(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """p ⊙ (x − ⟨p, x⟩), the form without cancellation: x up to a constant is all that matters."""
        with torch.no_grad():
            p = probabilities(logits)
            return p * (vectors - (p * vectors).sum(-1, keepdim=True))


@dataclass(frozen=True)
class ElementwiseLoss(Loss):
    """A sum over outputs, so that P is diagonal and S = diag(√P_kk): a column is one output."""

    @abstractmethod
    def root(self, logits: Tensor) -> Tensor:
        """√P_kk, ``[N, K]``, differentiable, in float32 or better."""

    def logits(self, output: Tensor) -> Tensor:
        """``[N, K]`` with K ≥ 1; ``[N]`` becomes ``[N, 1]``."""
        if output.ndim not in (1, 2) or output.numel() == 0:
            raise DataError(
                f"the model's outputs have shape {tuple(output.shape)}; the trace for loss={self.name!r} needs [N, K] "
                "or [N]: flatten the outputs of a sample into one axis, or wrap the model"
            )
        return output[:, None] if output.ndim == 1 else output

    def rank(self, classes: int) -> int:
        """K."""
        return classes

    def exact(self, logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """√P_kk e_k for each output k."""
        with torch.no_grad():
            root = self.root(logits)[:, start:stop]
            order = torch.arange(start, start + root.shape[1], device=root.device).expand_as(root)
            return _one_per_column(root, order, logits.shape[1])

    def leading(self, logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """√P_kk e_k for each sample's own k-th largest P_kk."""
        with torch.no_grad():
            root, order = self.root(logits).sort(dim=-1, descending=True, stable=True)
            return _one_per_column(root[:, start:stop], order[:, start:stop], logits.shape[1])

    def first(self, root: Tensor, columns: int) -> Tensor:
        """The r < K outputs with the largest P_kk, ``[N, r]``."""
        return largest(root, columns, columns + 1)[:, :columns]

    def split(self, logits: Tensor, columns: int, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The largest entries one per column, the others with their signs in one; sign k is that of output k."""
        with torch.no_grad():
            root = self.root(logits)
            order = self.first(root, columns)
            signed = eps.to(root.device) * root
            leading = _one_per_column(root.gather(-1, order), order, logits.shape[1])
            return leading, signed.scatter_(-1, order.expand(len(eps), -1, -1), 0.0)

    def remaining(self, logits: Tensor) -> Tensor:
        """Sums over what is behind the r largest P_kk, added from the smallest on."""
        with torch.no_grad():
            descending = self.root(logits.double()).square().sort(dim=-1, descending=True).values.sum(0)
            return F.pad(descending.flip(-1).cumsum(-1).flip(-1), (0, 1))

    def probe(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """±√P_kk."""
        root = self.root(logits)
        return logit_factor.signs(tuple(root.shape), root, generator) * root

    def product(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """P_kk x_k."""
        with torch.no_grad():
            return self.root(logits).square() * vectors


@dataclass(frozen=True)
class BinaryCrossEntropy(ElementwiseLoss):
    """P = diag(w_k s_k (1 − s_k)) · m with s = sigmoid(o); m = 1/K for torch's mean over N K elements, 1 for the sum.

    Soft targets change nothing: the loss w_k (softplus(o_k) − y_k o_k) is linear in them.

    Attributes:
        weight: w_k ≥ 0, one for all outputs or one for each; ``None`` is 1.
    """

    name: ClassVar[str] = "bce_with_logits"
    weight: tuple[float, ...] | None = None

    def root(self, logits: Tensor) -> Tensor:
        """√(w_k s_k (1 − s_k) m), from log s, so that saturated outputs keep their digits and their slopes."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        root = (0.5 * (F.logsigmoid(wide) + F.logsigmoid(-wide))).exp()
        classes = logits.shape[1]
        m = 1.0 / classes if self.mean else 1.0
        if self.weight is None:
            return root * math.sqrt(m)
        if len(self.weight) not in (1, classes):
            raise UnsupportedError(
                f"loss=BCEWithLogitsLoss(weight=...) has {len(self.weight)} entries and the model {classes} output(s); "
                f"only a weight per output is supported, not one per sample: pass a weight of shape [{classes}], or "
                "loss='bce_with_logits' without one"
            )
        return root * (m * torch.tensor(self.weight, dtype=wide.dtype, device=wide.device)).sqrt()


@dataclass(frozen=True)
class SquaredError(ElementwiseLoss):
    """P = 2 I · m; m = 1/K for torch's mean of (o − y)² over N K elements, 1 for the sum.

    The same for all outputs and samples: the trace is 2 m ‖J‖², and columns need no order.
    """

    name: ClassVar[str] = "mse"

    def first(self, root: Tensor, columns: int) -> Tensor:
        """All are alike: the order of the outputs."""
        return torch.arange(columns, device=root.device).expand(len(root), -1)

    def root(self, logits: Tensor) -> Tensor:
        """√(2 m), a constant."""
        like = logits if logits.dtype == torch.float64 else logits.float()
        return torch.full_like(like, math.sqrt(2.0 / logits.shape[1] if self.mean else 2.0))


def _one_per_column(values: Tensor, order: Tensor, classes: int) -> Tensor:
    """Column c of sample n is values[n, c] at class order[n, c], else 0: ``[C, N, K]``."""
    out = values.new_zeros(values.shape[1], values.shape[0], classes)
    return out.scatter_(-1, order.T[..., None], values.T[..., None])
