"""Rows of the report: a claim, the paper's number, ours, and a verdict, in so few words that they fit on one page.

A script offers its rows by ``summary(runs) -> list[Row]``, from the lines of one run; a script with ``CLAIMS`` needs
none, for those with a goal make its rows (:func:`of_claims`).  What did not work is chosen from the same rows by the
words of their verdicts (:func:`did_not_work`), so that no one can leave it out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ms_optim.demo.report import mean_and_error
from ms_optim.sweep import Difference

from .harness import Claim, Run, Summary, evaluate, verdict
from .render import aim, measured, unit_of

#: A verdict that holds one of these is one of something that did not work.
NEGATIVE = ("missed", "worse", "no difference", "not repeated", "diverged")
NOTHING = "–"
#: Of fewer seeds two standard errors are no evidence: t with 2 degrees of freedom has 5 % beyond 4.3.
FEW = 5


@dataclass(frozen=True)
class Row:
    """A row of the report.

    Attributes:
        claim: What is claimed, in words.
        ours: What was measured: median [quartiles] (n), or mean ± standard error (n).
        verdict: In words; see :data:`NEGATIVE` for those that have a consequence.
        paper: The number of the paper that the claim is about, with its source.
        detail: Whether the row is for what did not work alone, and too small a matter for the summary.
    """

    claim: str
    ours: str
    verdict: str
    paper: str = NOTHING
    detail: bool = False

    def on(self, device: str) -> Row:
        """The same claim on another device than the CPU.

        Args:
            device: Its name.

        Returns:
            A row that says so.
        """
        return replace(self, claim=f"{self.claim} ({device})")


def did_not_work(row: Row) -> bool:
    """Whether a row is one of something that did not work.

    Args:
        row: The row.

    Returns:
        Whether its verdict says so.
    """
    return any(word in row.verdict for word in NEGATIVE)


def of_claims(claims: Sequence[Claim], runs: Sequence[Run]) -> list[Row]:
    """A row for each claim that has a goal, the networks that it was measured on side by side.

    Args:
        claims: Of a script.
        runs: All lines of one run.

    Returns:
        The rows, in the order of the claims.
    """
    groups: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        if claim.goal is not None:
            groups.setdefault((claim.text, aim(claim)), []).append(claim)
    rows = []
    for (text, goal), group in groups.items():
        found = [(claim, evaluate(claim, runs)) for claim in group]
        ours = [f"{claim.network} {measured(what, unit_of(claim))}" for claim, what in found if not _absent(what)]
        rows.append(Row(f"{text}: {goal}", "; ".join(ours) or NOTHING, verdict_of(group, runs)))
    return rows


def _absent(found: Summary | str) -> bool:
    """Whether nothing was measured; the verdict has the network's name."""
    return isinstance(found, str)


def verdict_of(claims: Sequence[Claim], runs: Sequence[Run]) -> str:
    """How many of several goals are reached, and the names of those that are not.

    Args:
        claims: With goals.
        runs: All lines of one run.

    Returns:
        Words.
    """
    words: dict[str, list[str]] = {}
    for claim in claims:
        word = verdict(evaluate(claim, runs), claim.goal, claim.at_least)
        words.setdefault(word, []).append(claim.network)
    reached = sum(len(names) for word, names in words.items() if word.startswith("reached"))
    compared = len(claims) - sum(len(words.get(word, [])) for word in ("not measured", "nothing to compare with"))
    if len(claims) == 1:
        return next(iter(words))
    parts = [f"{reached} of {compared} reached"] if compared else []
    for word, names in words.items():
        if word != "reached":
            parts.append(f"{word.replace('reached, but', 'of these')}: {', '.join(names)}")
    return "; ".join(parts)


def mean(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error, without n.

    Args:
        values: At least one, per seed.
        digits: After the point.

    Returns:
        The mean alone for one value.
    """
    middle, error = mean_and_error(values)
    return f"{middle:.{digits}f}" if math.isnan(error) else f"{middle:.{digits}f} ± {error:.{digits}f}"


def seed_by_seed(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Paired differences: of the seeds that both have.

    Args:
        ours: Seed → value.
        theirs: Seed → value.

    Returns:
        Ours minus theirs, in the order of ours.
    """
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def compared(values: Sequence[float], digits: int = 2) -> tuple[str, str]:
    """What paired differences say.

    Args:
        values: Ours minus theirs, one per seed.
        digits: After the point.

    Returns:
        Their mean ± standard error (n), and the verdict of :func:`found_difference`, which of fewer than five seeds
        counts only if the 95 % interval by t agrees.
    """
    found = Difference.of(values)
    text = f"{found.mean:+.{digits}f} ± {found.error:.{digits}f} (n = {found.n})"
    word = found_difference(found.mean, found.error)
    unsure = found.n < FEW and word in ("better", "worse") and not (found.low > 0 or found.high < 0)
    return text, "no difference shown" if unsure else word


def in_one_row(found: Sequence[tuple[str, str, str]]) -> tuple[str, str]:
    """Several comparisons in one row.

    Args:
        found: Of each its name, what was measured, and the verdict.

    Returns:
        All that was measured, by name; the verdicts, in the order in which they come first, and after each its names.
    """
    said: dict[str, list[str]] = {}
    for name, _, word in found:
        said.setdefault(word, []).append(name)
    ours = "; ".join(f"{name} {text}" for name, text, _ in found)
    return ours, "; ".join(f"{word}: {' · '.join(names)}" for word, names in said.items())


def found_difference(apart: float, error: float) -> str:
    """Better, worse, or neither by more than two standard errors.

    Args:
        apart: The mean of a difference.
        error: Its standard error.

    Returns:
        Words.
    """
    if apart == error == 0:
        return "the same"
    if not math.isfinite(error) or abs(apart) <= 2 * error:
        return "no difference shown"
    return "better" if apart > 0 else "worse"
