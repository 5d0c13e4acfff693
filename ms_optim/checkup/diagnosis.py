"""Diagnosis: what was seen in a dry step, and what was found wrong with it, each with the next move."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["problem", "note"]
_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: ``"problem"``: the step does something else than it says; ``"note"``: worth knowing.
        what: What was found, in a sentence.
        where: The parameters, modules or passes concerned.
        measured: The numbers behind it.
        next_move: What to do.
        name: Of the rule that found it.
    """

    severity: Severity
    what: str
    where: str
    measured: Mapping[str, float]
    next_move: str
    name: str = ""

    def __str__(self) -> str:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in self.measured.items())
        place = "; ".join(part for part in (self.where, numbers) if part)
        head = f"{self.severity} [{self.name}] {self.what}" + (f" ({place})" if place else "")
        return "\n".join([_wrapped(head, "  ", "    "), _wrapped(f"→ {self.next_move}", "    ", "      ")])


@dataclass(frozen=True)
class PassSeen:
    """Forward passes in a row at the same weights.

    Attributes:
        forwards: Their number.
        perturbation: ‖ε‖, the distance of the weights from where the step began (or from the representative that it
            began with).
        loss: The sum of the losses; NaN where none was seen.
    """

    forwards: int
    perturbation: float
    loss: float = math.nan

    def __str__(self) -> str:
        where = "at W" if self.perturbation == 0 else f"at W + ε, ‖ε‖ = {self.perturbation:.4g}"
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.6g}"
        times = "" if self.forwards == 1 else f", {self.forwards} forward passes"
        return where + loss + times


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`ms_optim.doctor`; true if there is no problem.

    Attributes:
        subject: What was examined.
        passes: What was seen, in order.
        findings: What was found, problems first.
        cosine: Of the gradients at W and at W + ε; NaN where not both were seen.
        error: What the step raised, if it did.
    """

    subject: str
    passes: tuple[PassSeen, ...]
    findings: tuple[Finding, ...]
    cosine: float = math.nan
    error: Exception | None = field(default=None, compare=False)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are problems."""
        return tuple(found for found in self.findings if found.severity == "problem")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """The others."""
        return tuple(found for found in self.findings if found.severity == "note")

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def loss_gap(self) -> float:
        """L(W + ε) − L(W); NaN where not both were seen."""
        clean = [seen.loss for seen in self.passes if seen.perturbation == 0]
        raised = [seen.loss for seen in self.passes if seen.perturbation != 0]
        return sum(raised) - sum(clean) if len(clean) == len(raised) > 0 else math.nan

    def __bool__(self) -> bool:
        return self.healthy

    def __str__(self) -> str:
        """What was observed, then the findings."""
        lines = [f"doctor: {self.subject}, one dry step", "  observed"]
        lines += [f"    pass {index + 1}: {seen}" for index, seen in enumerate(self.passes)] or ["    no forward pass"]
        numbers = {"loss gap": self.loss_gap, "cosine of the gradients": self.cosine}
        known = [f"{key} {value:.4g}" for key, value in numbers.items() if not math.isnan(value)]
        lines += [f"    {', '.join(known)}"] if known else []
        lines += [str(found) for found in self.findings]
        count = len(self.problems)
        lines.append("  healthy" if self.healthy else f"  {count} problem{'s' if count > 1 else ''}")
        return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> str:
    """A paragraph of a report."""
    return textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
