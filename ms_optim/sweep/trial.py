"""Trial: one setting of everything that a run depends on, and what came of it.

A trial *is* its settings and the function that carries them out: their hash is its key, under which its record lies.
Whoever describes the same trial again finds the record.  Method, problem and stage are what a trial is called in
tables; they are no part of its key.

Trials that differ in their seed alone are one setting, of which a seed is a sample.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CommandLineError

#: What a function is told beside its settings: the folder that it may write to, and to go on from what lies there.
TOLD = ("output", "experiment", "resume")

#: How a trial ends: with numbers; with numbers that are not finite; with an error, or without a word.
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"


@dataclass(frozen=True)
class Trial:
    """One call of the function of a sweep.

    Attributes:
        settings: What it is called with: plain values that JSON has words for; ``"seed"`` is the seed.
        method: Who is compared, such as the optimizer.
        problem: On what; methods are compared within a problem.
        stage: What for: ``"tuning"`` or ``"fresh"``.

    Raises:
        CommandLineError: If the settings hold what JSON has no word for, or what the sweep itself sets.

    >>> trial = Trial({"lr": 0.1, "opt_kwargs": {"rho": 0.05}, "seed": 3}, method="sam")
    >>> trial.seed, trial.setting
    (3, {'lr': 0.1, 'opt_kwargs': {'rho': 0.05}})
    """

    settings: Mapping[str, Any]
    method: str = ""
    problem: str = ""
    stage: str = "tuning"

    def __post_init__(self) -> None:
        canonical(self.settings)
        taken = [name for name in TOLD if name in self.settings]
        if taken:
            raise CommandLineError(
                f"the settings of a trial hold {taken[0]} = {self.settings[taken[0]]!r}, which the sweep sets itself: "
                "every trial has a folder of its own inside that of the sweep; leave it out"
            )

    @property
    def seed(self) -> Any:
        """Its seed; ``None`` if it has none."""
        return self.settings.get("seed")

    @functools.cached_property
    def setting(self) -> dict[str, Any]:
        """The settings without the seed."""
        return {name: value for name, value in self.settings.items() if name != "seed"}

    @functools.cached_property
    def setting_key(self) -> str:
        """The same text for trials that differ in their seed alone."""
        return canonical(self.setting)

    def key(self, function: str) -> str:
        """What its record is found by.

        Args:
            function: ``module:function``.

        Returns:
            Sixteen hexadecimal digits.
        """
        return hashlib.sha256(f"{function}\n{canonical(self.settings)}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What came of a trial: its record.

    Attributes:
        trial: The trial.
        status: :data:`FINISHED`, :data:`DIVERGED` or :data:`FAILED`.
        outcome: What the function returned; empty if it did not return.
        error: What is wrong, in one line; empty if nothing is.
        seconds: How long it took, of all attempts that went on with one another the last one.
        host: Where it ran: versions, processor, GPU, threads.
        log: File of what it printed, relative to the folder of the sweep; empty without one.
    """

    trial: Trial
    status: str
    outcome: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = math.nan
    host: Mapping[str, Any] = field(default_factory=dict)
    log: str = ""

    def value(self, name: str) -> float | None:
        """A number of the outcome of a trial that ended well.

        Args:
            name: Its name.

        Returns:
            The number; ``None`` if the trial failed or diverged, or has no such number.
        """
        found = self.outcome.get(name)
        known = self.status == FINISHED and isinstance(found, (int, float)) and math.isfinite(found)
        return float(found) if known else None  # type: ignore[arg-type]  # known: it is a number

    @classmethod
    def returned(cls, trial: Trial, outcome: Any, **facts: Any) -> Result:
        """The result of a function that has returned.

        Args:
            trial: The trial.
            outcome: What it returned.
            **facts: Of the result.

        Returns:
            Finished; diverged if a number is not finite; failed if this is no outcome.
        """
        if not isinstance(outcome, Mapping):
            kind = type(outcome).__name__
            return cls(
                trial, FAILED, error=f"the function returned a {kind}, and a mapping of numbers is needed", **facts
            )
        plain = {str(name): _plain(value) for name, value in outcome.items()}
        try:
            json.dumps(plain)
        except (TypeError, ValueError) as error:
            return cls(trial, FAILED, error=f"the function returned what JSON has no word for: {error}", **facts)
        lost = [f"{name} is {v}" for name, v in plain.items() if isinstance(v, float) and not math.isfinite(v)]
        return cls(trial, DIVERGED if lost else FINISHED, plain, ", ".join(lost), **facts)

    def record(self, function: str) -> dict[str, Any]:
        """All of it, for a file.

        Args:
            function: ``module:function``.

        Returns:
            Plain containers.
        """
        trial = self.trial
        return {
            **{"key": trial.key(function), "function": function, "status": self.status, "error": self.error},
            **{"problem": trial.problem, "method": trial.method, "stage": trial.stage},
            **{"settings": dict(trial.settings), "outcome": dict(self.outcome), "seconds": self.seconds},
            **{"host": dict(self.host), "log": self.log},
        }

    @classmethod
    def of(cls, record: Mapping[str, Any], trial: Trial | None = None) -> Result:
        """Read a record.

        Args:
            record: As :meth:`record` made it; numbers that were not finite are ``None``.
            trial: The trial as it is called now; by default as it was called then.

        Returns:
            The result.
        """
        told = {name: record[name] for name in ("settings", "method", "problem", "stage")}
        kept = {name: record[name] for name in ("status", "outcome", "error", "host", "log")}
        seconds = math.nan if record["seconds"] is None else record["seconds"]
        return cls(trial or Trial(**told), seconds=seconds, **kept)


def canonical(settings: Mapping[str, Any]) -> str:
    """The same text for the same settings, in whatever order they stand.

    Args:
        settings: Plain containers.

    Returns:
        JSON.

    Raises:
        CommandLineError: If JSON has no word for a value.

    >>> canonical({"lr": 1.0, "opt": "sgd"}) == canonical({"opt": "sgd", "lr": 1})
    True
    """
    try:
        return json.dumps(_whole(settings), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CommandLineError(f"the settings {dict(settings)} hold what JSON has no word for: {error}") from error


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings with one name each.

    Args:
        settings: Settings, some of which hold settings.
        before: Written before each name.

    Returns:
        Name → value.

    >>> flat({"lr": 0.1, "opt_kwargs": {"rho": 0.05}})
    {'lr': 0.1, 'opt_kwargs.rho': 0.05}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{before}{name}.") if nested else {f"{before}{name}": value}
    return found


def folder_of(folder: Path, key: str) -> Path:
    """Where a trial keeps what is its own.

    Args:
        folder: That of the sweep.
        key: The trial's.

    Returns:
        The trial's folder.
    """
    return folder / "trials" / key


def _whole(value: Any) -> Any:
    """The same with 1 for 1.0: they are one number, and not one text."""
    if isinstance(value, Mapping):
        return {str(name): _whole(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain(value: Any) -> Any:
    """Numbers of other libraries as Python's."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real):
        return float(value) if isinstance(value, float) else value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
