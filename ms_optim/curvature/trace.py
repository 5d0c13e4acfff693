r"""The trace of every layer's Hessian block, exactly, in one forward and K − 1 backpropagations to activations.

    c_p = Tr H_p = (1/n) Σ_i ‖S_iᵀ J_{p,i}‖²_F ,        S Sᵀ = P ,    J_{p,i} = ∂o_i / ∂W_p

for a loss with Hessian P in the logits o (cross-entropy: diag(p) − p pᵀ) and logits that are piecewise linear in W_p;
elsewhere this is the trace of the Gauss-Newton block, and :attr:`LayerTraces.kind` says which of the two each number
is.  Labels do not enter, and the value is never negative.

Differs from the paper: (1) the norms are squared, as its derivation and its code have them; (2) K − 1 columns instead
of K + 1 backward passes, sent to layer outputs only; (3) no gradient per sample is formed.

Source: arXiv 2106.12612, Prop. 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..errors import CurvatureError
from .evaluation import Statistics
from .losses.named_loss import loss_of
from .measurement import measure
from .parallel import ProcessGroup, unwrapped
from .request import Columns, Request, Totals, checked_request, trainable


@dataclass(frozen=True)
class LayerTraces(Mapping[str, float]):
    """Parameter name → trace of its diagonal block, in units of loss per squared weight.

    Attributes:
        values_: The traces.
        kind: Parameter name → ``"hessian"`` or ``"gauss-newton"``.
        samples: The number of samples averaged over.
        columns: As asked for: ``None``, ``"rank"``, or r.
        standard_error: Parameter name → standard error over the random signs (not over the data): 0 where nothing was
            sampled, NaN where one signed column per sample was, whose scatter cannot be seen.
        generic: The parameters without a curvature rule, measured by the generic path.
        backpropagations: Columns sent per sample, on average.
    """

    values_: dict[str, float]
    kind: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    columns: Columns = None
    standard_error: dict[str, float] = field(default_factory=dict)
    generic: tuple[str, ...] = ()
    backpropagations: float = 0.0

    def __getitem__(self, name: str) -> float:
        """The trace of one parameter's block."""
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        """The parameters' names, in the order of the model."""
        return iter(self.values_)

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.values_)

    @property
    def total(self) -> float:
        """Σ_p c_p, the trace of the block diagonal."""
        return sum(self.values_.values())

    def __str__(self) -> str:
        """A table: parameter, trace, its standard error where it was sampled, kind."""
        width = max((len(name) for name in self), default=0)
        exact = all(error == 0.0 for error in self.standard_error.values())
        lines = []
        for name, value in self.items():
            known = not exact and not math.isnan(self.standard_error[name])
            error = f" ± {self.standard_error[name]:<9.3g}" if known else ""
            path = ", generic path" if name in self.generic else ""
            lines.append(f"{name:<{width}}  {value:12.6g}{error}  {self.kind.get(name, '')}{path}")
        how = "exact" if exact else f"{self.backpropagations:.4g} columns per sample, some of them signed"
        return "\n".join([*lines, f"{'total':<{width}}  {self.total:12.6g}  {self.samples} samples, {how}"])


