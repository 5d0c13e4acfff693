"""The factor S multiplies out to diag(p) − p pᵀ: exactly, on average over the signs, and in saturated corners."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.curvature.losses import logit_factor, probabilities
from ms_optim.curvature.losses.logit_factor import exact_columns, probe, signs, split_columns
from ms_optim.curvature.losses.probabilities import largest, log_probabilities
from ms_optim.reference.curvature import cholesky_columns, factor_error, logit_hessian


def sampled_columns(logits, columns, generator):
    """The leading columns and one signed one, or all of them where nothing is left to sample."""
    samples, classes = logits.shape
    if columns >= classes - 2:
        return exact_columns(logits)
    signed = logit_factor.coins((samples, classes - 1), generator)[None]
    return torch.cat(split_columns(logits, columns, signed))


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
    mean = over_all_signs(logits, classes - 1, lambda: sampled_columns(logits, count, torch.Generator()))
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


@st.composite
def many_classes(draw):
    """From uniform over long-tailed to saturated: ``[N, K]`` on both sides of where all classes are sorted, and r."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    classes = draw(st.sampled_from([3, 7, 128, 129, 140, 300]))
    logits = draw(st.sampled_from([0.0, 1.0, 10.0, 1000.0])) * torch.randn(draw(st.integers(1, 3)), classes)
    if draw(st.booleans()):
        logits -= 2 * torch.arange(1.0, 1 + classes).log()
    if draw(st.booleans()):
        logits = logits.round()  # ties
    return logits, draw(st.integers(0, min(classes - 1, 20)))


def split_in_log_space(logits, columns, eps):
    """Σ_{k<r} apart and Σ_{k≥r} ε_k S_k column by column, in the order of elimination that ``split_columns`` takes."""
    samples, classes = logits.shape
    head = classes - 1 if classes <= 128 else max(columns, 14)
    order = largest(logits.softmax(-1).clamp_min(torch.tensor(-700.0).exp()), columns, head + 1)
    leading, signed = torch.zeros(columns, samples, classes), torch.zeros(len(eps), samples, classes)
    for n in range(samples):
        first = order[n].tolist()
        tail = [k for k in range(classes) if k not in first]
        log_p = logit_factor.log_probabilities(logits)[n, first + tail]
        factor = cholesky_columns(log_p[None], 0, classes - 1)[:, 0]
        # The pivot and the tail: √q diag(u) (I − 2 v vᵀ / vᵀv) without its first column, v = u + e₁.
        log_q = log_p[head:].logsumexp(0)
        u = (0.5 * (log_p[head:] - log_q)).exp()
        v = u + torch.eye(len(u))[0]
        reflection = torch.eye(len(u)) - 2 * torch.outer(v, v) / v.dot(v)
        factor[head:] = 0.0
        factor[head:, head:] = (torch.diag((0.5 * log_p[head:]).exp()) @ reflection).T[1:]
        leading[:, n, first + tail] = factor[:columns]
        for m, sign in enumerate(eps[:, n].double()):
            by_class = torch.cat([sign, sign[first[-1] : first[-1] + 1] if first[-1] < classes - 1 else sign[:1]])
            chosen = sign if classes <= 128 else by_class[first[:-1] + tail]
            signed[m, n, first + tail] = chosen[columns:] @ factor[columns:]
    return leading, signed


@given(many_classes())
def test_the_split_in_probabilities_equals_the_columns_in_log_space(case):
    logits, columns = case
    eps = logit_factor.coins((2, len(logits), logits.shape[1] - 1), torch.Generator().manual_seed(0))
    root = (0.5 * logit_factor.log_probabilities(logits)).exp()  # |S_jk| ≤ √p_j
    for fast, slow in zip(split_columns(logits, columns, eps), split_in_log_space(logits, columns, eps), strict=True):
        assert bool(((fast - slow).abs() <= 1e-12 * root).all())


@given(many_classes())
def test_the_sorted_split_equals_the_signed_column_in_log_space(case):
    logits, columns = case
    logits, columns = logits[:, :100], min(columns, logits[:, :100].shape[1] - 1)
    eps = logit_factor.coins((2, len(logits), logits.shape[1] - 1), torch.Generator().manual_seed(0))
    log_p, order = logit_factor._descending(logits)
    slow = logit_factor.signed_column(log_p, columns, eps[..., columns:].double())
    fast = split_columns(logits, columns, eps)[1].gather(-1, order.expand(2, -1, -1))
    assert bool(((fast - slow).abs() <= 1e-12 * (0.5 * log_p).exp()).all())


