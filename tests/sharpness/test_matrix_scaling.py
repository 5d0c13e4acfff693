"""The smallest sum of two matrices under scalings: the minimum, its invariance, and zeros in any pattern."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.sharpness.matrix_scaling import smallest_sum

shapes = st.tuples(st.integers(2, 6), st.integers(2, 6))
seeds = st.integers(0, 2**16)


def lognormal(shape, seed, spread=1.0):
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).exp()


def value_at(h, q, log_s1, log_s2):
    z = log_s1[:, None] + log_s2
    return (h * np.exp(z) + q * np.exp(-z)).sum()


def by_scipy(h, q):
    """The sum of exponentials, all scales free, by a general minimiser."""
    h, q = h.numpy(), q.numpy()
    rows = h.shape[0]

    def objective(point):
        z = point[:rows, None] + point[rows:]
        up, down = h * np.exp(z), q * np.exp(-z)
        difference = up - down
        return (up + down).sum(), np.concatenate([difference.sum(1), difference.sum(0)])

    options = {"gtol": 1e-10, "maxiter": 10_000}
    return scipy.optimize.minimize(objective, np.zeros(sum(h.shape)), jac=True, method="BFGS", options=options).fun


@given(shapes, seeds, st.sampled_from([0.5, 1.0, 2.0]))
def test_it_is_what_a_general_minimiser_finds(shape, seed, spread):
    h, q = lognormal(shape, seed, spread), lognormal(shape, seed + 1, spread)
    assert smallest_sum(h, q).value == pytest.approx(by_scipy(h, q), rel=1e-9)


@given(shapes, seeds, st.sampled_from([1.0, 3.0, 8.0, 15.0]))
def test_the_residual_is_at_rounding_however_far_the_entries_are_apart(shape, seed, spread):
    found = smallest_sum(lognormal(shape, seed, spread), lognormal(shape, seed + 1, spread))
    assert found.residual <= 1e-12


@given(shapes, seeds)
def test_no_other_scales_give_less(shape, seed):
    h, q = lognormal(shape, seed), lognormal(shape, seed + 1)
    least = smallest_sum(h, q).value
    for trial in range(20):
        s1, s2 = (torch.randn(n, generator=torch.Generator().manual_seed(seed + trial)) for n in shape)
        assert value_at(h.numpy(), q.numpy(), s1.numpy(), s2.numpy()) >= least * (1 - 1e-14)


@given(shapes, seeds)
def test_rows_columns_and_the_order_of_the_two_do_not_matter(shape, seed):
    h, q = lognormal(shape, seed), lognormal(shape, seed + 1)
    value = smallest_sum(h, q).value
    scale = lognormal((shape[0], 1), seed + 2, 5.0) * lognormal((1, shape[1]), seed + 3, 5.0)
    assert smallest_sum(h * scale, q / scale).value == pytest.approx(value, rel=1e-11)
    assert smallest_sum(h.T, q.T).value == pytest.approx(value, rel=1e-12)
    assert smallest_sum(q, h).value == pytest.approx(value, rel=1e-12)
    assert smallest_sum(4 * h, 9 * q).value == pytest.approx(6 * value, rel=1e-12)


def test_where_the_product_of_the_two_has_rank_one_each_entry_gets_its_own_best():
    row, column, h = lognormal((4, 1), 0), lognormal((1, 5), 1), lognormal((4, 5), 2)
    assert smallest_sum(h, h * row * column).value == pytest.approx(float(2 * (h * (row * column).sqrt()).sum()))


@given(shapes, seeds, st.sampled_from([0.2, 0.5, 0.8]))
def test_zeros_in_any_pattern_give_the_limit_of_small_numbers(shape, seed, share):
    stream = torch.Generator().manual_seed(seed)
    h = lognormal(shape, seed) * (torch.rand(shape, generator=stream) > share)
    q = lognormal(shape, seed + 1) * (torch.rand(shape, generator=stream) > share)
    value = smallest_sum(h, q).value
    # What is added is at least 0, and goes to 0 like a root of δ, of an order of at most the number of rows + columns.
    above = [smallest_sum(h + delta, q + delta).value - value for delta in (1e-6, 1e-20, 1e-60)]
    assert all(difference >= -1e-12 * (1 + value) for difference in above)
    assert above[0] >= above[1] - 1e-12 and above[1] >= above[2] - 1e-12
    assert above[2] <= 1e-4 * (1 + value)


def test_dead_rows_and_columns_add_nothing_and_change_nothing():
    h, q = lognormal((4, 3), 0), lognormal((4, 3), 1)
    value = smallest_sum(h, q).value
    wide_h, wide_q = lognormal((6, 5), 2), lognormal((6, 5), 3)
    wide_h[:4, :3], wide_q[:4, :3] = h, q
    wide_h[4:], wide_h[:, 3:] = 0.0, 0.0  # no curvature in two rows and two columns
    assert smallest_sum(wide_h, wide_q).value == pytest.approx(value, rel=1e-13)
    assert smallest_sum(wide_q, wide_h).value == pytest.approx(value, rel=1e-13)
    assert smallest_sum(torch.zeros(3, 4), q.T).value == 0.0


def test_a_chain_of_components_is_cut_where_nothing_comes_back():
    # Row and column 0 are held together by 1 and 4, row and column 1 by 3 and 1.  Between the two pairs, the weight 5
    # pulls one way and the curvature 2 the other: together they are one component.
    h = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    q = torch.tensor([[4.0, 5.0], [0.0, 1.0]])
    both = smallest_sum(h, q).value
    assert both == pytest.approx(by_scipy(h, q), rel=1e-9)
    h[1, 0] = 0.0  # now only the weight of 5 joins them, and it can be sent to 0
    assert smallest_sum(h, q).value == pytest.approx(2 * math.sqrt(4.0) + 2 * math.sqrt(3.0), rel=1e-14)


def test_it_is_what_10000_steps_of_the_published_solver_come_near_to():
    # ibayashi-hikaru/minimum-sharpness: log-scales from 0, both matrices divided by their sums, SGD with rate 1e-3.
    h, q = lognormal((4, 6), 0, 1.5).numpy(), lognormal((4, 6), 1, 1.5).numpy()
    least = smallest_sum(torch.from_numpy(h), torch.from_numpy(q)).value
    unit = h.sum(), q.sum()
    log_s1, log_s2 = np.zeros(4), np.zeros(6)
    values = []
    for _ in range(10_000):
        z = log_s1[:, None] + log_s2
        up, down = h / unit[0] * np.exp(z), q / unit[1] * np.exp(-z)
        values.append((up + down).sum() * math.sqrt(unit[0] * unit[1]))
        log_s1, log_s2 = log_s1 - 1e-3 * (up - down).sum(1), log_s2 - 1e-3 * (up - down).sum(0)
    assert least < values[-1] < values[0]
    # Here it has gone 98.7 % of the way, and is 0.5 % above the minimum.
    assert (values[-1] - least) / (values[0] - least) < 0.02
    assert values[-1] > 1.005 * least


def test_a_large_matrix_takes_few_steps():
    found = smallest_sum(lognormal((60, 200), 0, 3.0), lognormal((60, 200), 1, 3.0))
    assert found.residual <= 1e-12 and found.steps <= 15