def hessian_trace(
    model: nn.Module,
    data: Any,
    columns: Columns = None,  # r: exact columns of S per sample; None: all
    loss: str | nn.Module = "cross_entropy",
    statistics: Statistics = "running",
    generator: torch.Generator | None = None,
    *,
    probes: int = 1,  # m
    tolerance: float | None = None,
    generic: bool = True,
    max_memory: int | Literal["pass"] | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> LayerTraces:
    r"""Exact trace of each diagonal block, :math:`\operatorname{Tr} H_p = \frac1n \sum_i \|S_i^\top J_{p,i}\|_F^2`.

    The parameters are those with ``requires_grad``; one that the logits do not depend on has trace 0.  Nothing is
    disturbed: modes, buffers, ``.grad`` and the random streams are as before.

    Args:
        model: A classifier; called in evaluation mode (no dropout, BatchNorm's statistics constant). Of a model in
            ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile`` the module inside is measured, and names
            are the inner ones.
        data: Inputs ``[N, ...]`` or an iterable of batches (a DataLoader, a list) of any length, read once; each a
            tensor, a dictionary or ``(inputs, targets)``, whose targets are never read. A bare tuple is one batch.
        columns: ``None``: all K − 1 columns of S, exact. ``r``: the r leading columns of each sample exactly and
            ``probes`` signed columns for the rest: unbiased, and r + ``probes`` backpropagations whatever K is.
            ``"rank"``: per chunk of a batch, as many leading columns as represent P to rounding: what is left out has
            at most ε Σ_i Tr P_i of Σ_i Tr P_i, computed from p beforehand, with ε of the logits' precision. (That is a
            bound on P, not on each trace: it is multiplied by the largest ‖J_i‖² there.)
        loss: ``"cross_entropy"``, ``"bce_with_logits"``, ``"mse"``, or torch's module for one of them, whose
            ``reduction`` counts; :func:`ms_optim.curvature.losses.named_loss.loss_of` says which constants they have
            and what is refused. Label smoothing changes nothing: it moves only what is linear in the logits.
        statistics: BatchNorm's: the ``"running"`` ones, those of each ``"batch"``, or those that a forward pass in the
            model's present modes uses (``"training"``), always held constant. (An InstanceNorm that keeps running
            statistics is always measured with those.)
        generator: Draws the signs; by default a fresh one with a fixed seed, so that the same call gives the same
            numbers.
        probes: m ≥ 1, independent signed columns per sample; from 2 on :attr:`LayerTraces.standard_error` is known.
        tolerance: If given, columns are added (beginning with ``columns`` or 1) until the standard error of every
            parameter's running trace is well below this part of it; ``probes`` is at least 2 then. That is judged with
            signs of its own; the trace and the error that is reported are of fresh ones, so that both are unbiased
            (and the error may, seldom, be above the tolerance).
        generic: Whether parameters without a curvature rule are measured by gradients per sample: exact, but one
            forward pass for each sample. If not, they are an error.
        max_memory: Bytes that may be taken for activations, columns and temporaries. ``None``: half of what is free;
            ``"pass"``: about what a training pass over the same batch keeps, as for an optimizer's refresh.
            Batches are split along the first axis of their inputs to keep within it; if they cannot be, a given number
            of bytes is an error.
        process_group: Sum over its ranks, each of which passes its own data, at least one batch of it, and draws its
            own signs; ``torch.distributed.group.WORLD`` for all. ``None``: this process only, also under DDP. If one
            rank fails, all do.
        progress: A bar for iterables (needs tqdm). ``None``: on a terminal, after two seconds.

    Returns:
        Parameter name → trace, in units of loss per squared weight, with the ``kind`` of each.

    Raises:
        CurvatureError: If a parameter is used where no curvature rule applies and ``generic`` is false, samples
            influence each other, the model has no trainable parameter, or a trace is not finite. (Each sample's logits
            must depend on that sample alone; that is checked where the graph does not show it.)
        DataError: If data is not batches, is empty or not finite, or logits are not ``[N, K]``; ``error.partial`` holds
            the traces of the batches before, and so does a ``KeyboardInterrupt``.
        MemoryBudgetError: If one sample and one column do not fit in ``max_memory``.
        UnsupportedError: If the loss is another one, or depends on the labels.
        ValueError: If ``columns``, ``probes``, ``tolerance`` or ``max_memory`` is out of range.

    Source: arXiv 2106.12612, Prop. 1, with squared norms.

    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> round(hessian_trace(net, torch.ones(4, 3))["weight"], 6)  # ‖x‖² (1 − 1/K) = 3 / 2
    1.5
    """
    model = unwrapped(model)
    parameters = trainable(model)
    request = checked_request(
        Request(
            loss=loss_of(loss),
            entries=False,
            columns=columns,
            probes=probes,
            tolerance=tolerance,
            statistics=statistics,
            generator=torch.Generator().manual_seed(0) if generator is None else generator,
            generic=generic,
            max_memory=max_memory,
            progress=progress,
        )
    )

    def finish(totals: Totals) -> LayerTraces:
        share = 1 / totals.samples if request.loss.mean else 1.0
        values = torch.stack(list(totals.values.values())).mul(share).tolist()
        if totals.variances is None:
            errors = [math.nan] * len(values)
        else:
            errors = torch.stack(list(totals.variances.values())).sqrt().mul(share).tolist()
        return LayerTraces(
            values_=dict(zip(parameters, values, strict=True)),
            kind={name: "hessian" if exact else "gauss-newton" for name, exact in totals.hessian.items()},
            samples=totals.samples,
            columns=columns,
            standard_error=dict(zip(parameters, errors, strict=True)),
            generic=tuple(name for name in parameters if name in totals.generic),
            backpropagations=totals.backpropagations / totals.samples,
        )

    traces = finish(measure(model, data, parameters, request, finish, process_group))
    bad = [name for name, value in traces.items() if not math.isfinite(value)]
    if bad:
        raise CurvatureError(
            f"the trace of {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''} is not finite ({traces[bad[0]]}); the "
            "weights or activations overflow: check them, or measure in float64 with model.double()"
        )
    return traces
