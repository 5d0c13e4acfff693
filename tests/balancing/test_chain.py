"""The paper's closed form, where it holds."""

import math

import numpy as np
import pytest
import torch
from balancing.groups import KINDS, declare, positive, seeds
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.balancing import balance
from ms_optim.balancing.chain import chain_log_scales, chain_minimum, closed_form, is_chain
from ms_optim.balancing.program import Program, minimise


@given(st.integers(2, 8), seeds, st.sampled_from([1.0, 10.0, 60.0]), st.sampled_from([0.0, 1.0]))
def test_closed_form_equals_newton_on_bias_free_chains(depth, seed, spread, gauge):
    rows = declare("chain", depth).generators.numpy().T.copy()
    c, n = (np.log(positive(seed + i, depth, spread).numpy()) for i in (0, 1))
    program = Program(rows, c, n, np.full(depth, -np.inf), gauge)
    t, arrived = minimise(program)
    assert arrived
    # Log-scales up to 60: 1e-12 relative to them.
    np.testing.assert_allclose(rows @ t, rows @ closed_form(program), rtol=0, atol=1e-12 * max(1.0, spread))


@given(st.integers(2, 8), seeds)
def test_minimum_sharpness_of_a_chain_is_the_papers(depth, seed):
    network = declare("chain", depth)
    c = positive(seed, depth, 5.0)
    result = balance(network.model(torch.ones(depth)), network.traces(c), network.group)
    # Theorem 1: MS = D (Π c_d)^{1/D}, α_d² = c_d / (Π c)^{1/D}.
    geometric_mean = math.prod(c.tolist()) ** (1 / depth)
    assert result.minimum_sharpness == pytest.approx(depth * geometric_mean, rel=1e-12)
    assert chain_minimum(np.log(c.numpy())) == pytest.approx(depth * geometric_mean, rel=1e-12)
    for p, value in enumerate(c.tolist()):
        assert math.exp(2 * result.log_scale[f"p{p}"]) == pytest.approx(value / geometric_mean, rel=1e-12)


@given(st.integers(2, 8), seeds)
def test_a_basis_of_the_group_is_as_good_as_another(depth, seed):
    rows = declare("chain", depth).generators.numpy().T
    # Unimodular: products of integer shears.
    mixed = rows @ np.triu(np.ones((depth - 1, depth - 1)))
    log_c = np.log(positive(seed, depth, 5.0).numpy())
    none = np.full(depth, -np.inf)
    a, b = (r @ closed_form(Program(r, log_c, none, none, 0.0)) for r in (rows, mixed))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(a, chain_log_scales(log_c), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_chains_are_chains(kind):
    # With a bias per layer, layers 1 and D have one row for weight and bias each, but those between have two.
    rows = np.unique(declare(kind, 4).generators.numpy().T, axis=0)
    assert is_chain(rows[rows.any(axis=1)]) == (kind == "chain")


def test_a_class_without_trace_has_no_closed_form():
    rows = declare("chain", 3).generators.numpy().T.copy()
    none = np.full(3, -np.inf)
    assert closed_form(Program(rows, np.array([0.0, 1.0, -np.inf]), none, none, 0.0)) is None
    assert closed_form(Program(rows, np.zeros(3), np.zeros(3), none, 0.5)) is None
