"""Records: what is known of the trials of a folder.

    trials/<key>/record.json   settings, outcome, seconds, host, error: written once, whole, when the trial has ended
    trials/<key>/log.txt       what it printed
    trials/<key>/run/          what it keeps for itself, such as checkpoints
    trials.csv                 all records, a line each; written anew, whole, after every trial
    lock                       held while a sweep runs

The records are all there is: who reads them knows the state of the sweep, whenever and however it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cli.output import write_csv, write_json
from ..errors import DataError
from .lock import held
from .trial import FAILED, Result, Trial, flat, folder_of

RECORD, LOG, TABLE = "record.json", "log.txt", "trials.csv"

_HEAD = ("key", "problem", "method", "stage", "status", "error", "seconds")


class Records:
    """The records of a folder, in memory and on disk; see the module.

    Args:
        folder: The folder; made if it is not there.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        self._records: dict[str, dict[str, Any]] = {}
        for file in sorted((self.folder / "trials").glob(f"*/{RECORD}")):
            record = read(file)
            self._records[record["key"]] = record

    @contextmanager
    def locked(self) -> Iterator[Records]:
        """Keep other sweeps out of the folder.

        Yields:
            The records, as they are now.

        Raises:
            CommandLineError: If one is in it.
        """
        with held(self.folder / "lock"):
            yield Records(self.folder)

    def result(self, trial: Trial, function: str) -> Result | None:
        """What came of a trial.

        Args:
            trial: The trial.
            function: ``module:function``.

        Returns:
            The result; ``None`` if there is no record.
        """
        record = self._records.get(trial.key(function))
        return None if record is None else Result.of(record, trial)

    def look(self, key: str) -> bool:
        """Take in the record that a worker has written, and write the table.

        Args:
            key: The trial's.

        Returns:
            Whether there is one.
        """
        file = folder_of(self.folder, key) / RECORD
        if not file.is_file():
            return False
        self._records[key] = read(file)
        self.write_table()
        return True

    def forget(self, key: str) -> None:
        """Remove a record: its trial is to run again.

        Args:
            key: The trial's.
        """
        if self._records.pop(key, None) is not None:
            (folder_of(self.folder, key) / RECORD).unlink()

    def relabel(self, trials: Iterable[Trial], function: str) -> None:
        """Call trials in the table what they are called now.

        Args:
            trials: Some.
            function: ``module:function``.
        """
        for trial in trials:
            record = self._records.get(trial.key(function))
            if record is not None:
                record.update(method=trial.method, problem=trial.problem, stage=trial.stage)

    def write_table(self) -> None:
        """Write ``trials.csv``: problem by problem, method by method, setting by setting, seed by seed."""
        rows = []
        for record in self._records.values():
            parts = {name: record[name] for name in _HEAD}
            parts |= {f"settings.{name}": value for name, value in flat(record["settings"]).items()}
            parts |= {f"outcome.{name}": value for name, value in flat(record["outcome"]).items()}
            rows.append(
                parts | {f"host.{name}": value for name, value in record["host"].items()} | {"log": record["log"]}
            )
        columns = dict.fromkeys(name for row in rows for name in row)
        groups = ("settings.", "outcome.", "log", "host.")
        grouped = [name for start in groups for name in columns if name.startswith(start) and name not in _HEAD]
        header = (*_HEAD, *grouped)
        rows.sort(key=lambda row: tuple(_sortable(row.get(name)) for name in header[1:4] + header[7:]))
        write_csv(self.folder / TABLE, header, [[_cell(row.get(name)) for name in header] for row in rows])


def write(folder: Path, function: str, result: Result) -> None:
    """Write a record, whole or not at all.

    Args:
        folder: That of the sweep.
        function: ``module:function``.
        result: What came of a trial.
    """
    write_json(folder_of(folder, result.trial.key(function)) / RECORD, result.record(function))


def read(file: Path) -> dict[str, Any]:
    """Read a record.

    Args:
        file: Its file.

    Returns:
        The record.

    Raises:
        DataError: If this is none.
    """
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        Result.of(record)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no record of a trial ({error!r}); remove it, and the trial runs again") from error
    return record


def died(trial: Trial, reason: str, **facts: Any) -> Result:
    """The result of a trial whose process has ended without one.

    Args:
        trial: The trial.
        reason: How it ended.
        **facts: Of the result.

    Returns:
        The result.
    """
    return Result(trial, FAILED, error=reason, **facts)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (Mapping, list)) else value


def _sortable(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if number else (2, 0.0, "") if value is None else (1, 0.0, str(value))
