"""The program against its slow twin and against automatic differentiation."""

import numpy as np
import pytest
import torch
from balancing.groups import KINDS, declare, declared, element, gauges, numbers, positive, seeds
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.balancing import balance
from ms_optim.balancing.program import scale_free
from ms_optim.reference.balancing import reference_balance, reference_free, reference_objective


@given(declared(), seeds, gauges)
def test_the_representative_is_that_of_the_slow_twin(network, seed, gauge):
    count = len(network.shapes)
    c, n = positive(seed, count, 1.5), positive(seed + 1, count, 1.5)
    result = balance(network.model(n), network.traces(c), network.group, gauge)
    a, minimum = reference_balance(c, n, network.rows, network.generators, gauge, starts=2)
    # BFGS stops at a gradient of about 1e-8, so its value is good to 1e-12 and its point to about 1e-6.
    torch.testing.assert_close(numbers(result, "log_scale"), a, rtol=0, atol=1e-5)
    assert result.minimum_sharpness == pytest.approx(minimum, rel=1e-4)
    ours, theirs = (
        reference_objective(t, c, n, network.rows, network.generators, network.free, gauge)
        for t in (result.t, torch.linalg.lstsq(network.generators.T, a[:, None]).solution[:, 0])
    )
    assert float(ours) <= float(theirs) + 1e-12 * abs(float(theirs))


@given(declared(), seeds, gauges)
def test_value_gradient_and_hessian_are_those_of_the_printed_formula(network, seed, gauge):
    count = len(network.shapes)
    c, n = positive(seed, count, 1.5), positive(seed + 1, count, 1.5)
    program = balance(network.model(n), network.traces(c), network.group, gauge)._representative.program

    def printed(t):
        return reference_objective(t, c, n, network.rows, network.generators, network.free, gauge)

    t = element(seed + 2, network, 0.5)
    a = program.rows @ t.numpy()
    gradient, hessian = program.derivatives(a, program.rows)
    assert program.value(a) == pytest.approx(float(printed(t)), rel=1e-11, abs=1e-11)
    expected = torch.autograd.functional.jacobian(printed, t)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(hessian, torch.autograd.functional.hessian(printed, t), rtol=1e-9, atol=1e-9)
    assert program.residual(t.numpy()) == pytest.approx(float(expected.abs().max()), rel=1e-10)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_free_set_is_the_declared_one(kind, depth):
    network = declare(kind, depth)
    assert tuple(scale_free(network.generators.numpy().T).tolist()) == network.free


@given(st.integers(1, 5), st.integers(1, 8), seeds)
def test_the_scale_free_set_is_that_of_one_program_per_parameter(dimension, count, seed):
    generator = torch.Generator().manual_seed(seed)
    generators = torch.randint(-1, 2, (dimension, count), generator=generator).double()
    assert scale_free(generators.numpy().T).tolist() == reference_free(generators)


@given(declared(), seeds, gauges, st.sampled_from([1.0, 5.0, 20.0]))
def test_newton_arrives_from_numbers_of_any_size(network, seed, gauge, spread):
    count = len(network.shapes)
    c, n = positive(seed, count, spread), positive(seed + 1, count, spread)
    result = balance(network.model(n), network.traces(c), network.group, gauge)
    assert result.residual < 1e-12
    assert not [note for note in result.notes if "not reached" in note]
