"""Laws of the representative: one per class of equivalent networks, a fixed point of itself, exact in its gradient."""

import io
import math
from dataclasses import replace

import pytest
import torch
from balancing.groups import KINDS, declare, declared, element, gauges, numbers, positive, seeds, some_zero
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.balancing import Balance, balance, row_balance
from ms_optim.errors import BalanceError

# The kinds whose scale-free classes can all be pinned exactly, whatever the other classes do.
INDEPENDENT = ("chain", "biased chain", "residual", "normalised", "normalised residual")


def solve(network, traces, norms, gauge):
    return balance(network.model(norms), network.traces(traces), network.group, gauge)


def assert_one_representative(network, c, n, t0, gauge):
    a0 = t0 @ network.generators
    here = solve(network, c, n, gauge)
    there = solve(network, c * torch.exp(-2 * a0), n * torch.exp(2 * a0), gauge)
    # A class without trace and without norm is zero everywhere: its scale means nothing.
    _, classes = torch.unique(network.generators, dim=1, return_inverse=True)
    total = torch.zeros(int(classes.max()) + 1).index_add(0, classes, c + n)[classes]
    alive = total > 0
    scale_here, scale_there = numbers(here, "log_scale"), numbers(there, "log_scale") + a0
    torch.testing.assert_close(scale_there[alive], scale_here[alive], rtol=0, atol=1e-10 * (1 + a0.abs().max()))
    reached = numbers(here, "weights") * c
    torch.testing.assert_close(numbers(there, "weights") * c * torch.exp(-2 * a0), reached, rtol=1e-9, atol=0)
    assert there.minimum_sharpness == pytest.approx(here.minimum_sharpness, rel=1e-10, abs=0)
    pull = numbers(here, "pulls") * n
    torch.testing.assert_close(numbers(there, "pulls") * n * torch.exp(2 * a0), pull, rtol=1e-9, atol=0)


@given(declared(), seeds, gauges)
def test_equivalent_networks_have_one_representative(network, seed, gauge):
    count = len(network.shapes)
    c, n = positive(seed, count, 3.0), positive(seed + 1, count, 3.0)
    assert_one_representative(network, c, n, element(seed + 2, network), gauge)


@given(declared(), seeds, gauges)
def test_also_with_dead_layers_and_zero_weights(network, seed, gauge):
    count = len(network.shapes)
    c, n = some_zero(positive(seed, count, 2.0), seed, 0.3), some_zero(positive(seed + 1, count, 2.0), seed + 3, 0.2)
    assert_one_representative(network, c, n, element(seed + 2, network), gauge)


@given(declared(), seeds, gauges, st.sampled_from([0.0, 1e-20, 1e-12]))
def test_also_with_new_or_tiny_biases(network, seed, gauge, size):
    count = len(network.shapes)
    c, n = positive(seed, count, 2.0), positive(seed + 1, count, 2.0)
    n = torch.where(torch.tensor(network.biases), size * n, n)
    assert_one_representative(network, c, n, element(seed + 2, network), gauge)


@given(declared(), seeds, gauges)
def test_a_far_start_is_no_hazard(network, seed, gauge):
    count = len(network.shapes)
    c, n, t0 = positive(seed, count, 2.0), positive(seed + 1, count, 2.0), element(seed + 2, network, 1.0)
    a0 = t0 @ network.generators
    a0 = a0 * 60 / a0.abs().max()
    result = solve(network, c * torch.exp(-2 * a0), n * torch.exp(2 * a0), gauge)
    assert result.residual < 1e-12
    assert result.minimum_sharpness == pytest.approx(solve(network, c, n, gauge).minimum_sharpness, rel=1e-9)


