"""Quadrature is exact where theory says so and converges elsewhere; ends of the spectrum come with a true bound."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.curvature.operator import Operator
from ms_optim.curvature.spectrum import Spectrum, extreme_eigenpairs, lanczos, spectrum


def operator_of(matrix):
    return Operator(lambda vectors: vectors @ matrix, len(matrix))


def symmetric(d, seed=0, eigenvalues=None):
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d))
    values = torch.randn(d) if eigenvalues is None else torch.as_tensor(eigenvalues, dtype=torch.float64)
    matrix = q @ values.diag() @ q.T
    return 0.5 * (matrix + matrix.T)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def function_of(matrix, f):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ f(values).diag() @ vectors.T


FUNCTIONS = {
    "trace": lambda x: x,
    "power": lambda x: x.abs() ** 1.2,
    "logarithm": lambda x: torch.log1p(x.clamp_min(0) / 0.1),
    "count": lambda x: (x > 0).double(),
}


def test_as_many_steps_as_dimensions_give_all_eigenvalues():
    matrix = symmetric(12)
    diagonal, beside = lanczos(operator_of(matrix), torch.randn(3, 12), 20)
    assert diagonal.shape == (3, 12) and beside.shape == (3, 11)
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    right = torch.linalg.eigvalsh(matrix).expand(3, -1)
    assert torch.allclose(torch.linalg.eigvalsh(tridiagonal), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_probe_is_exact_for_polynomials_of_degree_twice_its_steps_less_one(steps):
    matrix = symmetric(15)
    found = spectrum(operator_of(matrix), 4, steps, seeded(), exact=False)
    v = operator_of(matrix).draw(4, seeded())
    for degree in range(2 * steps):
        right = (v * (v @ torch.linalg.matrix_power(matrix, degree))).sum(1)
        assert torch.allclose(found.samples(lambda x, p=degree: x**p), right, rtol=1e-11)
    beyond = (v * (v @ torch.linalg.matrix_power(matrix, 2 * steps))).sum(1)
    assert not torch.allclose(found.samples(lambda x: x ** (2 * steps)), beyond, rtol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_probe_is_exact_for_every_function_with_as_many_steps_as_dimensions(name):
    matrix, f = symmetric(14, eigenvalues=torch.linspace(-1, 2, 14)), FUNCTIONS[name]
    found = spectrum(operator_of(matrix), 5, 14, seeded(), exact=False)
    v = operator_of(matrix).draw(5, seeded())
    assert torch.allclose(found.samples(f), (v * (v @ function_of(matrix, f))).sum(1), rtol=1e-10)
    assert not found.exact


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trace_is_exact_where_the_matrix_costs_no_more_than_the_probes(name):
    matrix, f = symmetric(20), FUNCTIONS[name]
    right = float(f(torch.linalg.eigvalsh(matrix)).sum())
    for probes, steps in ((4, 5), (1, 20), (30, 1)):
        found = spectrum(operator_of(matrix), probes, steps, seeded())
        assert found.exact and found.trace(f)[1] == 0.0
        assert found.trace(f)[0] == pytest.approx(right, rel=1e-12)
    assert not spectrum(operator_of(matrix), 3, 6, seeded()).exact


@pytest.mark.parametrize("name", FUNCTIONS)
def test_quadrature_converges_with_the_standard_error_it_states(name):
    matrix, f, probes = symmetric(30, eigenvalues=torch.linspace(-0.5, 2, 30)), FUNCTIONS[name], 2000
    mean, error = spectrum(operator_of(matrix), probes, 30, seeded(1), exact=False).trace(f)
    image = function_of(matrix, f)
    variance = 2 * float(image.square().sum() - image.diagonal().square().sum())
    assert error == pytest.approx(math.sqrt(variance / probes), rel=0.1)
    assert abs(mean - float(image.trace())) < 4 * error


def test_few_steps_are_enough_for_what_is_smooth():
    matrix = symmetric(60, eigenvalues=torch.linspace(0, 3, 60))
    f = FUNCTIONS["logarithm"]
    few, all_ = (spectrum(operator_of(matrix), 10, k, seeded(), exact=False).samples(f) for k in (12, 60))
    assert torch.allclose(few, all_, rtol=1e-3)


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(6, 6), torch.eye(6), torch.ones(6, 6), torch.diag(torch.tensor([3.0, 3, 3, -1, -1, 0]))],
    ids=["zero", "identity", "rank one", "three eigenvalues"],
)
def test_invariant_spaces_end_the_recursion(matrix):
    matrix = matrix.double()
    found = spectrum(operator_of(matrix), 50, 5, seeded(), exact=False)
    v = operator_of(matrix).draw(50, seeded())
    assert torch.allclose(found.weights.sum(1), torch.full((50,), 6.0))
    for f in (lambda x: x, lambda x: x.abs() ** 0.3, lambda x: (x != 0).double()):
        right = (v * (v @ function_of(matrix.round(), lambda x, f=f: f(x.round(decimals=12))))).sum(1)
        assert torch.allclose(found.samples(f), right, atol=1e-9)


def test_a_function_may_be_infinite_where_there_is_no_weight():
    found = Spectrum(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 3.0]]), 3, exact=False)
    assert found.trace(torch.log)[0] == pytest.approx(3 * math.log(2))
    assert math.isnan(found.trace(torch.log)[1])  # one probe has no spread


@st.composite
def matrices(draw):
    d = draw(st.integers(1, 12))
    values = draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1e-9, 0.5, 1.0, 1.0001, 3.0]), min_size=d, max_size=d))
    return symmetric(d, draw(st.integers(0, 99)), values)


@given(matrices(), st.sampled_from(["largest", "magnitude"]), st.integers(1, 3), st.sampled_from([2, 4, 40]))
def test_ends_are_found_and_an_eigenvalue_lies_within_each_residual(matrix, end, count, basis):
    count = min(count, len(matrix))
    found = extreme_eigenpairs(operator_of(matrix), count, seeded(), end, 1e-8, 500, basis)
    values = torch.linalg.eigvalsh(matrix)
    rounding = 1e-13 * max(1.0, float(values.abs().max()))
    assert found.converged and len(found.values) == count
    for value, residual, vector in zip(found.values, found.residuals, found.vectors, strict=True):
        assert float((values - value).abs().min()) <= residual + rounding
        assert value <= float(values.max()) + rounding
        assert float((vector @ matrix - value * vector).norm()) == pytest.approx(residual, abs=rounding)
        assert float(vector.norm()) == pytest.approx(1, rel=1e-12)
    right = values.max() if end == "largest" else values.abs().max()
    first = found.values[0] if end == "largest" else abs(found.values[0])
    assert first == pytest.approx(float(right), abs=1e-7)


def test_several_distinct_eigenvalues_come_in_order():
    values = torch.tensor([-9.0, 0.1, 0.2, 0.5, 1.0, 3.0, 4.0, 7.0, *torch.linspace(-1, 1, 40)])
    matrix = symmetric(48, eigenvalues=values)
    for basis in (12, 40):
        found = extreme_eigenpairs(operator_of(matrix), 3, seeded(), "largest", 1e-9, 500, basis)
        assert found.values == pytest.approx((7.0, 4.0, 3.0), abs=1e-8)
        found = extreme_eigenpairs(operator_of(matrix), 3, seeded(), "magnitude", 1e-9, 500, basis)
        assert found.values == pytest.approx((-9.0, 7.0, 4.0), abs=1e-8)


def test_restarts_take_more_products_and_less_memory():
    matrix = symmetric(200, eigenvalues=torch.linspace(0, 1, 200) ** 2)
    whole = extreme_eigenpairs(operator_of(matrix), 1, seeded(), "largest", 1e-6, 1000, 200)
    small = extreme_eigenpairs(operator_of(matrix), 1, seeded(), "largest", 1e-6, 1000, 10)
    assert whole.converged and small.converged and whole.products < small.products
    assert small.values == pytest.approx(whole.values, abs=1e-10)


def test_a_search_that_stops_early_says_so_and_its_bound_holds():
    matrix = symmetric(200, eigenvalues=torch.linspace(0, 1, 200))
    found = extreme_eigenpairs(operator_of(matrix), 1, seeded(), "largest", 1e-10, 5)
    assert not found.converged and found.products == 6 and found.residuals[0] > 1e-3
    values = torch.linalg.eigvalsh(matrix)
    assert float((values - found.values[0]).abs().min()) <= found.residuals[0]
    assert found.values[0] < 1.0
