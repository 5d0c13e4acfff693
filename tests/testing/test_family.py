"""Our own optimizers keep every law that applies to them."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CASES, Case

from ms_optim.testing import LAWS, Subject, check
from ms_optim.testing.family import FAMILY, subject

SUBJECTS = [subject(case.kind, case.name, **case.options) for case in CASES]


def marks(described: Subject, law: str) -> list[Any]:
    """What takes long and says little."""
    return [pytest.mark.slow] if law.startswith("nothing_drifts") and "trace" in described.name else []


ROWS = [pytest.param(s, law, marks=marks(s, law), id=f"{s}-{law}") for s in SUBJECTS for law in LAWS]


@pytest.mark.parametrize(("described", "law"), ROWS)
def test_our_optimizers_keep_every_law(described, law):
    outcome = check(described, [law])[law]
    assert not outcome.broken, outcome


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_description_says_what_the_contract_says(case: Case):
    described = subject(case.kind, case.name, **case.options)
    assert described.passes == case.passes
    assert described.off is not None and case.off.items() <= described.off.items()


def test_the_family_has_each_kind_once():
    assert {described.name.split()[0] for described in FAMILY} == {"SAM", "ASAM", "MSSAM", "MSReg"}
    assert len({described.name for described in FAMILY}) == len(FAMILY)
