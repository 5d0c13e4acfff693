"""Labels: the log-scale of every entry of a tensor, as integers that torch can move about like the entries themselves.

A label stands for a log-scale, a linear combination of the system's variables.  A tensor's labels are an integer tensor
that broadcasts to its shape (size 1 along every axis on which nothing varies), so that

    a view, permutation, slice or concatenation of a tensor is the same operation on its labels,
    an equation between tensors is an equation for each *pair* of labels that meet,

and of a million entries of an activation only as many equations are left as it has channels.  Two labels are
special: ``FIXED_LABEL``, the scale 0 of what does not move, and ``ANY``, that of zeros, which equal every multiple of
themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .linear_system import FIXED, LinearSystem, LogScale

#: The label of what no rescaling changes.
FIXED_LABEL = 0
#: The label of zeros, which fit any scale.
ANY = -1


class Labels:
    """The labels in use, and the equations between them.

    Attributes:
        system: The equations on what the labels stand for.
    """

    def __init__(self, system: LinearSystem) -> None:
        self.system = system
        self._expressions: list[LogScale] = [FIXED]
        self._sums: dict[tuple[int, int], int] = {}
        self._multiples: dict[tuple[int, Fraction], int] = {}

    def expression(self, label: int) -> LogScale:
        """What a label stands for; a new variable for ``ANY``."""
        return self.system.variable() if label == ANY else self._expressions[label]

    def named(self, scale: LogScale) -> int:
        """A label for a log-scale."""
        if not scale.terms:
            return FIXED_LABEL
        self._expressions.append(scale)
        return len(self._expressions) - 1

    def fresh(self, *shape: int) -> Tensor:
        """A new variable for every entry of a shape."""
        first, count = len(self._expressions), math.prod(shape)
        self._expressions.extend(self.system.variable() for _ in range(count))
        return torch.arange(first, first + count).reshape(shape)

    def without_any(self, labels: Tensor) -> Tensor:
        """The labels with new variables in place of ``ANY``."""
        missing = labels == ANY
        if not bool(missing.any()):
            return labels
        labels = labels.clone()
        labels[missing] = self.fresh(int(missing.sum()))
        return labels

    def equal(self, first: Tensor, second: Tensor) -> None:
        """Add the equations first = second, entry by entry; shapes broadcast, and ``ANY`` equals everything."""
        a, b = torch.broadcast_tensors(first, second)
        differ = (a != b) & (a != ANY) & (b != ANY)
        pairs = torch.stack([a[differ], b[differ]], dim=1)
        if len(pairs) > 1:
            pairs = torch.unique(pairs, dim=0)
        for one, other in pairs.tolist():
            self.system.equal(self._expressions[one], self._expressions[other])

    def merged(self, terms: Sequence[Tensor]) -> Tensor:
        """The labels that several tensors must share, as the terms of a sum do."""
        result = terms[0] if terms else torch.tensor(ANY)
        for term in terms[1:]:
            self.equal(result, term)
            result = torch.where(result == ANY, term, result)
        return result

    def collapsed(self, labels: Tensor, axes: Iterable[int]) -> Tensor:
        """The labels once they are equal along some axes, which get the size 1."""
        axes = sorted({axis % labels.ndim for axis in axes} if labels.ndim else set())
        if not axes or all(labels.shape[axis] == 1 for axis in axes):
            return labels
        # The largest: a variable if there is any, else FIXED, else ANY.
        result = labels.amax(axes, keepdim=True)
        self.equal(labels, result)
        return result

    def total(self, first: Tensor, second: Tensor) -> Tensor:
        """Labels of s₁ + s₂, entry by entry; zero times anything is zero."""

        def add(one: int, other: int) -> int:
            if one == FIXED_LABEL or other == FIXED_LABEL:
                return one + other
            key = (min(one, other), max(one, other))
            if key not in self._sums:
                self._sums[key] = self.named(self._expressions[one] + self._expressions[other])
            return self._sums[key]

        return _by_pairs(first, second, lambda one, other: ANY if ANY in (one, other) else add(one, other))

    def multiple(self, labels: Tensor, factor: Fraction | int) -> Tensor:
        """Labels of factor · s, entry by entry."""
        factor = Fraction(factor)

        def times(label: int) -> int:
            if label in (ANY, FIXED_LABEL) or factor == 1:
                return label
            if (label, factor) not in self._multiples:
                self._multiples[label, factor] = self.named(self._expressions[label] * factor)
            return self._multiples[label, factor]

        return _by_pairs(labels, torch.tensor(0), lambda label, _: times(label))


def compressed(labels: Tensor) -> Tensor:
    """The same labels, with size 1 along every axis on which they do not vary."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and bool((labels == labels.narrow(axis, 0, 1)).all()):
            labels = labels.narrow(axis, 0, 1)
    return labels.contiguous()


def _by_pairs(first: Tensor, second: Tensor, function: Callable[[int, int], int]) -> Tensor:
    """A function of two labels, called once for every pair that meets."""
    a, b = torch.broadcast_tensors(first, second)
    pairs, position = torch.unique(torch.stack([a.flatten(), b.flatten()], dim=1), dim=0, return_inverse=True)
    values = torch.tensor([function(one, other) for one, other in pairs.tolist()], dtype=torch.int64)
    return values[position].reshape(a.shape)
