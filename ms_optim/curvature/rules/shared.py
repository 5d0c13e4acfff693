r"""Sharing: a parameter with several uses, whose gradients add before they are squared.

The uses of a linear map are one use over all their positions together: Σ_u Σ_v δ_uv ⊗ U_uv, whose norm is found like
any other (:class:`Joined`).  Otherwise the gradients of a column are formed, added and squared (:class:`Added`).

Source: derived; the concatenation of positions as in arXiv 2106.12612, App. H, for those of one use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .contraction import Accumulator, Contraction, Piece, row_squares, slices, wide
from .outer import Outer, PlainLinear


class Shared(ABC):
    """The sum over the columns of what several uses of one parameter have together."""

    @abstractmethod
    def part(self, rule: Contraction) -> Accumulator:
        """What takes δ of one of the uses."""

    @abstractmethod
    def flush(self) -> None:
        """All uses have had the present columns."""

    @abstractmethod
    def result(self) -> Tensor:
        """As :meth:`.contraction.Accumulator.result`."""


def shared(rules: Sequence[Contraction], entries: bool) -> Shared:
    """The accumulator of a parameter with several uses.

    Args:
        rules: Their contractions.
        entries: Whether the diagonal is wanted, rather than the trace.

    Returns:
        The accumulator.
    """
    outers = joinable(rules)
    return Added(entries) if outers is None else Joined(rules, outers, entries)


def joinable(rules: Sequence[Contraction]) -> list[Outer] | None:
    """The uses as outer products over positions that can be put side by side; ``None`` if they cannot."""
    found: list[Outer] = []
    for rule in rules:
        if isinstance(rule, PlainLinear) and rule.as_outer is not None:
            found.append(rule.as_outer())
        elif isinstance(rule, Outer):
            found.append(rule)
        else:
            return None
    return found if len({_form(rule) for rule in found}) == 1 else None


def _form(rule: Outer) -> tuple[object, ...]:
    """How g is laid out: of two uses that agree in it the gradients can be added as they are."""
    kind = "linear" if rule.use.operation in ("Addmm", "Mm") else rule.use.operation
    return rule.sizes[:3], rule.use.transposed, kind, getattr(rule.use.node, "_saved_transposed", None)


class Joined(Shared):
    """Uses of a linear map as one with the positions of all: keeps δ of all columns, and forms no gradient but slices.

    Args:
        rules: The contractions of the uses.
        outers: The same as outer products of equal sizes.
        entries: Whether the diagonal is wanted.
    """

    def __init__(self, rules: Sequence[Contraction], outers: Sequence[Outer], entries: bool) -> None:
        self.rules, self.outers, self.entries = rules, outers, entries
        self.deltas: list[list[Tensor]] = [[] for _ in rules]

    def part(self, rule: Contraction) -> Accumulator:
        """See the base class."""
        return _Kept(self.deltas[self.rules.index(rule)], self)

    def flush(self) -> None:
        """See the base class."""

    def result(self) -> Tensor:
        """See the base class."""
        groups, outputs, inputs, _ = self.outers[0].sizes
        positions = sum(outer.sizes[3] for outer in self.outers)
        count = sum(len(delta) for delta in self.deltas[0])
        columns = [
            [outer.layout.front(delta, lead=1) for delta in deltas]
            for outer, deltas in zip(self.outers, self.deltas, strict=True)
        ]
        gram = not self.entries and positions * (inputs + outputs * count) < inputs * outputs * count
        largest = max(positions, inputs)
        floats = groups * (positions * inputs + count * outputs * (positions + (positions if gram else inputs)))
        found = []
        for part in slices(self.outers[0].samples, max(floats, groups * largest) * columns[0][0].element_size()):
            u = torch.cat([wide(outer.unfold(outer.source[part])) for outer in self.outers], dim=2)
            d = torch.cat(
                [
                    torch.cat([outer.arrange(piece[:, part]) for piece in pieces], dim=2)
                    for outer, pieces in zip(self.outers, columns, strict=True)
                ],
                dim=3,
            )
            if gram:
                a, b = u @ u.transpose(-1, -2), d.transpose(-1, -2) @ d
                found.append(torch.linalg.vecdot(a.flatten(1), b.flatten(1)))
            elif self.entries:
                g = (d @ u).unflatten(2, (-1, outputs))
                found.append(torch.einsum("ngcoi,ngcoi->goi", g, g))
            else:
                found.append(row_squares(d @ u))
        if self.entries:
            return self.outers[0].shape(torch.stack(found).sum(0))
        return torch.cat(found)


class _Kept(Accumulator):
    """δ of one use, kept."""

    def __init__(self, deltas: list[Tensor], joined: Joined) -> None:
        self.deltas, self.joined = deltas, joined

    def add(self, piece: Piece) -> None:
        """See the base class."""
        self.deltas.append(piece.delta)

    def result(self) -> Tensor:
        """The sum belongs to all uses together."""
        return self.joined.result()


class Added(Shared):
    """Gradients of all uses formed and added, for the columns of one piece, and then squared.

    Args:
        entries: Whether the diagonal is wanted, rather than the trace.
    """

    def __init__(self, entries: bool) -> None:
        self.entries = entries
        self.pending: Tensor | None = None
        self.total: Tensor | None = None

    def part(self, rule: Contraction) -> Accumulator:
        """See the base class."""
        return _Addend(rule, self)

    def flush(self) -> None:
        """See the base class."""
        if self.pending is None:
            return
        g, self.pending = self.pending, None
        if self.entries:
            squares = torch.einsum("cn...,cn...->...", g, g)
        else:
            squares = torch.linalg.vector_norm(g.reshape(*g.shape[:2], -1), dim=-1).square().sum(0)
        self.total = squares if self.total is None else self.total.add_(squares)

    def result(self) -> Tensor:
        """See the base class."""
        assert self.total is not None
        return self.total


class _Addend(Accumulator):
    """One use of a parameter with several."""

    def __init__(self, rule: Contraction, added: Added) -> None:
        self.rule, self.added = rule, added

    def add(self, piece: Piece) -> None:
        """See the base class."""
        g = self.rule.gradients(piece.delta)
        self.added.pending = g if self.added.pending is None else self.added.pending + g

    def result(self) -> Tensor:
        """The sum belongs to all uses together."""
        return self.added.result()
