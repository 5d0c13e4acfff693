"""An operator: a symmetric matrix that is known by its products with vectors and never has to be written out.

Vectors are rows of a matrix [m, d] in float64, so that a call may share work among them.  What is done with operators
(:mod:`~ms_optim.curvature.spectrum`) does not know whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import CurvatureError
from .losses.logit_factor import coins

Distribution = Literal["rademacher", "normal", "uniform"]

# Vectors that are held at a time take no more than this.
_VECTOR_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix, known by its products.

    Attributes:
        apply: Rows ``[m, d]`` in float64 to their products ``[m, d]``.
        dimension: d.
        device: Where the vectors lie.
        rounding: The unit roundoff of the products.
    """

    apply: Callable[[Tensor], Tensor]
    dimension: int
    device: torch.device = torch.device("cpu")
    rounding: float = torch.finfo(torch.float64).eps

    def __call__(self, vectors: Tensor) -> Tensor:
        """The products of vectors.

        Args:
            vectors: ``[m, d]`` in float64.

        Returns:
            ``[m, d]`` in float64.

        Raises:
            CurvatureError: If a product is not finite.
        """
        products = self.apply(vectors)
        if not bool(torch.isfinite(products).all()):
            raise CurvatureError(
                f"a product of the curvature matrix with a vector of {self.dimension} entries is not finite; check "
                "data and weights, or measure in float64 with model.double()"
            )
        return products

    def draw(self, count: int, generator: torch.Generator, distribution: Distribution = "rademacher") -> Tensor:
        """Random vectors, drawn where the generator lives, so that every device sees the same.

        Args:
            count: m.
            generator: The source of randomness; the global streams are not touched.
            distribution: Of each entry: signs, standard normal numbers, or uniform ones in [−1, 1].

        Returns:
            ``[m, d]``.
        """
        shape = (count, self.dimension)
        if distribution == "rademacher":
            return coins(shape, generator).to(self.device, torch.float64)
        drawn = torch.empty(shape, dtype=torch.float64, device=generator.device)
        if distribution == "normal":
            drawn.normal_(generator=generator)
        else:
            drawn.uniform_(-1.0, 1.0, generator=generator)
        return drawn.to(self.device)

    def together(self, count: int, copies: int = 4) -> Iterator[int]:
        """How many vectors to hold at a time.

        Args:
            count: The number of vectors in all.
            copies: How many vectors have to be kept for each.

        Yields:
            The sizes of groups, whose sum is ``count``.
        """
        size = max(1, _VECTOR_BYTES // (8 * copies * max(1, self.dimension)))
        while count > 0:
            yield min(size, count)
            count -= size

    def dense(self) -> Tensor:
        """The matrix itself, from d products: ``[d, d]``, symmetric."""
        rows, start = [], 0
        for size in self.together(self.dimension):
            unit = torch.zeros(size, self.dimension, dtype=torch.float64, device=self.device)
            unit[torch.arange(size), torch.arange(start, start + size)] = 1.0
            rows.append(self(unit))
            start += size
        matrix = torch.cat(rows)
        return 0.5 * (matrix + matrix.T)

    def scaled(self, factors: Tensor) -> Operator:
        """diag(s) M diag(s).

        Args:
            factors: s, ``[d]``.

        Returns:
            An operator of the same dimension.
        """
        inner, s = self.apply, factors.to(self.device, torch.float64)
        return replace(self, apply=lambda vectors: s * inner(s * vectors))


def whole_number(name: str, value: int, least: int = 1) -> int:
    """A number of probes or steps, once it is known to be one.

    Args:
        name: What it is, for the message.
        value: The number.
        least: The smallest that makes sense.

    Returns:
        The same.

    Raises:
        ValueError: If it is no whole number, or smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}; each costs a pass over the data")
    return value


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or a fresh one with a fixed seed, so that the same call gives the same numbers."""
    return torch.Generator().manual_seed(0) if generator is None else generator
