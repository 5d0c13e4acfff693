"""The search of a ball, on functions whose maximum is known."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.sharpness.ascent import climb


def searched(function, shape, radius, norm, steps, step_size=None, generator=None):
    """Climb a function of one tensor; also what points it was evaluated at."""
    visited = []

    def objective(z, wanted):
        point = z[0].clone().requires_grad_()
        value = function(point)
        visited.append(point.detach())
        return float(value.detach()), list(torch.autograd.grad(value, [point])) if wanted else None

    generator = torch.Generator().manual_seed(0) if generator is None else generator
    zero, support = [torch.zeros(shape)], [torch.ones(shape)]
    return climb(objective, zero, radius, norm, steps, step_size, support, generator), visited


def length(z, norm):
    return float(z.abs().max()) if norm == "linf" else float(z.norm())


def trust_region_maximum(hessian, gradient, radius):
    """max ½ zᵀ H z + gᵀ z on ‖z‖ = ρ: the minimum over μ > λ_max of ½ Σ g_i² / (μ − λ_i) + ½ μ ρ² (no duality gap).

    The minimum is where Σ (g_i / (μ − λ_i))² = ρ²; the value there depends on μ in second order only.
    """
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ gradient
    low, high = float(values[-1]), float(values[-1]) + float(g.norm()) / radius + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((g / (middle - values)).norm()) > radius else (low, middle)
    return float(0.5 * (g.square() / (high - values)).sum() + 0.5 * high * radius**2)


@given(st.integers(0, 2**16), st.integers(2, 6), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_maximum_of_a_convex_quadratic_on_a_ball(seed, size, radius):
    torch.manual_seed(seed)
    factor, gradient = torch.randn(size, size), torch.randn(size)
    hessian = factor @ factor.T
    found, visited = searched(lambda z: 0.5 * z @ hessian @ z + gradient @ z, (size,), radius, "l2", 400)
    expected = trust_region_maximum(hessian, gradient, radius)
    assert expected * (1 - 1e-5) <= found.value <= expected * (1 + 1e-12)
    assert max(length(z, "l2") for z in visited) <= radius * (1 + 1e-12)


def test_from_a_minimum_it_finds_the_largest_eigenvalue():
    factor = torch.randn(6, 6)
    hessian = factor @ factor.T
    found, _ = searched(lambda z: 0.5 * z @ hessian @ z, (6,), 0.7, "l2", 200)
    assert found.start == 0.0
    assert found.value == pytest.approx(0.5 * 0.49 * float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-8)


def test_an_interior_maximum_needs_the_halving_of_the_step():
    target = torch.tensor([0.3, -0.2, 0.1])
    for norm in ("l2", "linf"):
        found, visited = searched(lambda z: -(z - target).square().sum(), (3,), 1.0, norm, 300)
        assert float((found.point[0] - target).abs().max()) < 1e-3
        assert max(length(z, norm) for z in visited) <= 1.0 + 1e-12


@given(st.integers(0, 2**16))
def test_the_maximum_of_a_linear_function_in_one_step(seed):
    torch.manual_seed(seed)
    slope = torch.randn(7)
    for norm, dual in (("l2", slope.norm()), ("linf", slope.abs().sum())):
        found, visited = searched(lambda z: slope @ z, (7,), 0.4, norm, 1)
        assert found.value == pytest.approx(0.4 * float(dual), rel=1e-12)
        assert len(visited) == 2


@given(st.integers(0, 2**16))
def test_a_cube_is_never_left_and_its_corners_bound_a_convex_function(seed):
    torch.manual_seed(seed)
    rows = torch.randn(3, 5)
    corners = 0.5 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)))

    def function(z):
        return torch.logsumexp(rows @ z, 0)

    best = float(torch.logsumexp(corners @ rows.T, 1).max())
    found, visited = searched(function, (5,), 0.5, "linf", 30)
    assert found.value <= best * (1 + 1e-12)
    assert found.value >= float(function(torch.zeros(5)))
    assert max(length(z, "linf") for z in visited) <= 0.5


def test_the_best_point_is_kept_and_the_centre_is_one():
    found, _ = searched(lambda z: -z.square().sum() + 1e-9 * z.sum(), (3,), 5.0, "l2", 1)
    assert found.value == found.start == 0.0 and torch.equal(found.point[0], torch.zeros(3))
    found, visited = searched(lambda z: (7 * z).sin().sum(), (4,), 2.0, "l2", 50)
    assert found.value == max(float((7 * z).sin().sum()) for z in visited)
    assert float((7 * found.point[0]).sin().sum()) == found.value


def test_values_that_are_no_numbers_are_no_candidates():
    def function(z):
        return torch.where(z.norm() > 0.5, z.sum() * torch.nan, z.sum())

    found, _ = searched(function, (3,), 1.0, "l2", 60)
    assert 0.0 < found.value <= 0.5 * 3**0.5 * (1 + 1e-12)


def test_the_random_direction_comes_from_the_generator_and_only_where_it_is_needed():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    searched(lambda z: z.sum(), (3,), 1.0, "l2", 5, generator=generator)
    assert torch.equal(before, generator.get_state())
    searched(lambda z: z.square().sum(), (3,), 1.0, "l2", 5, generator=generator)
    assert not torch.equal(before, generator.get_state())
