r"""A reading: one forward pass, the uses found on its tape, and the squares of columns sent to them.

A parameter without a rule is measured by its gradients themselves, one sample at a time (vector-Jacobian products
under ``vmap``): exact and slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..errors import CurvatureError, DataError, MsOptimError, NoRuleError
from .budget import columns_together
from .graph.backprop import (
    Sink,
    find_layouts,
    lowest,
    no_layout,
    send_one_by_one,
    send_together,
    undifferentiable,
)
from .graph.layout import Layout, Order
from .graph.lift import Lift, Pooled, lifts
from .graph.tape import Node, Tape, Use, operation, read_tape
from .losses.loss import Loss
from .request import Request
from .rules.contraction import Accumulator, Contraction, Piece, wide
from .rules.layers import contraction, has_rule
from .rules.shared import Shared, shared

# Gradients of as many columns as fit in this are taken together on the generic path.
_GRADIENT_BYTES = 64 * 2**20


# First column, one past the last -> these columns of a factor in pieces [c, n, K], so that not all are held at once.
Columns = Callable[[int, int], Iterator[Tensor]]

# Parameter, index and path of a use -> where its samples were found, and the positions of each that were there.
Orders = dict[tuple[str, int, str], tuple[Order, int]]


class Reading:
    """One forward pass of one chunk, and the accumulators of its uses."""

    def __init__(
        self,
        logits: Tensor,
        parameters: Mapping[str, nn.Parameter],
        request: Request,
        orders: Orders,
    ) -> None:
        self.logits, self.parameters, self.request = logits, parameters, request
        self.samples, self.classes = logits.shape
        self.batchable = True  # whether columns may go together under vmap
        self.tape: Tape = read_tape(logits, parameters)
        self.generic: list[str] = []
        self.rules: dict[str, list[Contraction]] = {}
        used = {name: uses for name, uses in self.tape.uses.items() if uses}
        layouts = self._layouts(orders, used)
        for name, uses in used.items():
            try:
                self.rules[name] = [self._rule(use, layouts[use.node]) for use in uses]
            except NoRuleError:
                if not request.generic:
                    raise
                self.generic.append(name)
        self.nodes: list[Node] = list(dict.fromkeys(rule.use.node for rules in self.rules.values() for rule in rules))

    @cached_property
    def ends(self) -> list[Node]:
        """The places of uses below which there is none."""
        return lowest(self.tape.order, self.nodes)

    @cached_property
    def lifts(self) -> dict[Node, Lift]:
        """The places of uses whose δ is known from a pooling above."""
        return lifts(self.tape.order, self.nodes)

    def _rule(self, use: Use, layout: Layout | None) -> Contraction:
        """The contraction of a use, if it has one."""
        if layout is None:
            raise no_layout(use, self.samples)
        return contraction(use, layout)

    def _layouts(self, orders: Orders, used: Mapping[str, Sequence[Use]]) -> dict[Node, Layout | None]:
        """Where the samples are: as the graph proves, as was found before, or as is found now."""
        proved = self.tape.layouts
        layouts: dict[Node, Layout | None] = {}
        doubtful = {}
        for name, uses in used.items():
            for i, use in enumerate(uses):
                order, times = orders.get((name, i, use.path), (None, 0))
                if use.node in proved:
                    layouts[use.node] = proved[use.node]
                elif order is not None and Layout(self.samples, order).holds(use.output_shape, times):
                    layouts[use.node] = Layout(self.samples, order)
                elif has_rule(use):
                    doubtful[name, i, use.path] = use
                else:
                    layouts[use.node] = Layout(self.samples)  # its rule, or that it has none, will say more
        try:
            fitting = find_layouts(self.logits, list(doubtful.values())) if doubtful else {}
        except Exception as error:
            self._explain(error)
        layouts |= {node: found[0] if found else None for node, found in fitting.items()}
        for key, use in doubtful.items():
            found = fitting[use.node]
            if len(found) == 1 and self.samples > 1:  # what these samples leave open, others have to show
                orders[key] = found[0].order, found[0].times(use.output_shape)
        return layouts

    def sums(self, columns: Columns, start: int, stop: int, group: int | None) -> list[Tensor]:
        """Σ_c of the squares for some columns: ``[n]`` per parameter for traces, else the parameter's shape.

        Args:
            columns: Makes them.
            start: The first.
            stop: One past the last.
            group: How many go into one accumulator; ``None``: all.
        """
        group = max(1, stop - start if group is None else group)
        total: list[Tensor] | None = None
        for first in range(start, stop, group):
            found = self._group_sums(columns, first, min(first + group, stop))
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return total if total is not None else [self._zero(p) for p in self.parameters.values()]

    def reduced(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """The sums over the chunk's samples: scalars in float64 for traces; diagonals are sums already."""
        if self.request.entries:
            return list(sums)
        return list(torch.stack(list(sums)).sum(1, dtype=torch.float64).unbind())

    def _zero(self, parameter: Tensor) -> Tensor:
        """No contribution."""
        dtype = wide(parameter.detach().reshape(-1)[:0]).dtype
        shape = parameter.shape if self.request.entries else (self.samples,)
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    def _group_sums(self, columns: Columns, start: int, stop: int) -> list[Tensor]:
        """The same for columns that share their accumulators."""
        entries, count = self.request.entries, stop - start
        waiting: dict[Node, list[Accumulator]] = {node: [] for node in self.nodes}
        results: dict[str, Accumulator | Shared] = {}
        several: list[Shared] = []
        for name, rules in self.rules.items():
            if len(rules) == 1:
                found = rules[0].diagonal(count) if entries else rules[0].trace(count)
                results[name] = found
                waiting[rules[0].use.node].append(found)
                continue
            together = shared(rules, entries)
            several.append(together)
            results[name] = together
            for rule in rules:
                waiting[rule.use.node].append(together.part(rule))

        def sink(accumulators: list[Accumulator]) -> Sink:
            def take(delta: Tensor | Pooled) -> None:
                piece = Piece(delta)
                for accumulator in accumulators:
                    accumulator.add(piece)

            return take

        def after() -> None:
            for together in several:
                together.flush()

        if waiting:
            sinks = {node: sink(accumulators) for node, accumulators in waiting.items()}
            at_once = columns_together(self.nodes, self.logits.device) if self.batchable else 1
            lifted = {}
            if at_once == 1:
                for node, lift in self.lifts.items():  # at an end there is nothing below that asks for δ itself
                    if node in self.ends or all(each.prefers(lift) for each in waiting[node]):
                        lifted[node] = lift
            try:
                if at_once > 1:
                    send_together(self.logits, sinks, columns(start, stop), at_once, after)
                else:
                    send_one_by_one(self.logits, sinks, self.ends, lifted, columns(start, stop), after)
            except Exception as error:
                if at_once == 1:
                    self._explain(error)
                self.batchable = False  # an operation that vmap cannot batch: everything once more, column by column
                return self._group_sums(columns, start, stop)
        if self.generic:
            parameters = [self.parameters[name] for name in self.generic]
            kept = self.tape.activation_bytes + sum(p.numel() * p.element_size() for p in parameters)
            gradients = _Gradients(self.logits, parameters, entries, max(1, _GRADIENT_BYTES // kept))
            try:
                for piece in columns(start, stop):
                    gradients.add(piece)
            except Exception as error:
                self._explain(error)
            results |= dict(zip(self.generic, gradients.parts(), strict=True))
        return [
            results[name].result() if name in results else self._zero(p) for name, p in self.parameters.items()
        ]

    def _explain(self, error: Exception) -> NoReturn:
        """Raise the error of an operation that has no derivative, by its name; others as they are."""
        if isinstance(error, (MsOptimError, torch.OutOfMemoryError)):
            raise error
        culprit = undifferentiable(self.logits, self.tape.order)
        if culprit is None:
            raise error
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        below = [names[id(n.variable)] for n in _below(culprit) if id(getattr(n, "variable", None)) in names]
        listed = ", ".join(below[:3]) + (" …" if len(below) > 3 else "")
        raise CurvatureError(
            f"{operation(culprit)} cannot be differentiated ({type(error).__name__}: {error}); it lies between the "
            f"logits and {listed or 'the inputs'}. Give it a backward pass, or freeze what is below it "
            "(requires_grad_(False)) to leave that out"
        ) from error


def _below(node: Node) -> list[Node]:
    """All nodes below one."""
    seen, stack = {node}, [node]
    while stack:
        for source, _ in stack.pop().next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    return list(seen)


class _Gradients:
    """The generic path: gradients of one sample's logits, and their squares.

    Args:
        logits: ``[1, K]``.
        parameters: The parameters.
        entries: Whether the squares are wanted one by one, rather than summed.
        together: How many columns may go together.
    """

    def __init__(self, logits: Tensor, parameters: Sequence[Tensor], entries: bool, together: int) -> None:
        assert len(logits) == 1  # gradients of several samples would be added before they are squared
        self.logits, self.parameters, self.entries, self.together = logits, parameters, entries, together
        self.totals: list[Tensor] | None = None

    def add(self, columns: Tensor) -> None:
        """Take ``[c, 1, K]``."""
        for part in columns.to(self.logits.dtype).split(self.together):
            squares = [wide(g).square() for g in self._gradients(part)]
            squares = [s.sum(0) if self.entries else s.sum()[None] for s in squares]
            self.totals = squares if self.totals is None else [a + b for a, b in zip(self.totals, squares, strict=True)]

    def _gradients(self, columns: Tensor) -> Sequence[Tensor]:
        """``[c, *parameter.shape]`` for each parameter."""
        try:
            return self._sent(columns, is_grads_batched=True)
        except Exception:  # noqa: BLE001 - an operation that vmap cannot batch, or none that can be differentiated
            each = [self._sent(c) for c in columns]
            return [torch.stack(parts) for parts in zip(*each, strict=True)]

    def _sent(self, columns: Tensor, **how: bool) -> list[Tensor]:
        """What arrives at the parameters: zeros where an operation passes nothing on."""
        found = torch.autograd.grad(
            self.logits, self.parameters, columns, retain_graph=True, allow_unused=True, materialize_grads=False, **how
        )
        lead = columns.shape[:-2]
        return [p.new_zeros(*lead, *p.shape) if g is None else g for g, p in zip(found, self.parameters, strict=True)]

    def parts(self) -> list[_Done]:
        """One result per parameter."""
        assert self.totals is not None
        return [_Done(total) for total in self.totals]


@dataclass
class _Done(Accumulator):
    """A sum that is ready."""

    total: Tensor

    def add(self, piece: Piece) -> None:
        """Nothing more can be added."""
        raise AssertionError("a finished sum takes no columns")

    def result(self) -> Tensor:
        """See the base class."""
        return self.total


def finite_logits(logits: Tensor, index: int | None, loss: Loss, in_graph: bool = True) -> Tensor:
    """Logits that are ``[N, K]``, finite and in the graph.

    Args:
        logits: What the model returned.
        index: The batch's position, for the message.
        loss: Says which shapes it takes.
        in_graph: Whether they have to be in autograd's graph.

    Returns:
        ``[N, K]``.

    Raises:
        DataError: If they have another shape or are not finite.
        CurvatureError: If they are not in the graph.
    """
    logits = loss.logits(logits)
    if not math.isfinite(float(logits.detach().double().sum())):
        bad = (~torch.isfinite(logits.detach())).any(1)
        where = "the batch" if index is None else f"batch {index}"
        if bool(bad.any()):  # else it is their sum that overflows
            raise DataError(
                f"the logits of {where} are not finite for {int(bad.sum())} of {len(bad)} samples (the first is sample "
                f"{int(bad.int().argmax())}); the weights may have diverged, or overflow"
            )
    if in_graph and logits.grad_fn is None and not logits.requires_grad:
        raise CurvatureError(
            "the logits are not in autograd's graph (a detach, torch.no_grad or inference mode inside the model?); "
            "the trace needs a differentiable forward pass"
        )
    return logits
