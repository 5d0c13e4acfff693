"""The factor S multiplies out to diag(p) − p pᵀ: exactly, on average over the signs, and in saturated corners."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.curvature.losses import logit_factor
from ms_optim.curvature.losses.logit_factor import exact_columns, probe, sampled_columns, signs
from ms_optim.reference.curvature import factor_error, logit_hessian


@st.composite
def random_logits(draw):
    """From uniform to confident: ``[N, K]``, K ≥ 2, N K small enough to go through all signs."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    samples, classes = draw(st.sampled_from([(1, 2), (1, 5), (2, 3), (3, 3), (2, 4)]))
    return draw(st.sampled_from([0.0, 1.0, 10.0])) * torch.randn(samples, classes)


def over_all_signs(logits, rest, columns):
    """The mean of S Sᵀ over every pattern of signs for ``rest`` columns, ``[N, K, K]``."""
    products = []
    for pattern in itertools.product([-1, 1], repeat=len(logits) * rest):
        with pytest.MonkeyPatch.context() as monkeypatch:
            given_signs = torch.tensor(pattern, dtype=torch.int8).view(len(logits), rest)
            monkeypatch.setattr(logit_factor, "coins", lambda shape, generator, s=given_signs: s)
            factor = columns()
        products.append(torch.einsum("cnk,cnl->nkl", factor, factor))
    return torch.stack(products).mean(0)


@given(random_logits())
def test_exact_columns_multiply_out_to_the_logit_hessian(logits):
    columns = exact_columns(logits)
    assert columns.shape == (logits.shape[1] - 1, *logits.shape)
    assert factor_error(columns, logits) < 1e-15


@given(random_logits(), st.data())
def test_columns_made_in_parts_are_the_same_columns(logits, data):
    last = logits.shape[1] - 1
    cut = data.draw(st.integers(0, last))
    parts = torch.cat([exact_columns(logits, 0, cut), exact_columns(logits, cut, last)])
    assert torch.equal(parts, exact_columns(logits))


@given(random_logits())
def test_every_column_sums_to_zero_over_the_classes(logits):
    # A constant added to all logits changes nothing, so 1 spans the kernel of P = S Sᵀ.
    assert float(exact_columns(logits).sum(-1).abs().max()) < 1e-15
    assert float(probe(logits, torch.Generator()).sum(-1).abs().max()) < 1e-14


@given(random_logits(), st.integers(0, 3))
def test_leading_columns_and_a_signed_one_are_unbiased_over_all_signs(logits, count):
    classes = logits.shape[1]
    if count >= classes - 2:
        assert factor_error(sampled_columns(logits, count, torch.Generator()), logits) < 1e-15
        return
    mean = over_all_signs(logits, classes - 1 - count, lambda: sampled_columns(logits, count, torch.Generator()))
    assert float((mean - logit_hessian(logits)).abs().max()) < 1e-15


@given(random_logits())
def test_the_probe_is_unbiased_over_all_signs(logits):
    mean = over_all_signs(logits, logits.shape[1] - 1, lambda: probe(logits, torch.Generator())[None])
    assert float((mean - logit_hessian(logits)).abs().max()) < 1e-15


@given(random_logits())
def test_leading_columns_take_the_classes_in_descending_order_of_probability(logits):
    if logits.shape[1] < 4:
        return
    leading = sampled_columns(logits, 1, torch.Generator())[0]
    p = logits.softmax(-1)
    top = p.argmax(-1, keepdim=True)
    # The first Cholesky column eliminates the likeliest class: its own entry is √(p (1 − p)), 1 − p being the others.
    others = p.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    entry = leading.gather(-1, top)
    torch.testing.assert_close(entry.square(), p.gather(-1, top) * others, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gap", [30.0, 90.0, 1000.0])
def test_saturated_logits_give_finite_columns_and_gradients(dtype, gap):
    logits = torch.tensor([[gap, 0.0, -gap, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    exact = exact_columns(logits)
    assert bool(torch.isfinite(exact).all())
    assert factor_error(exact.double(), logits.detach().double()) < 1e-6
    column = probe(logits, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(column.square().sum(), logits)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_probability_as_small_as_the_floor_has_a_signed_column_and_a_slope(dtype):
    # Classes a factor e^{−7} apart, from 1 far below the floor: 1/q_{k+1} runs through everything the type can hold.
    logits = (-7.0 * torch.arange(150)).to(dtype)[None].repeat(2, 1).requires_grad_()
    column = probe(logits, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((column * torch.randn(2, 150).to(dtype)).sum(), logits)
    assert bool(torch.isfinite(column).all()) and bool(torch.isfinite(gradient).all())
    exact = logit_factor.leading_columns(logits)
    eps = logit_factor.coins((2, 149), torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.einsum("nc,cnk->nk", eps, exact)
    torch.testing.assert_close(column.detach(), expected)


def test_small_probabilities_keep_their_digits():
    # p₂ = e^{−40}: P₂₂ ≈ 4e−18 would drown in 1 − p₁, the differences that other factors are made of.
    logits = torch.tensor([[40.0, 0.0, -1.0]])
    columns = exact_columns(logits)
    small = columns[:, 0, 1:].square().sum(0)
    p = logits.softmax(-1)[0, 1:]
    torch.testing.assert_close(small, p * (1 - p), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_probe_is_differentiable_in_the_logits(classes):
    logits = (2 * torch.randn(2, classes)).requires_grad_()

    def fixed(o):
        return probe(o, torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(fixed, logits)


def test_two_classes_need_one_column_and_no_sign():
    logits = torch.randn(4, 2)
    for columns in range(3):
        assert torch.equal(sampled_columns(logits, columns, torch.Generator()), exact_columns(logits))


def test_columns_are_detached_and_the_probe_is_not():
    logits = torch.randn(3, 4, requires_grad=True)
    assert not exact_columns(logits).requires_grad
    assert not sampled_columns(logits, 1, torch.Generator()).requires_grad
    assert probe(logits, torch.Generator()).requires_grad


def test_signs_are_plus_and_minus_one_from_the_generator_alone():
    like = torch.zeros((), dtype=torch.float32)
    state = torch.get_rng_state()
    drawn = signs((50, 40), like, torch.Generator().manual_seed(5))
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.dtype == torch.float32 and set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(drawn, signs((50, 40), like, torch.Generator().manual_seed(5)))
    assert abs(float(drawn.mean())) < 5 / 2000**0.5
