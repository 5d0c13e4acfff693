"""Record: what a run leaves in its folder besides checkpoints: tables, figures, its result.

``summary.csv`` has a row per validated epoch, in timm's columns and some of our own; ``sharpness.csv`` a row per
measured epoch and parameter; ``curves.png`` and ``sharpness.png`` show both; ``result.json`` is the outcome.  Tables
are written whole, from rows that every checkpoint holds as well: after a resume they are those of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli.output import write_csv, write_json
from ..errors import CommandLineError
from .progress import logger
from .sharpness_log import COLUMNS, WHOLE

Row = dict[str, Any]


def require_loggers(options: argparse.Namespace) -> None:
    """Refuse to log to what is not installed, before anything is trained.

    Args:
        options: ``log_wandb``, ``log_tensorboard``.

    Raises:
        CommandLineError: If it is asked for and missing.
    """
    for key, library in (("log_wandb", "wandb"), ("log_tensorboard", "tensorboard")):
        if getattr(options, key) and importlib.util.find_spec(library) is None:
            raise CommandLineError(f"--{key.replace('_', '-')} needs {library}: pip install {library}")


class Record:
    """The tables of a run, in memory and in its folder.

    Args:
        folder: Where they are written.
        options: Of the run, for wandb and TensorBoard.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.summary: list[Row] = []
        self.sharpness: list[list[Any]] = []
        self._board: Any = None
        self._wandb: Any = None
        if options.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if options.log_wandb:
            import wandb

            self._wandb = wandb.init(
                project=options.wandb_project,
                name=folder.name,
                config=dict(vars(options)),
                tags=options.wandb_tags,
                resume="must" if options.wandb_resume_id else None,
                id=options.wandb_resume_id or None,
            )

    def state(self) -> dict[str, Any]:
        """The rows, for a checkpoint."""
        return {"summary": [dict(row) for row in self.summary], "sharpness": [list(row) for row in self.sharpness]}

    def load(self, state: Mapping[str, Any], epoch: int) -> None:
        """The rows of a checkpoint; what was written after it is gone.

        Args:
            state: As of :meth:`state`.
            epoch: The one that comes next; what is known of it and of later ones is from before, and gone as well.
        """
        self.summary = [dict(row) for row in state.get("summary", []) if row["epoch"] < epoch]
        self.sharpness = [list(row) for row in state.get("sharpness", []) if row[0] < epoch]
        self.write()

    def add(self, row: Row) -> None:
        """Add an epoch's row to the summary; it is in the tables with :meth:`write`.

        Args:
            row: Column → value; ``epoch`` first.
        """
        self.summary.append(row)
        numbers = {key: value for key, value in row.items() if key != "epoch" and math.isfinite(value)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key.replace("_", "/", 1), value, row["epoch"])
        if self._wandb is not None:
            self._wandb.log({"epoch": row["epoch"], **numbers})

    def write(self) -> None:
        """Write the tables."""
        if self.summary:
            columns = list(dict.fromkeys(key for row in self.summary for key in row))
            rows = [[row.get(key) for key in columns] for row in self.summary]
            write_csv(self.folder / "summary.csv", columns, rows)
        if self.sharpness:
            write_csv(self.folder / "sharpness.csv", COLUMNS, self.sharpness)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result and the figures.

        Args:
            result: The outcome.
        """
        self.write()
        write_json(self.folder / "result.json", result)
        if importlib.util.find_spec("matplotlib") is None:
            logger.info("no figures: they need matplotlib (pip install 'ms_optim[train]')")
        else:
            draw_curves(self.summary, self.folder / "curves.png")
            if self.sharpness:
                draw_sharpness(self.sharpness, self.folder / "sharpness.png")

    def close(self) -> None:
        """Let go of what was opened."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw the learning curves.

    Args:
        rows: Of the summary.
        path: The image.
    """
    canvas, (left, middle, right) = _axes(3)
    epochs = [row["epoch"] for row in rows]
    for axis, keys in ((left, ("train_loss", "eval_loss")), (middle, ("eval_top1", "eval_top5")), (right, ("lr",))):
        for key in keys:
            if any(key in row for row in rows):
                axis.plot(epochs, [row.get(key, math.nan) for row in rows], ".-", label=key)
        axis.set_xlabel("epoch")
        if axis.lines:
            axis.legend()
    left.set_title("loss")
    middle.set_title("validation accuracy (%)")
    right.set_title("learning rate")
    _save(canvas, path)


def draw_sharpness(rows: Sequence[Sequence[Any]], path: Path) -> None:
    """Draw the traces of the layers as they are, and as they would be at the balanced representative.

    Args:
        rows: Of ``sharpness.csv``.
        path: The image.
    """
    canvas, (left, middle, right) = _axes(3)
    curves: dict[str, list[Sequence[Any]]] = {}
    for row in rows:
        curves.setdefault(row[1], []).append(row)
    for name, points in curves.items():
        epochs = [row[0] for row in points]
        if name == WHOLE:
            left.plot(epochs, [row[2] for row in points], ".-", label="Tr H")
            left.plot(epochs, [row[4] for row in points], ".-", label="minimum sharpness")
            continue
        few = len(curves) <= 13
        middle.plot(epochs, [row[2] for row in points], ".-", label=name if few else None)
        right.plot(epochs, [row[4] for row in points], ".-")
    for axis, title in ((left, "whole network"), (middle, "trace of each layer"), (right, "balanced")):
        axis.set(title=title, xlabel="epoch")
        positive = [y for line in axis.lines for y in line.get_ydata() if y > 0]
        if positive:
            axis.set_yscale("log")
    left.legend()
    if middle.get_legend_handles_labels()[1]:
        middle.legend(fontsize="x-small")
    _save(canvas, path)


def _axes(count: int) -> Any:
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's own

    canvas = Figure(figsize=(4.5 * count, 3.6), layout="constrained")
    return canvas, canvas.subplots(1, count)


def _save(canvas: Any, path: Path) -> None:
    from ..cli.output import whole_file

    with whole_file(path) as file:
        canvas.savefig(file, dpi=110)
