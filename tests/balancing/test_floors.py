"""Degenerate traces and norms: repaired where they decide something, and only there."""

import itertools
import math

import numpy as np
import pytest
import torch
from balancing.groups import KINDS, declare, declared, element, gauges, numbers, positive, seeds
from hypothesis import given

from ms_optim.balancing import balance
from ms_optim.balancing.floors import EPSILON, attained
from ms_optim.balancing.program import classes
from ms_optim.reference.balancing import reference_balance


def solve(network, c, n, gauge=0.0):
    return balance(network.model(torch.as_tensor(n)), network.traces(torch.as_tensor(c)), network.group, gauge)


@given(declared(("biased chain", "residual")), seeds, gauges)
def test_tiny_biases_are_left_as_they_are(network, seed, gauge):
    count = len(network.shapes)
    c, n = positive(seed, count, 1.0), positive(seed + 1, count, 1.0)
    n = torch.where(torch.tensor(network.biases), 1e-20, n)
    result = solve(network, c, n, gauge)
    assert result.notes == ()
    # The twin knows no floors; BFGS is good to about 1e-6.
    a, minimum = reference_balance(c, n, network.rows, network.generators, gauge, starts=1)
    assert result.minimum_sharpness == pytest.approx(minimum, rel=1e-5)
    torch.testing.assert_close(numbers(result, "log_scale"), a, rtol=0, atol=1e-5)


def test_a_dead_layer_is_floored_at_a_fraction_of_the_largest_product():
    # Chain of three, κ = 0, and the middle trace is 0. Floored: c = (1, f, 1), n = (1, 4, 1), f = ε · 1 / 4.
    network = declare("chain", 3)
    result = solve(network, [1.0, 0.0, 1.0], [1.0, 4.0, 1.0])
    floor = EPSILON / 4
    assert result.log_scale["p0"] == pytest.approx(-math.log(floor) / 6, rel=1e-12)
    assert result.log_scale["p1"] == pytest.approx(math.log(floor) / 3, rel=1e-12)
    # Reported without the floor.
    assert result.minimum_sharpness == pytest.approx(2 * floor ** (1 / 3), rel=1e-12)
    assert len(result.notes) == 1
    assert "trace of p1 raised from 0 to 2.5e-09" in result.notes[0]


def test_a_dead_weight_that_others_hold_is_left_as_it_is():
    # p1 (h − s) has no trace; its bias p2 (h) and p3 (s − h) hold h, p0 (s) and p5 (−s) hold s.
    network = declare("residual", 2)
    c, n = torch.ones(7), torch.ones(7)
    c[1] = 0.0
    result = solve(network, c, n)
    assert result.notes == ()
    a, minimum = reference_balance(c, n, network.rows, network.generators, 0.0, starts=1)
    assert result.minimum_sharpness == pytest.approx(minimum, rel=1e-9)
    torch.testing.assert_close(numbers(result, "log_scale"), a, rtol=0, atol=1e-6)


def test_a_zero_head_between_gauges_gets_a_norm():
    network = declare("chain", 3)
    result = solve(network, [1.0, 1.0, 1.0], [1.0, 1.0, 0.0], gauge=0.5)
    assert ["squared norm of p2 raised" in note for note in result.notes] == [True]
    assert result.residual < 1e-12
    assert result.pulls["p2"] == 0.0


def test_a_zero_norm_does_not_matter_where_norms_are_not_asked():
    network = declare("chain", 3)
    with_norm, without = (solve(network, [1.0, 2.0, 3.0], [1.0, 1.0, norm]) for norm in (1.0, 0.0))
    assert without.notes == ()
    assert without.log_scale == with_norm.log_scale


def test_a_network_without_traces_balances_norms():
    network = declare("chain", 3)
    result = solve(network, [0.0, 0.0, 0.0], [1.0, 4.0, 16.0])
    assert result.log_scale == pytest.approx({"p0": math.log(2), "p1": 0.0, "p2": -math.log(2)}, abs=1e-12)
    assert "norms are balanced instead" in result.notes[0]
    assert result.minimum_sharpness == 0.0


