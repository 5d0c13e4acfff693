"""Figures as SVG files that are the same, byte for byte, for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Matplotlib's pyplot, which draws SVG without a screen; imported when a figure is drawn, for it is optional.

    Returns:
        The module.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ms_optim"  # the same numbers give the same file
    from matplotlib import pyplot as found

    return found


def save(figure: Any, path: Path) -> None:
    """Write a figure, without the date, and let go of it.

    Args:
        figure: One of :func:`pyplot`'s.
        path: Where.
    """
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
