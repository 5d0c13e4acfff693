"""The value of a measure: a number, and what was found beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Sharpness(float):
    """A measure's value, with what was found beside it.

    A float in all that floats do; what is computed from it is a plain float again.

    Attributes:
        standard_error: Of the value, over the random numbers that were drawn; ``None``: nothing was drawn, or it is
            not known.
        layers: Parameter name → that parameter's part of the value, where the measure is a sum over parameters.
        notes: What a reader should know of this value, in words.
        details: Further numbers, by name.

    >>> value = Sharpness(2.0, layers={"weight": 2.0})
    >>> value, value + 1, value.layers
    (2.0, 3.0, {'weight': 2.0})
    """

    standard_error: float | None
    layers: dict[str, float]
    notes: tuple[str, ...]
    details: dict[str, float]

    def __new__(
        cls,
        value: float,
        standard_error: float | None = None,
        layers: Mapping[str, float] | None = None,
        notes: Iterable[str] = (),
        details: Mapping[str, float] | None = None,
    ) -> Sharpness:
        """Make the value; the containers are copied."""
        self = super().__new__(cls, value)
        self.standard_error = standard_error
        self.layers = dict(layers or {})
        self.notes = tuple(notes)
        self.details = dict(details or {})
        return self

    def __repr__(self) -> str:
        return float.__repr__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.standard_error, self.layers, self.notes, self.details)
