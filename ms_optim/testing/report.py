"""Report: what became of each law, and the two ways to ask for it.

``check`` runs every law and tells; ``assert_conforms`` raises.  In a test suite of one's own::

    @pytest.mark.parametrize("law", ms_optim.testing.LAWS)
    def test_my_optimizer(law):
        ms_optim.testing.assert_conforms(subject, [law])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import ConformanceError
from .law import LAWS, NotApplicable
from .subject import Subject

LONGEST = 300  # characters of an optimizer's own error
Verdict = Literal["passed", "failed", "crashed", "not applicable"]


@dataclass(frozen=True)
class Outcome:
    """What became of one law.

    Attributes:
        verdict: ``"passed"``; ``"failed"``: the law is broken; ``"crashed"``: the optimizer raised; ``"not
            applicable"``.
        message: What was found, what was raised, or the reason.
    """

    verdict: Verdict
    message: str = ""

    @property
    def broken(self) -> bool:
        """Whether the subject does not keep the law."""
        return self.verdict in ("failed", "crashed")

    def __str__(self) -> str:
        return f"{self.verdict}: {self.message}" if self.message else self.verdict


class Report(Mapping[str, Outcome]):
    """Law → outcome, in the order of the table.

    Args:
        subject: Whose report it is.
        outcomes: Law → outcome.
    """

    def __init__(self, subject: str, outcomes: Mapping[str, Outcome]) -> None:
        self.subject, self._outcomes = subject, dict(outcomes)

    def __getitem__(self, law: str) -> Outcome:
        return self._outcomes[law]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outcomes)

    def __len__(self) -> int:
        return len(self._outcomes)

    @property
    def broken(self) -> dict[str, Outcome]:
        """The laws that are not kept."""
        return {law: outcome for law, outcome in self.items() if outcome.broken}

    def __str__(self) -> str:
        applicable = sum(outcome.verdict != "not applicable" for outcome in self.values())
        lines = [f"{self.subject} keeps {applicable - len(self.broken)} of {applicable} laws"]
        return "\n".join([*lines, *(f"  {law}: {outcome}" for law, outcome in self.broken.items())])


def outcome_of(law: str, subject: Subject) -> Outcome:
    """Run one law.

    Args:
        law: Its name.
        subject: The subject.

    Returns:
        What became of it.

    Raises:
        ValueError: If there is no such law.
    """
    if law not in LAWS:
        raise ValueError(f"there is no law {law!r}; ms_optim.testing.LAWS lists them")
    try:
        LAWS[law](subject)
    except NotApplicable as reason:
        return Outcome("not applicable", str(reason))
    except ConformanceError as broken:
        return Outcome("failed", str(broken))
    except Exception as error:  # noqa: BLE001 - whatever a subject raises is a finding
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("crashed", text if len(text) <= LONGEST else f"{text[:LONGEST]}…")
    return Outcome("passed")


def check(subject: Subject, laws: Iterable[str] | None = None) -> Report:
    """Run laws and report.

    Args:
        subject: The optimizer, described.
        laws: Names; all of :data:`LAWS` by default.

    Returns:
        Law → outcome.

    >>> import torch
    >>> from ms_optim import SAM
    >>> def build(model, params, base, **options):
    ...     return SAM(params, base, model=model, **options)
    >>> print(check(Subject("SAM", build), ["the_perturbation_has_norm_rho", "weights_are_restored_bitwise"]))
    SAM keeps 2 of 2 laws
    >>> def careless(optimizer, model, closure):  # leaves the weights where the second gradient was taken
    ...     optimizer.step(closure)
    ...     with torch.no_grad():
    ...         for p in model.parameters():
    ...             p.add_(1e-9)
    >>> report = check(Subject("careless", build, careless), ["weights_are_restored_bitwise"])
    >>> print(report["weights_are_restored_bitwise"])
    failed: weight 0.weight differs from itself before steps at lr=0 by up to 3e-09; expected the same bits
    """
    return Report(subject.name, {law: outcome_of(law, subject) for law in (LAWS if laws is None else laws)})


def assert_conforms(subject: Subject, laws: Iterable[str] | None = None) -> None:
    """Run laws and raise if one is broken.

    Args:
        subject: The optimizer, described.
        laws: Names; all of :data:`LAWS` by default.

    Raises:
        ConformanceError: If one is broken or the optimizer raised, with every such law and what was found.
    """
    report = check(subject, laws)
    if report.broken:
        raise ConformanceError(str(report))