def test_a_new_network_with_a_zero_head_gets_unit_rows():
    # Zero head: its own trace is the only one, and every product C N is 0. Rows of p0 (3 units): e^{2a} n = 3.
    network = declare("chain", 2)
    result = solve(network, [0.0, 1.0], [12.0, 0.0])
    assert "unit-norm rows" in result.notes[0]
    # Alone, p0 would want x = e^{2a} = R/n = 1/4 and p1, whose log-scale is −a, its trace x = 1. Together:
    # (4 x − 2a) + (1/x + 2a) = 4 x + 1/x is smallest at x = 1/2.
    assert math.exp(2 * result.log_scale["p0"]) == pytest.approx(0.5, rel=1e-12)
    assert result.pulls["p1"] == 0.0
    assert result.residual < 1e-12


def test_a_class_that_is_zero_in_both_is_left_out():
    # The bias of the second layer is a class of its own.
    network = declare("biased chain", 4)
    c, n = torch.ones(8), torch.ones(8)
    without = torch.tensor([p != 3 for p in range(8)])
    result = solve(network, c * without, n * without)
    kept = [p for p in range(8) if p != 3]
    a, minimum = reference_balance(
        c[kept], n[kept], [network.rows[p] for p in kept], network.generators[:, kept], 0.0
    )
    assert result.notes == ()
    assert result.minimum_sharpness == pytest.approx(minimum, rel=1e-9)
    torch.testing.assert_close(numbers(result, "log_scale")[kept], a, rtol=0, atol=1e-6)


def test_floors_are_named_by_all_parameters_of_a_class():
    network = declare("normalised", 2)
    n = torch.ones(len(network.shapes))
    c = torch.ones(len(network.shapes))
    # Last γ and β, whose scale only the head shares.
    c[4] = c[5] = 0.0
    assert "trace of p4, p5 raised" in solve(network, c, n).notes[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gauge", [0.0, 0.3, 1.0])
def test_attained_agrees_with_the_growth_of_j_along_directions(kind, gauge):
    # Against the definition: J restricted to terms that are there, along many rays, far out.
    network = declare(kind, 2)
    found = classes(network.names, network.shapes, network.generators.numpy().tobytes())
    generator = np.random.default_rng(0)
    bounded, moving = found.moving & ~found.free, found.moving
    # Every integer direction with entries in {−1, 0, 1}: for these groups all extreme rays are among them.
    rays = found.rows @ np.array(list(itertools.product([-1.0, 0.0, 1.0], repeat=found.rows.shape[1]))).T
    verdicts = set()
    for _ in range(12):
        trace = bounded & (generator.random(len(moving)) < 0.7)
        norm = bounded & (generator.random(len(moving)) < 0.7)
        pinned = found.free & (generator.random(len(moving)) < 0.9)
        growth = np.where((rays[pinned] > 0).any(axis=0), np.inf, -2 * rays[pinned].sum(axis=0))
        if trace.any():
            growth = growth - 2 * (1 - gauge) * rays[trace].min(axis=0)
        if norm.any():
            growth = growth + 2 * gauge * rays[norm].max(axis=0)
        runs = (growth <= 1e-12) & rays[moving].any(axis=0)
        verdict = attained(found, trace, norm, pinned, moving, gauge)
        assert verdict == (not runs.any())
        verdicts.add(verdict)
    assert False in verdicts
    assert attained(found, bounded, bounded, found.free, moving, gauge)


@given(declared(), seeds)
def test_floors_do_not_depend_on_the_representative(network, seed):
    count = len(network.shapes)
    c, n = positive(seed, count, 1.0), positive(seed + 1, count, 1.0)
    c = torch.where(torch.arange(count) % 3 == seed % 3, 1e-30 * c, c)
    a0 = element(seed + 2, network) @ network.generators
    here, there = solve(network, c, n), solve(network, c * torch.exp(-2 * a0), n * torch.exp(2 * a0))
    assert len(here.notes) == len(there.notes)
    torch.testing.assert_close(numbers(there, "log_scale") + a0, numbers(here, "log_scale"), rtol=0, atol=1e-9)
