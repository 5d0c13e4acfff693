r"""The trace of every layer's Hessian block, exactly, in one forward and K − 1 backpropagations to activations.

    c_p = Tr H_p = (1/n) Σ_i ‖S_iᵀ J_{p,i}‖²_F ,        S Sᵀ = diag(p) − p pᵀ ,    J_{p,i} = ∂o_i / ∂W_p

for the cross-entropy of logits o that are piecewise linear in W_p; elsewhere this is the trace of the Gauss-Newton
block, and :attr:`LayerTraces.kind` says which of the two each number is.  Labels do not enter, and the value is never
negative.

Differs from the paper: (1) the norms are squared, as its derivation and its code have them; (2) K − 1 columns instead
of K + 1 backward passes, sent to layer outputs only; (3) no gradient per sample is formed.

Source: arXiv 2106.12612, Prop. 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batch import Batch, batches, class_logits
from ..errors import CurvatureError, DataError, UnsupportedError
from .backprop import backpropagate, deltas, require_separate_samples
from .contraction import Broadcast, Columns, Contraction
from .evaluation import Statistics, evaluation
from .layers import contraction
from .logit_factor import exact_columns, probe, sampled_columns
from .tape import Node, Tape, Use, read_tape

# Up to this many entries S is made once; beyond, column by column, so that memory does not grow with K².
_WHOLE_FACTOR = 2**22


@dataclass(frozen=True)
class LayerTraces(Mapping[str, float]):
    """Parameter name → trace of its diagonal block, in units of loss per squared weight.

    Attributes:
        values_: The traces.
        kind: Parameter name → ``"hessian"`` or ``"gauss-newton"``.
        samples: The number of samples averaged over.
        columns: Exact columns per sample; ``None`` if all.
    """

    values_: dict[str, float]
    kind: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    columns: int | None = None

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
        """A table: parameter, trace, kind."""
        width = max((len(name) for name in self), default=0)
        how = "exact" if self.columns is None else f"{self.columns} exact columns and one signed"
        lines = [f"{name:<{width}}  {value:12.6g}  {self.kind.get(name, '')}" for name, value in self.items()]
        return "\n".join([*lines, f"{'total':<{width}}  {self.total:12.6g}  {self.samples} samples, {how}"])


def hessian_trace(
    model: nn.Module,
    data: Any,
    columns: int | None = None,  # r: exact columns of S per sample; None: all
    loss: str = "cross_entropy",
    statistics: Statistics = "running",
    generator: torch.Generator | None = None,
) -> LayerTraces:
    r"""Exact trace of each diagonal block, :math:`\operatorname{Tr} H_p = \frac1n \sum_i \|S_i^\top J_{p,i}\|_F^2`.

    The parameters are those with ``requires_grad``; one that the logits do not depend on has trace 0.  Nothing is
    disturbed: modes, buffers, ``.grad`` and the random streams are as before.

    Args:
        model: A classifier; called in evaluation mode (no dropout, BatchNorm's statistics constant).
        data: Inputs ``[N, ...]`` or an iterable of batches (a DataLoader, a list); each a tensor, a dictionary or
            ``(inputs, targets)``, whose targets are never read. A bare tuple is one batch.
        columns: ``None``: all K − 1 columns of S, exact. ``r``: the r leading columns of each sample exactly and one
            signed column for the rest: unbiased, and r + 1 backpropagations whatever K is.
        loss: ``"cross_entropy"``, averaged over samples.
        statistics: BatchNorm's: the ``"running"`` ones, those of each ``"batch"``, or those that a forward pass in the
            model's present modes uses (``"training"``), always held constant.
        generator: Draws the signs of ``columns=r``; by default a fresh one with a fixed seed, so that the same call
            gives the same numbers.

    Returns:
        Parameter name → trace, in units of loss per squared weight, with the ``kind`` of each.

    Raises:
        CurvatureError: If a parameter is used where no curvature rule applies, the samples are not on the first axis,
            the model has no trainable parameter, or a trace is not finite. (Each sample's logits must depend on that
            sample alone; that is checked where positions are folded into the first axis, and not elsewhere.)
        DataError: If data is not batches, is empty or not finite, or logits are not ``[N, K]``.
        UnsupportedError: If the loss is another one.
        ValueError: If ``columns`` is negative.

    Source: arXiv 2106.12612, Prop. 1, with squared norms.

    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> round(hessian_trace(net, torch.ones(4, 3))["weight"], 6)  # ‖x‖² (1 − 1/K) = 3 / 2
    1.5
    """
    _require_cross_entropy(loss)
    if columns is not None and columns < 0:
        raise ValueError(f"columns must be >= 0 or None, got {columns}; None is exact")
    parameters = trainable(model)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    device = next(iter(parameters.values())).device
    sums: Tensor | None = None
    samples = 0
    checked = False
    hessian = dict.fromkeys(parameters, True)
    with evaluation(model, statistics):
        for index, batch in enumerate(batches(data, model)):
            batch.check_finite(index)
            tape, squares, n = _batch_sums(
                model, batch.to(device), parameters, columns, generator, index, check=not checked
            )
            sums = squares if sums is None else sums + squares
            samples += n
            checked = checked or n > 1  # a batch of one sample shows no order
            hessian = {name: hessian[name] and tape.kind[name] == "hessian" for name in hessian}
    assert sums is not None  # batches() refuses an empty iterable
    values = dict(zip(parameters, (sums / samples).tolist(), strict=True))
    bad = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
    if bad:
        raise CurvatureError(
            f"the trace of {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''} is not finite ({values[bad[0]]}); the "
            "weights or activations overflow: check them, or measure in float64 with model.double()"
        )
    kind = {name: "hessian" if exact else "gauss-newton" for name, exact in hessian.items()}
    return LayerTraces(values, kind, samples, columns)


def weighted_trace(
    model: nn.Module,
    batch: Batch,
    weights: Mapping[str, float],  # w_p
    generator: torch.Generator,
    statistics: Statistics = "training",
) -> Tensor:
    r"""An unbiased, differentiable estimate of Σ_p w_p c_p from one signed column s, E s sᵀ = P.

    The column depends on the probabilities, and that dependence is part of the gradient.  To be called inside
    :func:`~ms_optim.curvature.evaluation.evaluation`, where it may be differentiated with respect to the parameters.

    Args:
        model: The model.
        batch: The inputs.
        weights: Parameter name → w_p; what is missing or 0 is left out.
        generator: Draws the signs.
        statistics: As in :func:`hessian_trace`.

    Returns:
        A scalar in the graph of the parameters.

    Raises:
        CurvatureError: If a parameter is used where no curvature rule applies.
        DataError: If the logits are not ``[N, K]`` or not finite.
    """
    # Fused attention kernels have no second derivative.
    with evaluation(model, statistics), sdpa_kernel(SDPBackend.MATH):
        logits = finite_logits(batch.logits(model), None)
        samples = logits.shape[0]
        wanted = {name: p for name, p in trainable(model).items() if weights.get(name, 0.0) != 0.0}
        tape = read_tape(logits, wanted)
        sites = _sites(tape, samples)
        nodes = _nodes(sites)
        if not nodes:
            return logits.new_zeros(())
        column = probe(logits, generator)
        found = deltas(logits, nodes, column[None], create_graph=True)
        at = {node: Columns([delta]) for node, delta in zip(nodes, found, strict=True)}
        terms = [weights[name] * _squared_norm(site, at) for name, site in sites.items()]
        return torch.stack(terms).sum() / samples


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that traces are computed for: name → parameter with ``requires_grad``, each tensor once.

    Args:
        model: The model.

    Returns:
        The parameters, in the model's order.

    Raises:
        CurvatureError: If there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise CurvatureError(
            f"{type(model).__name__} has no parameter with requires_grad=True; call model.requires_grad_() "
            "to measure a frozen copy"
        )
    return found


def finite_logits(logits: Tensor, index: int | None) -> Tensor:
    """Logits that are ``[N, K]``, finite and in the graph.

    Args:
        logits: What the model returned.
        index: The batch's position, for the message.

    Returns:
        The same tensor.

    Raises:
        DataError: If they are not.
    """
    class_logits(logits)
    if not bool(torch.isfinite(logits).all()):
        where = "the batch" if index is None else f"batch {index}"
        raise DataError(f"the logits of {where} are not finite; the weights may have diverged, or overflow")
    if logits.grad_fn is None and not logits.requires_grad:
        raise CurvatureError(
            "the logits are not in autograd's graph (a detach, torch.no_grad or inference mode inside the model?); "
            "the trace needs a differentiable forward pass"
        )
    return logits


def _require_cross_entropy(loss: str) -> None:
    """The only loss with a logit factor so far."""
    if loss != "cross_entropy":
        raise UnsupportedError(f"loss={loss!r} is not supported yet; the trace is for loss='cross_entropy'")


def _batch_sums(
    model: nn.Module,
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    columns: int | None,
    generator: torch.Generator,
    index: int,
    check: bool,
) -> tuple[Tape, Tensor, int]:
    """The tape, Σ_i ‖S_iᵀ J_{p,i}‖² per parameter in float64, and n, of one batch."""
    logits = finite_logits(batch.logits(model), index)
    samples, classes = logits.shape
    tape = read_tape(logits, parameters)
    with torch.no_grad():
        sites = _sites(tape, samples)
        nodes = _nodes(sites)
        total = torch.zeros(len(parameters), dtype=torch.float64, device=logits.device)
        if not nodes:
            return tape, total, samples
        if columns is None or columns >= classes - 2:
            count = classes - 1
            whole = exact_columns(logits) if count * logits.numel() <= _WHOLE_FACTOR else None

            def column(start: int, stop: int) -> Tensor:
                return exact_columns(logits, start, stop) if whole is None else whole[start:stop]
        else:
            sampled = sampled_columns(logits, columns, generator)
            count = len(sampled)

            def column(start: int, stop: int) -> Tensor:
                return sampled[start:stop]

        norms_only = {node: True for node in nodes}
        for site in sites.values():
            for use, rule in site:
                norms_only[use.node] &= len(site) == 1 and rule.norms_suffice
        for group, at in enumerate(backpropagate(logits, norms_only, count, column)):
            if check and group == 0:
                _require_samples_first(logits, sites, at, column(0, 1)[0])
            norms = {name: _squared_norm(site, at) for name, site in sites.items()}
            zero = logits.new_zeros(())
            total += torch.stack([norms.get(name, zero).double() for name in parameters])
            at.clear()  # these columns go before the next ones come
    return tape, total, samples


Site = list[tuple[Use, Contraction]]


def _sites(tape: Tape, samples: int) -> dict[str, Site]:
    """Parameter name → its uses with their contractions, for parameters that are used."""
    return {name: [(use, contraction(use, samples)) for use in uses] for name, uses in tape.uses.items() if uses}


def _nodes(sites: Mapping[str, Site]) -> list[Node]:
    """The nodes at which δ is needed, each once."""
    return list(dict.fromkeys(use.node for site in sites.values() for use, _ in site))


def _squared_norm(site: Site, at: Mapping[Node, Columns]) -> Tensor:
    """Σ_cn ‖g_cn‖²; the gradients of a parameter with several uses add before they are squared."""
    if len(site) == 1:
        ((use, rule),) = site
        return rule.squared_norm(at[use.node])
    total = torch.stack([rule.gradients(at[use.node]) for use, rule in site]).sum(0)
    return total.square().sum()


def _require_samples_first(
    logits: Tensor, sites: Mapping[str, Site], at: Mapping[Node, Columns], column: Tensor
) -> None:
    """Where positions are folded into the first axis, check that it is sample-major; two more backpropagations."""
    doubtful: dict[Node, Use] = {}
    for site in sites.values():
        for use, rule in site:
            if at[use.node].shape[0] != logits.shape[0] or isinstance(rule, Broadcast):
                doubtful.setdefault(use.node, use)
    require_separate_samples(logits, list(doubtful.values()), column)