@given(many_classes())
def test_leading_columns_and_those_that_share_a_signed_one_multiply_out_to_the_logit_hessian(case):
    # The signed column is linear in its signs: E b bᵀ is the sum over unit vectors in their place.
    logits, columns = case
    last = logits.shape[1] - 1
    units = torch.eye(last)[:, None].expand(-1, len(logits), -1)
    assert factor_error(torch.cat(split_columns(logits, columns, units)), logits) < 1e-14


@given(many_classes())
def test_split_columns_lead_with_the_likeliest_classes_and_ties_in_the_order_of_the_classes(case):
    logits, columns = case
    p = logits.softmax(-1).clamp_min(torch.tensor(-700.0).exp())
    expected = p.sort(dim=-1, descending=True, stable=True).indices[:, :columns]
    leading = split_columns(logits, columns, torch.ones(1, len(logits), logits.shape[1] - 1))[0]
    # A column is positive at the class that it eliminates, and nowhere else.
    assert torch.equal(leading.argmax(-1).T, expected)


@given(many_classes(), st.data())
def test_the_split_of_a_sample_does_not_depend_on_the_others(case, data):
    logits, columns = case
    eps = logit_factor.coins((2, len(logits), logits.shape[1] - 1), torch.Generator().manual_seed(0))
    n = data.draw(st.integers(0, len(logits) - 1))
    alone = split_columns(logits[n : n + 1], columns, eps[:, n : n + 1])
    for one, whole in zip(alone, split_columns(logits, columns, eps), strict=True):
        torch.testing.assert_close(one[:, 0], whole[:, n], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [3, 6, 128, 129, 1000])
def test_saturated_logits_give_finite_split_columns(dtype, classes):
    pattern = torch.tensor([0.0, 1e4, -1e4, 40.0, -90.0, 1e4 - 64.0])
    rows = [pattern.repeat(200)[:classes], pattern.flip(0).repeat(200)[:classes], -7.0 * torch.arange(classes)]
    rows += [torch.full((classes,), -1e4), torch.full((classes,), -1e4).index_fill(0, torch.tensor(2), 1e4)]
    logits = torch.stack(rows).to(dtype)
    eps = logit_factor.coins((3, len(logits), classes - 1), torch.Generator().manual_seed(0))
    for columns in (0, 1, 2, min(30, classes - 1)):
        for part in split_columns(logits, columns, eps):
            assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert bool(torch.isfinite(part).all())
        units = torch.eye(classes - 1)[:, None].expand(-1, len(logits), -1)
        factor = torch.cat(split_columns(logits.double(), columns, units))
        assert factor_error(factor, logits.double()) < 1e-14


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 10.0])
def test_an_unsorted_tail_adds_little_to_the_variance(scale, monkeypatch):
    weight = torch.randn(300, 32) / 32**0.5
    logits = scale * torch.randn(4, 32) @ weight.T
    units = torch.eye(299)[:, None].expand(-1, 4, -1)

    def variance():
        # Var |bᵀ J|² = 2 Σ_{k≠l} (S_kᵀ J Jᵀ S_l)² for b = Σ ε_k S_k.
        gram = torch.einsum("cnk,kd->ncd", split_columns(logits, 2, units)[1], weight)
        gram = gram @ gram.mT
        return float(2 * (gram.square().sum() - gram.diagonal(dim1=1, dim2=2).square().sum()))

    unsorted = variance()
    monkeypatch.setattr(logit_factor, "SORTED_CLASSES", 300)
    monkeypatch.setattr(probabilities, "SORTED_CLASSES", 300)
    assert unsorted < 1.05 * variance()


def test_any_number_of_coins_is_balanced_and_independent_across_the_bits_of_a_word():
    for shape in ((0,), (1,), (63,), (3, 0, 2), (7, 11, 13), (7, 11, 113), (8191,), (8192,), (8193,)):
        drawn = logit_factor.coins(shape, torch.Generator().manual_seed(1))
        assert drawn.shape == shape and drawn.dtype == torch.int8 and bool((drawn.abs() == 1).all())
    words = logit_factor.coins((4000, 64), torch.Generator().manual_seed(1)).double()
    correlation = words.T @ words / 4000 - torch.eye(64)
    assert float(correlation.abs().max()) < 5 / 4000**0.5
    assert float(words.mean(0).abs().max()) < 5 / 4000**0.5


@given(random_logits())
def test_exact_columns_are_those_of_log_space(logits):
    log_p = log_probabilities(logits)
    twin = cholesky_columns(log_p, 0, logits.shape[1] - 1)
    torch.testing.assert_close(exact_columns(logits), twin, rtol=1e-12, atol=1e-15)
