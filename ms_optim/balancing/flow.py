"""Flow: which scales of single units the traces decide, and which they do not.

A term e^{−2 (u_j − u_i)} is an edge from unit i to unit j; units that do not move (inputs, logits) are one node, the
*ground*.  The sum of all terms attains its minimum on the units of one strongly connected component with the ground,
and only there: a term that lies on no cycle can be sent to 0 without making another grow.  Hence three kinds of units:

* **balanced**: in the ground's component of the graph of terms with positive curvature;
* **scale-free**: outside of it whatever the curvature (the channels in front of a normaliser), so that all of their
  incoming terms can be sent to 0 by growing.  Their scale means nothing and is pinned, as for layers: rows of norm 1;
* **dead**: outside of it because curvature is exactly 0 on one side (a ReLU that is off for all samples, an output
  weight of 0).  What they add to the sum has infimum 0; their place is that of balanced norms.

All three depend only on which entries are zero and on the graph, which no rescaling changes.  A term with units on one
side only has the ground on the other.  (For terms of three or more units, which products of activations make, this
criterion is sufficient in one direction only; then the residual of the solution says so.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..symmetry.unit_group import NeuronGroup
from .osborne import Terms
from .program import Mask, Matrix, Vector

Labels = NDArray[np.intp]


class Block:
    """The entries of one parameter, gathered by log-scale: rows and columns that always move alike are one.

    Args:
        name: The parameter.
        shape: Its shape.
        rows: Sparse, ``[M, U]``, log-scales of its rows (or entries).
        columns: Sparse, ``[K, U]``, those of its columns; a matrix of one empty row if there are none.
        view: How entries lie in ``[M, K]``: the shape that sums over other axes leave.

    Attributes:
        rows: ``[m, U]``, distinct.
        columns: ``[k, U]``, distinct.
        size: Output units (entries, of a vector) in each class, ``[m, k]``.
    """

    def __init__(self, name: str, shape: tuple[int, ...], rows: Any, columns: Any, view: tuple[int, ...]) -> None:
        self.name, self.shape, self.view = name, shape, view
        self._flat = (rows.shape[0], columns.shape[0])
        self.rows, self._row = _distinct(rows)
        self.columns, self._column = _distinct(columns)
        entries = float(np.prod(shape))
        per_entry = 1.0 if len(shape) < 2 or entries == 0 else shape[0] / entries
        ones = np.full(self._flat, per_entry * entries / max(self._flat[0] * self._flat[1], 1))
        self.size = self._gathered(ones)
        self.signs = [(side > 0, side < 0) for side in (self.rows, self.columns)]

    def table(self, values: Tensor) -> Matrix:
        """Sum a quantity per entry over each class, ``[m, k]``, in float64."""
        extra = [axis for axis, size in enumerate(self.view) if size == 1 and self.shape[axis] > 1]
        values = values.detach().double()
        summed = values.sum(extra) if extra else values
        return self._gathered(summed.reshape(self._flat).cpu().numpy())

    def spread(self, table: Matrix) -> Tensor:
        """The entries' values from those of the classes ``[m, k]``, in a shape that broadcasts to the parameter."""
        return torch.from_numpy(np.ascontiguousarray(table[self._row][:, self._column])).reshape(self.view)

    def _gathered(self, table: Matrix) -> Matrix:
        for index, side in ((self._row, self.rows), (self._column, self.columns)):
            if side.shape[0] < table.shape[0]:
                ones, places = np.ones(len(index)), (index, np.arange(len(index)))
                table = scipy.sparse.csr_matrix((ones, places), shape=(side.shape[0], len(index))) @ table
            table = table.T  # columns in the second round, and back after it
        return np.ascontiguousarray(table, dtype=np.float64)

    def has(self, positive: bool) -> Mask:
        """Whether a term has a unit with that sign, ``[m, k]``."""
        which = 0 if positive else 1
        row, column = (np.asarray(side[which].sum(axis=1)).ravel() > 0 for side in self.signs)
        return np.asarray(row[:, None] | column)

    def components(self, label: Labels) -> Labels:
        """The component that all units of a term are in, ``[m, k]``: −1 if there is none, −2 if they are in several."""
        row, column = (_common(side, label) for side in (self.rows, self.columns))
        a, b = np.broadcast_arrays(row[:, None], column[None])
        result = np.where(a == -1, b, a)
        result = np.where((a >= 0) & (b >= 0) & (a != b), -2, result)
        result = np.where((a == -2) | (b == -2), -2, result)
        ground = label[-1]
        one_sided = ~(self.has(True) & self.has(False)) & (result != -1)
        return np.asarray(np.where(one_sided & (result != ground), -2, result), dtype=np.intp)


