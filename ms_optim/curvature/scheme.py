r"""Schemes: which columns of S are sent, and what is made of them.

* *exact*: all of them.
* *rank*: the leading ones, as many as represent P to rounding (proved from p before they are sent).
* *sampled*: the r leading columns of each sample and m independent signed columns for the rest, whose mean is unbiased
  and whose scatter gives the standard error.
* *adaptive*: r grows until the standard error, found with signed columns of its own, is below a tolerance with some
  margin; the estimate and its standard error are then made with fresh ones, so that stopping biases neither.

Source: our own; P and its columns as in arXiv 2106.12612, Prop. 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reading import Columns, Reading
from .request import Request, Totals
from .rules.contraction import wide

# Columns are added until the pilot's variance is this part of what is tolerated: a variance of few signs is itself
# uncertain, and was selected for being small.
_MARGIN = 0.5

# Columns of S are made for as many classes and samples as fit in this, and then the next.
_COLUMN_BYTES = 16 * 2**20


@dataclass
class Estimate:
    """What one chunk of samples adds.

    Attributes:
        values: Per parameter Σ_i: scalars in float64 for traces, else the parameter's shape.
        variances: Their variance over the signs; ``None``: there is none, or one signed column does not show it.
        columns: The number of columns sent.
    """

    values: list[Tensor]
    variances: list[Tensor] | None
    columns: int


class Scheme:
    """The scheme of a request.

    Args:
        request: The request.
        totals: What was measured so far; an adaptive scheme looks at the running standard error.
    """

    def __init__(self, request: Request, totals: Totals) -> None:
        self.request, self.totals = request, totals
        self._begin = request.columns if isinstance(request.columns, int) else 1  # where an adaptive chunk begins

    def noise(self, samples: int, classes: int) -> Tensor | None:
        """The signs of a whole batch, ``[m, N, rank]``, so that they do not depend on how it is split.

        Args:
            samples: N.
            classes: K.

        Returns:
            ``None`` where no signs are drawn, or how many cannot be known beforehand.
        """
        request = self.request
        if not isinstance(request.columns, int) or request.tolerance is not None:
            return None
        return request.loss.noise(samples, classes, request.probes, request.generator)

    def columns(self, classes: int) -> int:
        """At most how many columns are accumulated together."""
        rank = self.request.loss.rank(classes)
        sampled = isinstance(self.request.columns, int) and self.request.tolerance is None
        return min(rank, self.request.columns + 1) if sampled else rank  # type: ignore[operator]

    def estimate(self, reading: Reading, noise: Tensor | None, group: int | None) -> Estimate:
        """The sums of one chunk.

        Args:
            reading: The forward pass.
            noise: :meth:`noise`, cut to the chunk's samples; ``None``: to be drawn for it alone.
            group: How many columns go into one accumulator; ``None``: all.

        Returns:
            The estimate.
        """
        request, loss, logits = self.request, self.request.loss, reading.logits
        rank = loss.rank(reading.classes)
        if request.tolerance is not None:
            return self._adaptive(reading, group)
        if isinstance(request.columns, int):
            noise = self.noise(reading.samples, reading.classes) if noise is None else noise
            assert noise is not None
            if request.columns < rank - 1:
                return self._sampled(reading, *loss.sampled(logits, request.columns, noise), group)
        if request.columns == "rank":
            rank = loss.numerical_rank(logits, torch.finfo(wide(logits).dtype).eps)
        return self._exact(reading, 0, rank, group)

    def _exact(self, reading: Reading, start: int, stop: int, group: int | None) -> Estimate:
        """Some columns, and nothing left out."""
        whole = start == 0 and stop == self.request.loss.rank(reading.classes)
        make = self.request.loss.exact if whole else self.request.loss.leading
        sums = reading.reduced(reading.sums(_in_pieces(make, reading.logits), start, stop, group))
        return Estimate(sums, None, stop - start)

    def _sampled(self, reading: Reading, leading: Tensor, signed: Tensor, group: int | None) -> Estimate:
        """r columns, and the mean of m signed ones."""
        count = len(leading) + len(signed)
        if len(signed) == 1:
            sums = reading.sums(_given(torch.cat([leading, signed])), 0, count, group)
            return Estimate(reading.reduced(sums), None, count)
        mean, variance = self._scatter(reading, signed)
        if len(leading):
            mean = _added(reading.sums(_given(leading), 0, len(leading), group), mean)
        return Estimate(reading.reduced(mean), reading.reduced(variance), count)

    def _scatter(self, reading: Reading, signed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Mean, and variance of the mean, over independent signed columns: per sample for traces, else per entry."""
        means, variances = [], []
        columns = _given(signed)
        for each in zip(*(reading.sums(columns, c, c + 1, None) for c in range(len(signed))), strict=True):
            stack = torch.stack(each) if self.request.entries else torch.stack(each).double()
            means.append(stack.mean(0))
            variances.append(stack.var(0) / len(each))
        return means, variances

    def _adaptive(self, reading: Reading, group: int | None) -> Estimate:
        """Columns until the running relative standard error is below the tolerance."""
        loss, logits = self.request.loss, reading.logits
        rank, probes = loss.rank(reading.classes), max(2, self.request.probes)
        done = sent = 0
        base: list[Tensor] | None = None

        def scatter(columns: int) -> tuple[list[Tensor], list[Tensor]]:
            noise = loss.noise(reading.samples, reading.classes, probes, self.request.generator)
            mean, variance = self._scatter(reading, loss.sampled(logits, columns, noise)[1])
            return reading.reduced(mean if base is None else _added(base, mean)), reading.reduced(variance)

        columns = self._begin
        while columns < rank - 1:
            if columns > done:
                new = reading.sums(_in_pieces(loss.leading, logits), done, columns, group)
                base = new if base is None else _added(base, new)
            sent, done = sent + columns - done + probes, columns
            if self._precise(*scatter(columns)):
                self._begin = max(1, columns - 1)
                # Those signs were selected for looking precise; these are not, nor is what they say of their error.
                return Estimate(*scatter(columns), sent + probes)
            columns = max(columns + 1, 2 * columns)
        self._begin = max(1, done)
        rest = self._exact(reading, done, rank, group)
        values = rest.values if base is None else _added(reading.reduced(base), rest.values)
        return Estimate(values, rest.variances, sent + rest.columns)

    def _precise(self, values: Sequence[Tensor], variances: Sequence[Tensor]) -> bool:
        """Whether, with this chunk, every parameter's relative standard error is well within the tolerance."""
        totals, tolerance = self.totals, self.request.tolerance
        assert totals.variances is not None and tolerance is not None
        excess = []
        for name, value, variance in zip(totals.values, values, variances, strict=True):
            total, spread = totals.values[name] + value, totals.variances[name] + variance
            # Of a diagonal the whole is judged, in the Euclidean norm: single entries may be as good as zero.
            excess.append((spread.sum() - _MARGIN * tolerance**2 * total.square().sum()).double())
        return bool(torch.stack(excess).max() <= 0)


def _in_pieces(make: Callable[[Tensor, int, int], Tensor], logits: Tensor) -> Columns:
    """Columns of a factor, so many at a time that not all of them are there at once."""
    step = max(1, _COLUMN_BYTES // max(1, logits.numel() * logits.element_size()))

    def columns(start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, step):
            yield make(logits, first, min(first + step, stop))

    return columns


def _given(columns: Tensor) -> Columns:
    """Columns that are there already."""
    return lambda start, stop: iter((columns[start:stop],))


def _added(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Parameter by parameter."""
    return [a + b for a, b in zip(first, second, strict=True)]