@given(declared(), seeds, gauges)
def test_a_balanced_network_is_a_fixed_point(network, seed, gauge):
    count = len(network.shapes)
    c, n = positive(seed, count, 2.0), positive(seed + 1, count, 2.0)
    a = numbers(solve(network, c, n, gauge), "log_scale")
    again = solve(network, c * torch.exp(-2 * a), n * torch.exp(2 * a), gauge)
    assert again.t.abs().max() < 1e-12
    torch.testing.assert_close(numbers(again, "weights"), torch.ones(count), rtol=0, atol=1e-11)
    assert again.trace == pytest.approx(again.minimum_sharpness, rel=1e-12)


@given(declared(), seeds)
def test_equal_rows_are_one_representative_of_all_equivalent_networks(network, seed):
    n, t0 = positive(seed, len(network.shapes), 2.0), element(seed + 1, network)
    a0 = t0 @ network.generators
    here = row_balance(network.model(n), network.group) @ network.generators
    there = row_balance(network.model(n * torch.exp(2 * a0)), network.group) @ network.generators
    torch.testing.assert_close(there + a0, here, rtol=0, atol=1e-9 * (1 + a0.abs().max()))


@given(declared(INDEPENDENT), seeds)
def test_equal_rows_minimise_the_sum_of_mean_squares_of_rows(network, seed):
    n, free = positive(seed, len(network.shapes), 2.0), torch.tensor(network.free)
    _, classes = torch.unique(network.generators, dim=1, return_inverse=True)
    rows = torch.zeros(int(classes.max()) + 1).index_add(0, classes, torch.tensor(network.rows).double())[classes]
    a = row_balance(network.model(n), network.group) @ network.generators

    def objective(scales):
        return float((n / rows * torch.exp(2 * scales))[~free].sum())

    for trial in range(20):
        other = a + element(seed + trial, network, 10.0 ** -(trial % 4)) @ network.generators
        assert objective(other) >= objective(a) * (1 - 1e-12)
    for g in set(classes[free].tolist()):  # unit rows on average, as with every gauge
        assert float((n / rows * torch.exp(2 * a))[classes == g].sum()) == pytest.approx(1.0, rel=1e-10)


@given(declared(), seeds, gauges)
def test_a_balance_seen_from_elsewhere_is_the_balance_there(network, seed, gauge):
    count = len(network.shapes)
    c, n, t = positive(seed, count, 2.0), positive(seed + 1, count, 2.0), element(seed + 2, network)
    a = t @ network.generators
    seen = solve(network, c, n, gauge).moved(t)
    there = solve(network, c * torch.exp(-2 * a), n * torch.exp(2 * a), gauge)
    for which in ("weights", "trace_weights", "pulls"):
        torch.testing.assert_close(numbers(seen, which), numbers(there, which), rtol=1e-8, atol=0)
    assert seen.trace == pytest.approx(there.trace, rel=1e-12)
    assert seen.minimum_sharpness == pytest.approx(there.minimum_sharpness, rel=1e-9)


@given(declared(INDEPENDENT), seeds)
def test_no_rescaling_of_the_bounded_classes_has_a_smaller_trace(network, seed):
    count = len(network.shapes)
    c, n = positive(seed, count, 2.0), positive(seed + 1, count, 2.0)
    bounded = ~torch.tensor(network.free)
    a = numbers(solve(network, c, n, 0.0), "log_scale")
    best = float((c * torch.exp(-2 * a))[bounded].sum())
    for trial in range(20):
        other = a + element(seed + trial, network, 10.0 ** -(trial % 4)) @ network.generators
        assert float((c * torch.exp(-2 * other))[bounded].sum()) >= best * (1 - 1e-12)


@given(declared(INDEPENDENT), seeds)
def test_scale_free_classes_get_unit_rows_on_average(network, seed):
    count = len(network.shapes)
    n = positive(seed + 1, count, 2.0)
    a = numbers(solve(network, positive(seed, count, 2.0), n, 0.0), "log_scale")
    _, classes = torch.unique(network.generators, dim=1, return_inverse=True)
    for g in set(classes[torch.tensor(network.free)].tolist()):
        rows = sum(r for r, q in zip(network.rows, classes.tolist(), strict=True) if q == g)
        assert float((n * torch.exp(2 * a))[classes == g].sum()) == pytest.approx(rows, rel=1e-11)


