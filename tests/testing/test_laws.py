"""Every law can be kept, and every law can be broken: by the smallest optimizers that do so."""

from __future__ import annotations

import random

import pytest
import torch
from testing.defects import DEFECTS
from testing.textbook import Textbook, subject

from ms_optim.testing import LAWS, Subject, check

FINDINGS = [(law, defect) for law, defects in DEFECTS.items() for defect in defects]


@pytest.mark.parametrize("law", LAWS)
def test_the_textbooks_optimizer_keeps_every_law(law):
    assert str(check(subject(), [law])[law]) == "passed"


def test_every_law_has_a_defect_that_breaks_it():
    assert list(DEFECTS) == list(LAWS)


@pytest.mark.parametrize(
    ("law", "defect"),
    FINDINGS,
    ids=[f"{law}-{d.name if isinstance(d, Subject) else d.__name__}" for law, d in FINDINGS],
)
def test_a_law_finds_its_defect(law, defect):
    described = defect if isinstance(defect, Subject) else subject(defect)
    raised = Textbook.raises if isinstance(defect, Subject) else defect.raises
    outcome = check(described, [law])[law]
    assert outcome.verdict == ("failed" if raised is None else "crashed"), outcome
    assert outcome.message.startswith(f"{raised.__name__}: ") if raised else "expected" in outcome.message


@pytest.mark.parametrize(
    "law",
    [
        "off_is_the_base_optimizer_on_random_streams",
        "a_pickle_goes_on_alike",
        "a_keyboard_interrupt_restores_the_model",
    ],
)
def test_a_law_leaves_global_state_as_it_was(law):  # kept, broken or crashed
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(123)
    random.seed(123)
    stream, python = torch.get_rng_state(), random.getstate()
    for described in (subject(), subject(DEFECTS[law][0])):
        check(described, [law])
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.equal(stream, torch.get_rng_state()) and python == random.getstate()


def test_every_law_is_a_sentence_and_explains_itself():
    for name, law in LAWS.items():
        assert law.__name__ == name and law.__doc__ and law.__doc__.splitlines()[0].endswith(".")
