r"""Layouts: along which axis of an operation's output the samples lie.

Curvature needs per-sample contractions, so every tensor at which a factor arrives must be split into samples.  Most
networks keep the batch on the first axis, with positions folded behind the samples (``[N·T, …]``, sample-major); others
fold them before (``[T·N, …]``) or keep a sequence axis in front (``[T, N, …]``), as ``nn.MultiheadAttention`` does
inside.  A layout brings all three to ``[N, T, …]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Order = Literal["sample-major", "position-major", "sequence-first"]


@dataclass(frozen=True)
class Layout:
    """Where the samples are in an operation's output.

    Attributes:
        samples: N.
        order: ``"sample-major"``: the first axis holds N blocks of T neighbouring rows (T = 1: the batch axis);
            ``"position-major"``: it holds T blocks of N rows; ``"sequence-first"``: the second axis holds the samples.
    """

    samples: int
    order: Order = "sample-major"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can have this layout."""
        if self.order == "sequence-first":
            return len(shape) > 1 and shape[1] == self.samples
        return len(shape) > 0 and shape[0] % self.samples == 0

    def holds(self, shape: tuple[int, ...], times: int) -> bool:
        """Whether a tensor of this shape can have this layout with T positions.

        Of another length of a sequence (one above all, which fits everywhere) what was found before says nothing.
        """
        return self.fits(shape) and self.times(shape) == times

    def front(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """``[N, T, …]``, a view.

        Args:
            tensor: In this layout, behind ``lead`` further axes.
            lead: The number of axes before it, which stay where they are.

        Returns:
            ``[lead axes…, N, T, remaining axes…]``.
        """
        if self.order == "sequence-first":
            return tensor.transpose(lead, lead + 1)
        if self.order == "position-major":
            return tensor.unflatten(lead, (-1, self.samples)).transpose(lead, lead + 1)
        return tensor.unflatten(lead, (self.samples, -1))

    def axis(self, axis: int) -> int:
        """Where an axis behind the samples is in :meth:`front`'s result (with ``lead=0``).

        Args:
            axis: In the tensor, not one of the axes that hold samples; negative axes are not accepted.

        Returns:
            The axis in the result.
        """
        if self.order == "sequence-first":
            return 1 if axis == 0 else axis
        return axis + 1

    def times(self, shape: tuple[int, ...]) -> int:
        """T for a tensor of this shape."""
        return shape[0] if self.order == "sequence-first" else shape[0] // self.samples