@given(declared(INDEPENDENT), seeds)
def test_trace_weights_and_pulls_are_the_gradient_of_minimum_sharpness(network, seed):
    count = len(network.shapes)
    c, n = positive(seed, count, 1.0), positive(seed + 1, count, 1.0)
    result = solve(network, c, n, 0.0)
    for vector, which in ((c, "trace_weights"), (n, "pulls")):
        for p in range(count):
            # Central differences of relative step h have relative error h² and rounding 1e-16/h: 1e-9 at h = 1e-4.
            values = []
            for sign in (1.0, -1.0):
                moved = vector.clone()
                moved[p] *= 1 + sign * 1e-4
                args = (moved, n) if vector is c else (c, moved)
                values.append(solve(network, *args, 0.0).minimum_sharpness)
            slope = (values[0] - values[1]) / (2e-4 * float(vector[p]))
            scale = result.minimum_sharpness / float(vector[p])
            assert getattr(result, which)[f"p{p}"] == pytest.approx(slope, abs=1e-7 * scale)


@given(declared(INDEPENDENT), seeds, gauges)
def test_the_gradient_is_tangential_to_the_group(network, seed, gauge):
    count = len(network.shapes)
    c, n = positive(seed, count, 2.0), positive(seed + 1, count, 2.0)
    result = solve(network, c, n, gauge)
    force = -2 * numbers(result, "trace_weights") * c + 2 * numbers(result, "pulls") * n
    along = network.generators @ force
    assert along.abs().max() <= 1e-10 * float((numbers(result, "weights") * c).sum())


@given(declared(), seeds, gauges)
def test_moving_the_network_moves_its_balance(network, seed, gauge):
    count = len(network.shapes)
    c, n = positive(seed, count, 2.0), positive(seed + 1, count, 2.0)
    t = element(seed + 2, network, 0.5)
    a = t @ network.generators
    moved = solve(network, c, n, gauge).at(t).moved()
    # The same numbers, from a network that was really moved and whose balance is read at the point where it is.
    really = solve(network, c * torch.exp(-2 * a), n * torch.exp(2 * a), gauge).at(torch.zeros_like(t))
    for which in ("log_scale", "weights", "trace_weights", "pulls"):
        torch.testing.assert_close(numbers(moved, which), numbers(really, which), rtol=1e-11, atol=1e-14)
    assert moved.trace == pytest.approx(really.trace, rel=1e-12)
    assert moved.minimum_sharpness == pytest.approx(really.minimum_sharpness, rel=1e-10)
    assert moved.residual == pytest.approx(really.residual, rel=1e-9, abs=1e-11)


def test_at_the_optimum_is_the_balance_itself():
    network = declare("normalised residual", 3)
    count = len(network.shapes)
    result = solve(network, positive(0, count, 2.0), positive(1, count, 2.0), 0.25)
    same = result.at(result.t)
    assert (same.log_scale, same.weights, same.pulls) == (result.log_scale, result.weights, result.pulls)
    assert result.moved().trace == pytest.approx(result.minimum_sharpness, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_free_parameters_are_named(kind):
    network = declare(kind, 3)
    ones = torch.ones(len(network.shapes))
    expected = tuple(name for name, free in zip(network.names, network.free, strict=True) if free)
    assert solve(network, ones, ones, 0.0).free == expected


def test_the_shortest_of_equal_minimisers_is_taken():
    # Two generators that do the same: t = (s, s) is shorter than (2 s, 0).
    network = declare("chain", 2)
    doubled = torch.cat([network.generators, network.generators])
    group = type(network.group)(network.names, doubled)
    for gauge in (0.0, 0.5):
        result = balance(network.model(torch.tensor([1.0, 9.0])), {"p0": 4.0, "p1": 1.0}, group, gauge)
        assert float(result.t[0]) == pytest.approx(float(result.t[1]), abs=1e-14)
        single = solve(network, torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0]), gauge)
        assert result.log_scale["p0"] == pytest.approx(single.log_scale["p0"], abs=1e-13)


