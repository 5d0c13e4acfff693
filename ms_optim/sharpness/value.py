"""A value: the number that a measure found, and what was found beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Sharpness(float):
    """A measure's value, with what was found beside it.

    It is a float in every respect; arithmetic with it gives plain floats.

    Args:
        value: The number.
        standard_error: Over random probes (not over the data): 0 where nothing was sampled, NaN where one probe was,
            ``None`` where the notion does not apply.
        layers: Parameter name → its own value, or its part in the value, as the measure says.
        notes: What a reader of the number should know.
        details: Further numbers by name.

    Attributes:
        standard_error: As given.
        layers: As given.
        notes: As given.
        details: As given.

    >>> Sharpness(2.0, standard_error=0.1) + 1
    3.0
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
        """The number, with attributes."""
        found = super().__new__(cls, value)
        found.standard_error = standard_error
        found.layers = dict(layers or {})
        found.notes = tuple(notes)
        found.details = dict(details or {})
        return found

    def __repr__(self) -> str:
        """As a float's."""
        return float.__repr__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied with its attributes."""
        return type(self), (float(self), self.standard_error, self.layers, self.notes, self.details)