@lru_cache(maxsize=16)
def blocks(group: NeuronGroup) -> tuple[Block, ...]:
    """The parameters of a group that move, gathered; cached, because an optimizer asks again at every refresh.

    Args:
        group: The group.

    Returns:
        A block per parameter.
    """
    found = []
    nothing = scipy.sparse.csr_matrix((1, group.units))
    for name, shape in zip(group.parameters, group.shapes, strict=True):
        factors = [factor for factor in group.factors[name] if factor.matrix.nnz]
        if not factors:
            continue
        if len(factors) == 1:
            found.append(Block(name, shape, factors[0].matrix, nothing, factors[0].shape))
            continue
        rows, columns = factors
        if columns.shape[0] == 1:
            found.append(Block(name, shape, rows.matrix, columns.matrix, (rows.shape[0], *columns.shape[1:])))
        else:
            # A grouped convolution: every row has columns of its own, so entries are the rows.
            repeated = np.repeat(np.arange(rows.shape[0]), columns.shape[1])
            found.append(Block(name, shape, rows.matrix[repeated] + columns.matrix, nothing, columns.shape))
    return tuple(found)


def strong_components(
    parts: Sequence[Block], alive: Sequence[Mask], count: int, together: Mask | None = None
) -> Labels:
    """Number the strongly connected components of the units; the ground is the last entry.

    Args:
        parts: The blocks.
        alive: Of each, the terms that count, ``[m, k]``.
        count: U.
        together: Units that are one with the ground.

    Returns:
        ``[U + 1]``.
    """
    edges = scipy.sparse.csr_matrix((count + 1, count + 1))
    for block, mask in zip(parts, alive, strict=True):
        positive, negative = block.has(True), block.has(False)
        (row_up, row_down), (column_up, column_down) = block.signs
        terms = scipy.sparse.csr_matrix(mask.astype(float))
        any_row = scipy.sparse.diags(mask.any(axis=1).astype(float))
        any_column = scipy.sparse.diags(mask.any(axis=0).astype(float))
        inside = column_down.T @ terms.T @ row_up + row_down.T @ terms @ column_up
        inside = inside + row_down.T @ any_row @ row_up + column_down.T @ any_column @ column_up
        inside = scipy.sparse.csr_matrix(inside.astype(float))
        inside.resize((count + 1, count + 1))
        edges = edges + inside
        one_sided = ((mask & ~negative, (row_up, column_up), True), (mask & ~positive, (row_down, column_down), False))
        for lacking, sides, upwards in one_sided:
            reached = np.zeros(count)
            for side, axis in zip(sides, (1, 0), strict=True):
                reached += np.asarray(side.T @ lacking.any(axis=axis).astype(float)).ravel()
            units = np.flatnonzero(reached)
            ends = (np.full(len(units), count), units) if upwards else (units, np.full(len(units), count))
            edges = edges + scipy.sparse.csr_matrix((np.ones(len(units)), ends), shape=edges.shape)
    if together is not None:
        units = np.flatnonzero(together)
        for ends in ((units, np.full(len(units), count)), (np.full(len(units), count), units)):
            edges = edges + scipy.sparse.csr_matrix((np.ones(len(units)), ends), shape=edges.shape)
    return cast(Labels, connected_components(edges, directed=True, connection="strong")[1])


def restricted(block: Block, table: Matrix, t: Vector, units: NDArray[np.intp], sign: float = 1.0) -> Terms:
    """The terms of a block as a function of some units, the others staying where they are.

    Args:
        block: The block.
        table: D, ``[m, k]``.
        t: All scales, ``[U]``; those of ``units`` count as 0.
        units: Which move.
        sign: −1 for terms that grow as e^{2a} (as functions of −t).

    Returns:
        The terms.
    """
    still = t.copy()
    still[units] = 0.0
    fixed = Terms(sign * block.rows, sign * block.columns, table).at(still)
    return Terms(block.rows[:, units], block.columns[:, units], fixed)


def _distinct(matrix: Any) -> tuple[Any, Labels]:
    """The distinct rows of a sparse matrix, and which of them each row is."""
    matrix = matrix.tocsr()
    matrix.sort_indices()
    index: dict[tuple[bytes, bytes], int] = {}
    label = np.empty(matrix.shape[0], dtype=np.intp)
    kept = []
    for i in range(matrix.shape[0]):
        span = slice(matrix.indptr[i], matrix.indptr[i + 1])
        key = (matrix.indices[span].tobytes(), matrix.data[span].tobytes())
        if key not in index:
            kept.append(i)
        label[i] = index.setdefault(key, len(index))
    return matrix[kept], label


def _common(side: Any, label: Labels) -> Labels:
    """The component of each row's units: −1 if it has none, −2 if they are in several."""
    found = np.full(side.shape[0], -1, dtype=np.intp)
    for i in range(side.shape[0]):
        components = set(label[side.indices[side.indptr[i] : side.indptr[i + 1]]].tolist())
        if components:
            found[i] = components.pop() if len(components) == 1 else -2
    return found
