"""What a parameter's labels are, which depends on its uses.

* The weight of a linear map or convolution, ``[out, in / groups, ...]``:  a_ji = s_out,j − s_in,i, rows minus columns,
  the same at all positions of a kernel.
* A vector: a label for every entry.
* Another tensor (a table, a position embedding): a label for every index of its last axis (of the second, from four
  axes on), or of the only axis longer than 1.

Tied parameters and several uses of one: r_j − c_i = r'_j − c'_i for all j and i, that is, r_j − r'_j and c_i − c'_i are
one number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .labels import FIXED_LABEL, Labels
from .linear_system import FIXED, LinearSystem, LogScale

_FIXED = torch.tensor(FIXED_LABEL)


@dataclass
class _Weight:
    """How the uses of a parameter see it: rows minus columns, or entry by entry.

    Attributes:
        rows: Labels ``[shape[0]]``.
        columns: Labels ``[groups, shape[1]]``; a = row − column.
        entries: Labels that broadcast to the parameter.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    entries: Tensor | None = None


class WeightLabels:
    """The labels of a model's parameters.

    Args:
        labels: The labels in use.
        parameters: The parameters, each once.
    """

    def __init__(self, labels: Labels, parameters: Iterable[Tensor]) -> None:
        self.labels = labels
        self._known = {id(parameter): _Weight() for parameter in parameters}

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether it is one of the parameters."""
        return id(tensor) in self._known

    def linear(self, tensor: Tensor, inputs: Tensor, outputs: Tensor, groups: int, transposed: bool) -> Tensor:
        """Use a parameter as the weight of a linear map.

        Args:
            tensor: The parameter, ``[out, in / groups, ...]``, or ``[in, out, ...]``.
            inputs: Labels ``[in]``.
            outputs: Labels ``[out]``.
            groups: Groups of a convolution; 1 where the weight is transposed.
            transposed: Whether the first axis is that of the inputs.

        Returns:
            The outputs' labels.
        """
        inputs, outputs = self.labels.without_any(inputs), self.labels.without_any(outputs)
        if transposed:
            rows, columns = self.labels.multiple(inputs, -1), self.labels.multiple(outputs, -1)[None]
        else:
            rows, columns = outputs, inputs.reshape(groups, -1)
        known = self._known[id(tensor)]
        if known.rows is None or known.columns is None:
            known.rows, known.columns = rows, columns
        else:
            self._tie(known.rows, known.columns, rows, columns)
        return outputs

    def entries(self, tensor: Tensor) -> Tensor:
        """Labels entry by entry of a parameter that is not (only) the weight of a linear map.

        Args:
            tensor: The parameter.

        Returns:
            Labels that broadcast to it.
        """
        known = self._known[id(tensor)]
        if known.entries is None:
            shape = [1] * tensor.ndim
            long = [axis for axis, size in enumerate(tensor.shape) if size > 1]
            for axis in long if len(long) == 1 else [1 if tensor.ndim >= 4 else tensor.ndim - 1] if long else []:
                shape[axis] = tensor.shape[axis]
            known.entries = self.labels.fresh(*shape)
        return known.entries

    def factors(self, parameter: Tensor) -> list[tuple[int, Tensor, tuple[int, ...]]]:
        """The log-scale of a parameter as a sum of ± labels, once all of its uses agree.

        Args:
            parameter: The parameter.

        Returns:
            Sign, labels and the shape that broadcasts; nothing if it does not move.
        """
        known, ndim = self._known[id(parameter)], parameter.ndim
        if known.entries is not None and known.rows is not None and known.columns is not None:
            if ndim == 2 and len(known.columns) == 1:
                columns = self.labels.multiple(known.entries, -1).expand(1, parameter.shape[1])
                self._tie(known.rows, known.columns, _FIXED.expand(parameter.shape[0]), columns)
            else:
                self._still(known.rows, known.columns)
                self.labels.equal(known.entries, _FIXED)
        if not parameter.requires_grad:
            if known.rows is not None and known.columns is not None:
                self._still(known.rows, known.columns)
            if known.entries is not None:
                self.labels.equal(known.entries, _FIXED)
            return []
        if known.rows is not None and known.columns is not None:
            rest = (1,) * (ndim - 2)
            groups = len(known.columns)
            columns = known.columns
            if groups > 1:
                columns = columns.repeat_interleave(parameter.shape[0] // groups, dim=0)
            return [(1, known.rows, (parameter.shape[0], 1, *rest)), (-1, columns, (*columns.shape, *rest))]
        if known.entries is not None:
            return [(1, known.entries, tuple(known.entries.shape))]
        return []

    def drop_what_moves_nothing(self, parameters: list[list[Tensor]]) -> None:
        """Fix the directions that move activations only, so that every variable left moves a parameter of its own.

        Args:
            parameters: Of each parameter that moves: labels of its entries, or of its rows and columns.
        """
        still = LinearSystem()  # in which no parameter moves
        for _ in range(self.labels.system.count):
            still.variable()
        seen: dict[int, None] = {}

        def stands(one: int, other: int = FIXED_LABEL) -> None:
            scales = [self.labels.system.solution(self.labels.expression(label)) for label in (one, other)]
            for scale in scales:
                seen.update(dict.fromkeys(scale.terms))
            still.equal(*scales)

        for labels, *columns in parameters:
            if not columns:
                for label in labels.unique().tolist():
                    stands(label)
                continue
            # r_j − c_j0, and the differences of columns, span all r_j − c_ji.
            table = columns[0].expand(len(labels), -1)
            for pair in torch.stack([labels, table[:, 0]], dim=1).unique(dim=0).tolist():
                stands(*pair)
            different = torch.stack([columns[0], columns[0][:, :1].expand_as(columns[0])], dim=-1).reshape(-1, 2)
            for pair in different.unique(dim=0).tolist():
                stands(*pair)
        for variable in seen:
            scale = LogScale({variable: Fraction(1)})
            if still.solution(scale).terms.get(variable) == 1:
                self.labels.system.equal(scale, FIXED)

    def _tie(self, rows: Tensor, columns: Tensor, other_rows: Tensor, other_columns: Tensor) -> None:
        """r_j − c_i = r'_j − c'_i for all j and i, in every group."""
        if columns.shape != other_columns.shape:
            self._still(rows, columns)
            self._still(other_rows, other_columns)
            return
        groups = len(columns)
        for g in range(groups):
            pairs = []
            for one, other in ((rows.reshape(groups, -1), other_rows.reshape(groups, -1)), (columns, other_columns)):
                pairs += torch.unique(torch.stack([one[g], other[g]], dim=1), dim=0).tolist()
            differences = [self.labels.expression(a) - self.labels.expression(b) for a, b in pairs]
            self.labels.system.equal(*differences)

    def _still(self, rows: Tensor, columns: Tensor) -> None:
        """A weight that does not move: every row's label is every column's, in each group."""
        per_group = torch.cat([rows.reshape(len(columns), -1), columns], dim=1)
        self.labels.collapsed(per_group, [1])