def test_a_model_without_generators_is_its_own_representative():
    network = declare("chain", 3)
    group = type(network.group)(network.names, torch.zeros(0, 3))
    result = balance(network.model(torch.ones(3)), {"p0": 1.0, "p1": 2.0, "p2": 3.0}, group)
    assert result.minimum_sharpness == result.trace == 6.0
    assert set(result.weights.values()) == {1.0}


def test_parameters_that_never_move_may_lack_a_trace():
    network = declare("residual", 2)
    c = network.traces(torch.ones(len(network.shapes)))
    last = network.names[-1]
    result = balance(network.model(torch.ones(len(c))), {k: v for k, v in c.items() if k != last}, network.group)
    assert result.weights[last] == 1.0
    assert result.trace == len(c) - 1


def test_norms_are_taken_in_float64():
    # 2^-90 squared underflows in float32.
    network = declare("chain", 2)
    module = network.model(torch.ones(2)).float()
    with torch.no_grad():
        module.p0.fill_(2.0**-90)
    result = balance(module, {"p0": 1.0, "p1": 1.0}, network.group, gauge=1.0)
    assert result.residual < 1e-12
    assert result.log_scale["p0"] == pytest.approx(0.25 * math.log((1.0 / 6) / 2.0**-180), rel=1e-6)


def test_a_checkpoint_keeps_every_public_field():
    network = declare("normalised", 2)
    ones = torch.ones(len(network.shapes))
    result = solve(network, ones, 2 * ones, 0.5)
    file = io.BytesIO()
    torch.save(result.state(), file)
    file.seek(0)
    restored = Balance.from_state(torch.load(file, weights_only=True))
    assert torch.equal(restored.t, result.t)
    assert (restored.weights, restored.pulls, restored.free) == (result.weights, result.pulls, result.free)
    with pytest.raises(BalanceError, match="checkpoint"):
        restored.moved()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("p1"), "p1 missing"),
        (lambda c: c.update(q=1.0), "q unknown"),
        (lambda c: c.update(p1=-1.0), "p1 is -1.0"),
        (lambda c: c.update(p1=float("nan")), "p1 is nan"),
        (lambda c: c.update(p1=float("inf")), "p1 is inf"),
    ],
)
def test_traces_that_cannot_be_are_refused(change, message):
    network = declare("chain", 3)
    traces = network.traces(torch.ones(3))
    change(traces)
    with pytest.raises(BalanceError, match=message):
        balance(network.model(torch.ones(3)), traces, network.group)


@pytest.mark.parametrize("gauge", [-0.1, 1.1, float("nan")])
def test_a_gauge_outside_of_the_unit_interval_is_refused(gauge):
    network = declare("chain", 2)
    with pytest.raises(ValueError, match="gauge must be in"):
        solve(network, torch.ones(2), torch.ones(2), gauge)


def test_a_group_of_another_model_is_refused():
    network, other = declare("chain", 2), declare("chain", 3)
    with pytest.raises(BalanceError, match="p2 only in the group"):
        balance(network.model(torch.ones(2)), other.traces(torch.ones(3)), other.group)
    wider = replace(network.group, shapes=((5, 4), (4, 5)))
    with pytest.raises(BalanceError, match=r"parameter p0 has shape .*, and \(5, 4\) in the group"):
        balance(network.model(torch.ones(2)), network.traces(torch.ones(2)), wider)


def test_a_diverged_network_is_refused():
    network = declare("chain", 2)
    with pytest.raises(BalanceError, match="p1 is inf"):
        solve(network, torch.ones(2), torch.tensor([1.0, float("inf")]), 0.0)


def test_an_element_of_another_group_is_refused():
    network = declare("chain", 3)
    result = solve(network, torch.ones(3), torch.ones(3), 0.0)
    with pytest.raises(BalanceError, match="2 generators"):
        result.at(torch.zeros(3))
