"""The statistics of paired differences: scipy's, brute force, and laws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ms_optim.sweep import Difference, holm, sign_flips
from ms_optim.sweep import paired as paired_module

NUMBERS = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=9)


@given(NUMBERS.filter(lambda d: np.std(d) > 1e-3))
def test_the_t_test_and_its_interval_are_scipys(d):
    found, expected = Difference.of(d), stats.ttest_rel(d, np.zeros(len(d)))
    assert found.n == len(d) and found.mean == pytest.approx(np.mean(d))
    assert found.error == pytest.approx(stats.sem(d))
    assert found.p_t == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@given(NUMBERS)
def test_sign_flips_are_those_of_brute_force(d):
    # In whole thousandths there is no rounding, and ties are ties.
    whole = [round(1000 * x) for x in d]
    sums = [
        abs(sum(s * x for s, x in zip(signs, whole, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(d))
    ]
    assert sign_flips(d) == sum(total >= abs(sum(whole)) for total in sums) / len(sums)


def test_sign_flips_are_scipys_permutation_test():
    d = np.random.default_rng(0).normal(0.3, 1, 8)
    expected = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flips(d) == pytest.approx(expected.pvalue)


@given(NUMBERS)
def test_who_is_subtracted_from_whom_and_in_which_unit_does_not_matter(d):
    found, turned = Difference.of(d), Difference.of([-8 * x for x in d])
    assert turned.p_signs == found.p_signs
    assert turned.p_t == pytest.approx(found.p_t, nan_ok=True)
    assert turned.mean == pytest.approx(-8 * found.mean)
    assert (turned.low, turned.high) == pytest.approx((-8 * found.high, -8 * found.low), nan_ok=True)


def test_five_seeds_cannot_be_below_a_sixteenth():
    assert sign_flips([1, 2, 3, 4, 5]) == 2 / 32
    assert sign_flips([0.0, 0.0]) == 1


def test_many_signs_are_drawn_and_come_close_to_all_of_them(monkeypatch):
    d = np.random.default_rng(1).normal(0.4, 1, 14)
    exact = sign_flips(d)
    monkeypatch.setattr(paired_module, "EXACT", 13)
    draws = paired_module._DRAWS
    # Five standard errors of a share of independent draws.
    assert abs(sign_flips(d) - exact) < 5 * math.sqrt(exact * (1 - exact) / draws)
    assert sign_flips([1.0] * 40) > 0  # the actual signs are among those that count


def test_what_cannot_be_estimated_is_not_a_number():
    assert Difference.of([]).n == 0 and math.isnan(Difference.of([]).mean)
    one = Difference.of([0.5])
    assert one.mean == 0.5 and one.p_signs == 1 and math.isnan(one.error) and math.isnan(one.p_t)
    alike = Difference.of([0.1, 0.1, 0.1])
    assert math.isnan(alike.p_t) and math.isnan(alike.low) and alike.p_signs == 0.25


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_its_definition(p_values):
    found = holm(p_values)
    k = len(p_values)
    for p, corrected in zip(p_values, found, strict=True):
        # The largest (k - rank) p among those at most as large as this one.
        below = sorted(p_values)[: sorted(p_values).index(p) + 1]
        assert corrected == pytest.approx(max(min(1, (k - rank) * each) for rank, each in enumerate(below)))
        assert corrected >= p
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(found)[order]) >= 0)


def test_holm_counts_what_has_no_p_value_as_not_rejected():
    first, second, third = holm([0.01, math.nan, 0.02])
    assert (first, third) == pytest.approx((0.03, 0.04)) and math.isnan(second)
