"""What the demo shows, from its committed results: which optimizers depend on the scaling of the start.

``python -m ms_optim.demo`` is part of the package and writes its own table; the rows for the report are made here, of
the ``results.json`` that it leaves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ms_optim.demo import report
from ms_optim.demo.training import STARTS, Outcome, Run

from .rows import Row, compared, in_one_row, seed_by_seed

COMMAND = "python -m ms_optim.demo"


def newest(results: Path) -> Path | None:
    """The folder of the newest demo.

    Args:
        results: The folder of all results.

    Returns:
        The folder; ``None`` if there is none.
    """
    found = sorted((results / "demo").glob("*/results.json"))
    return found[-1].parent if found else None


def _read(folder: Path) -> tuple[list[Outcome], dict[str, Any]]:
    """The trainings of a demo, and its seconds."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    outcomes = [Outcome(**{**each, "run": Run(**each["run"])}) for each in found["outcomes"]]
    return outcomes, found["seconds_per_step_relative_to_sgd"]


def table(folder: Path) -> str:
    """The table of a demo, once more from its results.

    Args:
        folder: Of the demo.

    Returns:
        Markdown, as in the ``table.md`` beside them.
    """
    return report.table(*_read(folder)) + "\n"


def summary(folder: Path) -> list[Row]:
    """What a rescaled start changes for each optimizer, and MSSAM beside SAM from the usual one.

    Args:
        folder: Of the demo.

    Returns:
        Two rows for each network.
    """
    outcomes, _ = _read(folder)
    usual, rescaled = STARTS
    rows = []
    for model in dict.fromkeys(outcome.run.model for outcome in outcomes):
        accuracy: dict[str, dict[str, dict[int, float]]] = {}
        for outcome in outcomes:
            if outcome.run.model == model:
                of = accuracy.setdefault(outcome.run.optimizer, {start: {} for start in STARTS})
                of[outcome.run.start][outcome.run.seed] = 100 * outcome.test_accuracy
        found = []
        for name, of in accuracy.items():
            text, word = compared(seed_by_seed(of[rescaled], of[usual]))
            found.append((name, text, _WORDS.get(word, "changed")))
        claim = f"digits, {model}: accuracy from a rescaled start, over that from the usual one, in points"
        rows.append(Row(claim, *in_one_row(found)))
        claim = f"digits, {model}: accuracy of MSSAM over SAM's from the usual start, in points"
        rows.append(Row(claim, *compared(seed_by_seed(accuracy["MSSAM"][usual], accuracy["SAM"][usual]))))
    return rows


_WORDS = {"the same": "the same", "no difference shown": "no change shown"}
