"""What is asked of the suite, and what it answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from testing.defects import AlongTheSign, NeedsGradients, ReturnsNothing
from testing.textbook import subject

from ms_optim.errors import ConformanceError
from ms_optim.testing import LAWS, NotApplicable, Outcome, assert_conforms, check

RETURNS, STEEPEST = "a_step_returns_the_loss", "the_ascent_is_the_steepest"


def test_a_report_has_an_outcome_for_every_law_in_the_order_of_the_table():
    excluded = {law: "left out" for law in LAWS if law != RETURNS}
    report = check(replace(subject(), excluded=excluded))
    assert list(report) == list(LAWS) and len(report) == len(LAWS)
    assert report[RETURNS] == Outcome("passed")
    assert report[STEEPEST] == Outcome("not applicable", "left out")
    assert report.broken == {} and str(report) == "Textbook keeps 1 of 1 laws"


def test_a_broken_law_is_told_apart_from_an_optimizer_that_raises_an_assertion():
    assert check(subject(ReturnsNothing), [RETURNS])[RETURNS].verdict == "failed"
    crashed = check(subject(NeedsGradients), [RETURNS])[RETURNS]
    assert crashed == Outcome("crashed", "AssertionError: no gradients") and crashed.broken


def test_a_subject_that_does_not_conform_raises_with_every_broken_law():
    assert_conforms(subject(ReturnsNothing), [STEEPEST])
    with pytest.raises(
        ConformanceError, match=r"keeps 0 of 1 laws\n  a_step_returns_the_loss: failed: step returned None"
    ):
        assert_conforms(subject(ReturnsNothing), [RETURNS])
    with pytest.raises(AssertionError, match="steepest ascent"):
        assert_conforms(subject(AlongTheSign), [RETURNS, STEEPEST])


def test_a_law_can_be_called_by_itself():
    LAWS[RETURNS](subject())
    with pytest.raises(ConformanceError, match="expected the loss of the first evaluation"):
        LAWS[RETURNS](subject(ReturnsNothing))
    with pytest.raises(NotApplicable, match="two steps"):
        LAWS[RETURNS](replace(subject(), excluded={RETURNS: "it has two steps"}))


def test_a_law_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no law 'the_loss_falls'"):
        check(subject(), ["the_loss_falls"])


def test_an_interrupt_that_is_the_users_stops_the_suite():
    def interrupted(optimizer, model, closure):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(replace(subject(), step=interrupted), ["a_keyboard_interrupt_restores_the_model"])


def test_what_an_optimizer_lacks_is_not_applicable():
    described = replace(subject(), off=None, bases=(torch.optim.SGD,), norm=None, scaled_step=None, rho_key=None)
    reasons = {law: outcome.message for law, outcome in check(described).items() if outcome.verdict == "not applicable"}
    assert reasons == {
        "off_is_the_base_optimizer_on_weights": "no option switches its own part off",
        "off_is_the_base_optimizer_on_buffers": "no option switches its own part off",
        "off_is_the_base_optimizer_on_random_streams": "no option switches its own part off",
        "the_perturbation_has_norm_rho": "its perturbation has no length ρ",
        "the_ascent_is_the_steepest": "its perturbation has no length ρ",
        "a_group_keeps_its_radius": "its perturbation has no radius",
        "a_negative_radius_is_refused": "there is no radius",
        "a_resumed_run_is_the_uninterrupted_one_with_adam": "its base optimizer is never Adam",
        "a_resumed_run_is_the_uninterrupted_one_with_adamw": "its base optimizer is never AdamW",
        "a_scaler_as_documented_changes_nothing": "no way to use a GradScaler is documented",
    }
