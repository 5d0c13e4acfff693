"""Checkpoint: all that a run needs to end, after SIGKILL at any moment, with the bits of the run that was not killed.

Files and entries are timm's (``last``, ``model_best``, ``checkpoint-N``; ``state_dict``, ``optimizer``, ``epoch``, …):
timm loads them, and ``ms-optim measure`` does.  Three things are ours:

* A file is written beside its place, flushed to the disk, and moved there: the place holds the old one or the new one,
  never half of one, and is never empty in between.
* One entry more, ``"run"``, holds what timm's leaves out: the rows of the tables, the scheduler, the saver's own books.
  What else a run writes (tables, ``model_best``, ``checkpoint-N``) follows from ``last``, and is made again from it
  on resuming: it does not matter between which two files the process died.
* No random state is kept.  Everything random in an epoch follows from (seed, epoch, rank, worker), so a run goes on
  from a whole epoch; what an optimizer draws is in its own state.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver

from ..cli.output import whole_file
from ..errors import CommandLineError
from .progress import logger

ENDING = ".pth.tar"


class Saver(CheckpointSaver):  # type: ignore[misc]  # timm publishes no types
    """timm's saver, with files that are whole at every moment and books that go on after a resume.

    Args:
        folder: The run's.
        decreasing: Whether less of the metric is better.
        max_history: How many ``checkpoint-N`` are kept.
    """

    def __init__(self, folder: Path, decreasing: bool, max_history: int) -> None:
        super().__init__(
            model=None,
            optimizer=None,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=max_history,
        )
        self.folder = folder
        for left in (*folder.glob(".*.tar"), *folder.glob("*.new")):  # half of a file, of a process that died
            left.unlink(missing_ok=True)
        self._content: dict[str, Any] | None = None
        self._source = self.last

    def save(self, content: dict[str, Any], epoch: int, metric: float) -> None:
        """Write an epoch's checkpoint as ``last``, and under whatever other names it deserves.

        Args:
            content: Weights, optimizer, and under ``"run"`` what timm's checkpoints leave out.
            epoch: The epoch, counted from 0.
            metric: What checkpoints are ranked by; one that is no number is the worst.
        """
        if math.isnan(metric):
            metric = math.inf if self.decreasing else -math.inf
        self._content = {**content, "epoch": epoch, "metric": metric, "version": 2}
        self._content["run"] = {**content["run"], "saver": self._books()}
        try:
            self.save_checkpoint(epoch, metric)
        finally:
            self._content = None

    def resume(self, content: Mapping[str, Any], path: Path) -> None:
        """Go on from a checkpoint: do again whatever was to follow its writing.

        Args:
            content: What it holds.
            path: Where it lies; in another folder than this run's, it and the best one are taken over from there.
        """
        books = content.get("run", {}).get("saver", {"history": [], "best_metric": None, "best_epoch": None})
        kept = [(str(self.folder / name), metric) for name, metric in books["history"]]
        self.checkpoint_files = [(name, metric) for name, metric in kept if os.path.exists(name)]
        best = self._best_of(path, content["epoch"], books["best_epoch"])
        if best is not None:
            self.best_metric, self.best_epoch = books["best_metric"], books["best_epoch"]
            if best.resolve() != self.best.resolve():
                self._duplicate(str(best), str(self.best))
        self._source = path
        self.save_checkpoint(content["epoch"], content.get("metric"))

    def _best_of(self, path: Path, resumed: int, epoch: int | None) -> Path | None:
        """The best checkpoint as of the resumed one; ``model_best`` may be of a later epoch than that."""
        if epoch is None:
            return None
        files = [path.parent / name for name in (self.best.name, f"{self.save_prefix}-{epoch}{ENDING}")]
        found = next((file for file in files if file.exists() and read(file)["epoch"] in (epoch, resumed)), None)
        if found is None:
            logger.info("the best checkpoint so far, of epoch %d, is not there any more: ranking begins anew", epoch)
        return found

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / f"last{ENDING}"

    @property
    def best(self) -> Path:
        """The checkpoint with the best metric."""
        return self.folder / f"model_best{ENDING}"

    def _books(self) -> dict[str, Any]:
        """What is known before this checkpoint is ranked."""
        history = [[os.path.basename(path), metric] for path, metric in self.checkpoint_files]
        return {"history": history, "best_metric": self.best_metric, "best_epoch": self.best_epoch}

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        """Write the file; on resuming it is there already."""
        place = Path(save_path)
        if self._content is None:
            with whole_file(place) as file:
                file.write_bytes(self._source.read_bytes())
            return
        with whole_file(place) as file:
            torch.save(self._content, file)
            with file.open("rb+") as written:
                os.fsync(written.fileno())

    def _replace(self, src: str, dst: str) -> None:
        """Move a file to its place in one step; timm's removes what is there first."""
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        """The same file under another name, in one step."""
        beside = f"{dst}.new"
        Path(beside).unlink(missing_ok=True)
        try:
            os.link(src, beside)
        except (OSError, NotImplementedError):  # a file system without links
            with whole_file(Path(dst)) as file:
                file.write_bytes(Path(src).read_bytes())
            return
        os.replace(beside, dst)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run, without running any code in it.

    Args:
        path: The file.

    Returns:
        Its content, on the CPU.

    Raises:
        CommandLineError: If it is not there, cannot be read, or is no run's.
    """
    if not path.is_file():
        raise CommandLineError(f"--resume {path}: there is no such checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise CommandLineError(f"--resume {path} cannot be read ({type(error).__name__}: {text})") from error
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    missing = [key for key in ("state_dict", "optimizer", "epoch") if key not in found]
    if missing:
        raise CommandLineError(
            f"--resume {path} is not the checkpoint of a run: it lacks {', '.join(missing)}; weights alone are loaded "
            "by --initial-checkpoint"
        )
    return found


def checkpoint_to_resume(resume: str, folder: Path | None) -> Path | None:
    """The file that ``--resume`` means.

    Args:
        resume: A file, a folder of a run, ``auto``, or nothing.
        folder: This run's own, if it is known already.

    Returns:
        The file; ``None``: begin anew.

    Raises:
        CommandLineError: If ``auto`` does not know where to look.
    """
    if not resume:
        return None
    if resume == "auto":
        if folder is None:
            raise CommandLineError("--resume auto looks into the run's own folder, so the run needs an --experiment")
        last = folder / f"last{ENDING}"
        return last if last.exists() else None
    path = Path(resume)
    return path / f"last{ENDING}" if path.is_dir() else path
