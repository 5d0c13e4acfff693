r"""The diagonal of every layer's Hessian block, exactly, at the cost of the trace.

    d_p = diag(H_p) = (1/n) Σ_i Σ_c ( S_{i,c}ᵀ J_{p,i} )² ,        S Sᵀ = P ,

entry by entry, with the same columns as the trace (:mod:`ms_optim.curvature.trace`): exact where the logits are
piecewise linear in W_p, else of the Gauss-Newton block.  Its sum is the trace.  The Gram route of the trace does not
exist here, hence a little dearer for wide convolutions.

Source: arXiv 2106.12612, App. H.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CurvatureError
from .evaluation import Statistics
from .losses.named_loss import loss_of
from .measurement import measure
from .parallel import ProcessGroup, unwrapped
from .request import Columns, Request, Totals, checked_request, trainable


@dataclass(frozen=True)
class LayerDiagonals(Mapping[str, Tensor]):
    """Parameter name → diagonal of its block, a tensor of the parameter's shape, loss per squared weight.

    Attributes:
        values_: The diagonals.
        kind: Parameter name → ``"hessian"`` or ``"gauss-newton"``.
        samples: The number of samples averaged over.
        columns: As asked for: ``None``, ``"rank"``, or r.
        standard_error: Parameter name → standard error of every entry over the random signs, of the parameter's shape;
            empty where it is not known (one signed column per sample); zeros where nothing was sampled.
        generic: The parameters without a curvature rule, measured by the generic path.
        backpropagations: Columns sent per sample, on average.
    """

    values_: dict[str, Tensor]
    kind: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    columns: Columns = None
    standard_error: dict[str, Tensor] = field(default_factory=dict)
    generic: tuple[str, ...] = ()
    backpropagations: float = 0.0

    def __getitem__(self, name: str) -> Tensor:
        """The diagonal of one parameter's block."""
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        """The parameters' names, in the order of the model."""
        return iter(self.values_)

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.values_)

    def __str__(self) -> str:
        """A table: parameter, trace, largest entry, shape, kind."""
        width = max((len(name) for name in self), default=0)
        lines = [f"{'':<{width}}  {'trace':>12}  {'largest':>12}"]
        for name, value in self.items():
            largest = float(value.max()) if value.numel() else 0.0
            path = ", generic path" if name in self.generic else ""
            lines.append(
                f"{name:<{width}}  {float(value.sum()):12.6g}  {largest:12.6g}  {list(value.shape)}  "
                f"{self.kind.get(name, '')}{path}"
            )
        return "\n".join(lines)


def hessian_diagonal(
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
) -> LayerDiagonals:
    r"""Exact diagonal of each block, :math:`\operatorname{diag} H_p = \frac1n \sum_i \sum_c (S_{i,c}^\top J_{p,i})^2`.

    Args:
        model: As in :func:`ms_optim.hessian_trace`, and so are the other arguments.
        data: Inputs ``[N, ...]`` or an iterable of batches.
        columns: ``None``: exact; ``"rank"``; or r leading columns per sample and ``probes`` signed ones, unbiased entry
            by entry.
        loss: A name, or torch's loss module.
        statistics: BatchNorm's.
        generator: Draws the signs.
        probes: m ≥ 1; from 2 on the standard error of every entry is known.
        tolerance: If given, columns are added until √(Σ_j se_j²) ≤ tolerance · √(Σ_j d_j²) for every parameter: the
            error relative to the diagonal in the Euclidean norm; judged as in :func:`ms_optim.hessian_trace`.
        generic: Whether parameters without a curvature rule are measured by gradients per sample.
        max_memory: Bytes; the diagonals themselves come on top.
        process_group: Sum over its ranks.
        progress: A bar for iterables.

    Returns:
        Parameter name → tensor of the parameter's shape, on its device, in float32 or better.

    Raises:
        CurvatureError: As in :func:`ms_optim.hessian_trace`.
        DataError: As there.
        MemoryBudgetError: As there.
        UnsupportedError: As there.
        ValueError: As there.

    Source: arXiv 2106.12612, App. H.

    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> hessian_diagonal(net, torch.tensor([[1.0, 2.0]]))["weight"].tolist()  # p (1 − p) x²
    [[0.25, 1.0], [0.25, 1.0]]
    """
    model = unwrapped(model)
    parameters = trainable(model)
    request = checked_request(
        Request(
            loss=loss_of(loss),
            entries=True,
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

    def finish(totals: Totals) -> LayerDiagonals:
        share = 1 / totals.samples if request.loss.mean else 1.0
        errors = {} if totals.variances is None else {n: v.sqrt() * share for n, v in totals.variances.items()}
        return LayerDiagonals(
            values_={name: value * share for name, value in totals.values.items()},
            kind={name: "hessian" if exact else "gauss-newton" for name, exact in totals.hessian.items()},
            samples=totals.samples,
            columns=columns,
            standard_error=errors,
            generic=tuple(name for name in parameters if name in totals.generic),
            backpropagations=totals.backpropagations / totals.samples,
        )

    diagonals = finish(measure(model, data, parameters, request, finish, process_group))
    bad = [name for name, value in diagonals.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CurvatureError(
            f"the diagonal of {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''} is not finite; the weights or "
            "activations overflow: check them, or measure in float64 with model.double()"
        )
    return diagonals
