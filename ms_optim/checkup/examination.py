"""Examination: the table of rules, each a function of what was seen that yields what it finds wrong.

A rule stands in the table under its own name, by decorator; the first line of its docstring says what is wrong.  Rules
are silent where they have nothing to go by, and what one has explained, others need not: they are examined in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .diagnosis import Diagnosis, Finding
from .observation import Observation

Rule = Callable[[Observation], Iterator[Finding]]
RULES: dict[str, Rule] = {}
_SHOWN = 5  # names in a list


def rule(function: Rule) -> Rule:
    """Enter a rule into the table.

    Args:
        function: The rule.

    Returns:
        The same.
    """
    RULES[function.__name__] = function
    return function


def problem(what: str, next_move: str, where: str = "", **measured: float) -> Finding:
    """A problem.

    Args:
        what: What was found.
        next_move: What to do.
        where: What it concerns.
        **measured: The numbers.

    Returns:
        The finding.
    """
    return Finding("problem", what, where, _named(measured), next_move)


def note(what: str, next_move: str, where: str = "", **measured: float) -> Finding:
    """A note.

    Args:
        what: What was found.
        next_move: What to do.
        where: What it concerns.
        **measured: The numbers.

    Returns:
        The finding.
    """
    return replace(problem(what, next_move, where, **measured), severity="note")


def shortened(names: list[str]) -> str:
    """A list in words.

    Args:
        names: Its items.

    Returns:
        The first few, and how many more there are.
    """
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def examine(seen: Observation) -> Diagnosis:
    """Apply every rule.

    Args:
        seen: What was seen.

    Returns:
        The diagnosis, problems first.
    """
    found = [replace(finding, name=name) for name, each in RULES.items() for finding in each(seen)]
    ordered = sorted(found, key=lambda finding: finding.severity != "problem")
    return Diagnosis(
        subject=f"{type(seen.optimizer).__name__} on {type(seen.model).__name__}",
        passes=seen.passes_seen(),
        findings=tuple(ordered),
        cosine=seen.cosine_seen,
        error=seen.error,
    )


def _named(measured: dict[str, float]) -> dict[str, float]:
    """Numbers under names in words."""
    return {key.replace("_", " "): value for key, value in measured.items()}
