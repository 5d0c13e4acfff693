"""Table: numbers and words in columns, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

UNKNOWN = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A number in a few digits.

    Args:
        value: The number; ``None`` and NaN are not known.
        digits: Significant digits.

    Returns:
        The text.
    """
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}g}"


def with_error(value: float | None, standard_error: float | None, digits: int = 4) -> str:
    """A number and its standard error, where there is one: 0 stands for exact and is not shown.

    Args:
        value: The number.
        standard_error: Its standard error; ``None`` and NaN are not known.
        digits: Significant digits of the number.

    Returns:
        The text.
    """
    text = number(value, digits)
    shown = text != UNKNOWN and standard_error is not None and not math.isnan(standard_error) and standard_error > 0
    return f"{text} ± {standard_error:.2g}" if shown else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = (), indent: str = "") -> str:
    """Columns padded to one width each, under a ruled header.

    Args:
        header: Names of the columns.
        rows: Their texts.
        right: Columns that end together rather than begin together: numbers.
        indent: Before each line.

    Returns:
        The lines.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        )
        return (indent + "  ".join(padded)).rstrip()

    ruled = line(["-" * width for width in widths])
    return "\n".join([line(header), ruled, *map(line, rows)])


def shortened(names: Sequence[str], length: int, between: str = ", ") -> str:
    """A list in words.

    Args:
        names: Its items.
        length: How many are shown.
        between: What stands between them.

    Returns:
        The first ones, and how many more there are.
    """
    rest = len(names) - length
    return between.join(names[:length]) + (f" and {rest} more" if rest > 0 else "")
