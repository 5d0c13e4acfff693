"""The linear system: exact, and the same space as a dense null space."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.symmetry.linear_system import FIXED, LinearSystem, integer_basis, sparse_basis


@st.composite
def systems(draw):
    variables = draw(st.integers(1, 8))
    row = st.lists(st.integers(-2, 2), min_size=variables, max_size=variables)
    return variables, draw(st.lists(row, max_size=8)), draw(st.integers(0, variables))


@given(systems())
def test_null_space_is_that_of_the_dense_matrix(problem):
    variables, equations, leading = problem
    system = LinearSystem()
    s = [system.variable(solve_first=i < leading) for i in range(variables)]
    for row in equations:
        system.equal(sum((x * c for x, c in zip(s, row, strict=True)), FIXED), FIXED)
    found = integer_basis(system, s, leading=variables)
    dense = torch.tensor(equations, dtype=torch.float64).reshape(len(equations), variables)
    rank = int(torch.linalg.matrix_rank(dense)) if equations else 0
    assert len(found) == variables - rank == (int(torch.linalg.matrix_rank(found)) if len(found) else 0)
    assert float((dense @ found.T).abs().sum()) == 0.0


@given(systems())
def test_a_basis_seen_in_some_positions_spans_their_projection(problem):
    variables, equations, leading = problem
    system = LinearSystem()
    s = [system.variable() for _ in range(variables)]
    for row in equations:
        system.equal(sum((x * c for x, c in zip(s, row, strict=True)), FIXED), FIXED)
    whole = integer_basis(system, s, leading=variables)
    part = integer_basis(system, s, leading=leading)
    rank = int(torch.linalg.matrix_rank(whole[:, :leading])) if whole[:, :leading].numel() else 0
    assert len(part) == rank
    # What is carried along stays a solution.
    dense = torch.tensor(equations, dtype=torch.float64).reshape(len(equations), variables)
    assert float((dense @ part.T).abs().sum()) == 0.0


def test_fractions_become_primitive_integers_with_a_positive_first():
    assert sparse_basis([{0: Fraction(-1, 2), 2: Fraction(3, 4)}], leading=3) == [{0: 2, 2: -3}]


def test_dependent_vectors_are_dropped_and_sums_undone():
    one = Fraction(1)
    vectors = [{0: one, 1: one, 2: one}, {1: one}, {0: one, 1: one}, {0: one}]
    assert sparse_basis(vectors, leading=3) == [{0: 1}, {1: 1}, {2: 1}]


def test_what_moves_nothing_that_leads_is_no_generator():
    assert sparse_basis([{1: Fraction(1)}], leading=1) == []
