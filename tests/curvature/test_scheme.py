"""Every scheme: what is exact is, what is sampled is unbiased, and its standard error is the one it has."""

import math
from itertools import pairwise

import pytest
import torch
from curvature.agreement import assert_same
from curvature.random_networks import small_mlp
from torch import nn

from ms_optim.curvature import hessian_diagonal, hessian_trace, measurement
from ms_optim.curvature.losses.named_loss import loss_of
from ms_optim.reference import curvature as oracle

LOSSES = ("cross_entropy", "bce_with_logits", "mse")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def stacked(result):
    """The values, flattened into one vector."""
    return torch.cat([torch.as_tensor(value).reshape(-1) for value in result.values()])


def errors_of(result):
    """The standard errors, flattened in the same order."""
    return torch.cat(
        [torch.as_tensor(error).reshape(-1) for error in result.standard_error.values()] or [torch.zeros(0)]
    )


def draws(measure, count, *args, **options):
    """Values and standard errors of many seeds: ``[count, entries]`` each."""
    found = [measure(*args, generator=seeded(seed), **options) for seed in range(count)]
    return torch.stack([stacked(f) for f in found]), torch.stack([errors_of(f) for f in found]), found


def assert_unbiased(values, exact):
    """The mean is within five of its own standard errors of the exact value."""
    spread = values.std(0) / math.sqrt(len(values))
    # An entry whose sampled part vanishes has no spread: it is exact to rounding.
    assert bool(((values.mean(0) - exact).abs() <= 5 * spread + 1e-13 * exact.abs().max()).all())


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("columns", "probes"), [(0, 1), (2, 1), (0, 3), (1, 2)])
def test_sampled_columns_are_unbiased(measure, loss, columns, probes):
    model, x = small_mlp(), torch.randn(5, 5)
    exact = stacked(measure(model, x, loss=loss))
    values, _, found = draws(measure, 100, model, x, loss=loss, columns=columns, probes=probes)
    assert float(values.std(0).max()) > 1e-4 * float(exact.max())  # something was sampled
    assert_unbiased(values, exact)
    assert all(f.backpropagations == columns + probes for f in found)


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("probes", [2, 4])
def test_the_standard_error_is_calibrated(measure, loss, probes):
    model, x = small_mlp(), [torch.randn(4, 5), torch.randn(3, 5)]
    values, errors, _ = draws(measure, 250, model, x, loss=loss, columns=1, probes=probes)
    empirical = (values - values.mean(0)).square()
    claimed = errors.square()
    # Where something was sampled (the head's gradients of different classes do not meet: there nothing is lost).
    sampled = empirical.mean(0) > 1e-20
    assert int(sampled.sum()) >= 2 * (len(values.T) // 5)
    # E(empirical − claimed) = 0 entry by entry, judged by the scatter of that difference itself.
    difference = empirical * len(values) / (len(values) - 1) - claimed
    spread = difference.std(0) / math.sqrt(len(values))
    assert bool((difference.mean(0).abs() <= 5 * spread + 1e-20)[sampled].all())
    ratio = float(empirical.sum(0)[sampled].sum() / claimed.sum(0)[sampled].sum())
    assert ratio == pytest.approx(1.0, abs=0.25)
    assert bool((claimed.mean(0)[~sampled] <= 1e-20).all())


def test_more_probes_have_a_smaller_standard_error():
    model, x = small_mlp(), torch.randn(32, 5)
    errors = [float(draws(hessian_trace, 20, model, x, columns=0, probes=m)[1].square().mean()) for m in (2, 8, 32)]
    for few, many in pairwise(errors):
        assert 2.5 < few / many < 6.5  # 4 in expectation


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
def test_the_standard_error_is_zero_without_samples_and_unknown_of_one_probe(measure):
    model, x = small_mlp(classes=6), torch.randn(4, 5)
    for columns, probes in ((None, 1), ("rank", 1), (4, 2), (100, 3)):
        result = measure(model, x, columns=columns, probes=probes)
        assert not bool(errors_of(result).any()), columns
    single = measure(model, x, columns=1)
    if measure is hessian_trace:
        assert all(math.isnan(error) for error in single.standard_error.values())
        assert list(single.standard_error) == list(single)
    else:
        assert single.standard_error == {}
    known = measure(model, x, columns=1, probes=2)
    assert all(
        torch.as_tensor(known.standard_error[name]).shape == torch.as_tensor(known[name]).shape for name in known
    )


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
@pytest.mark.parametrize("loss", LOSSES)
def test_enough_columns_are_exact(measure, loss):
    model, x = small_mlp(classes=6), torch.randn(4, 5)
    exact = stacked(measure(model, x, loss=loss))
    rank = loss_of(loss).rank(6)
    for columns in (rank - 1, rank, 40):
        found = stacked(measure(model, x, loss=loss, columns=columns))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)


def test_a_sampled_diagonal_is_reproducible_and_follows_its_generator():
    model, x = small_mlp(), torch.randn(4, 5)

    def draw(seed):
        return stacked(hessian_diagonal(model, x, 1, generator=seeded(seed)))

    state = torch.get_rng_state()
    assert torch.equal(stacked(hessian_diagonal(model, x, 1)), stacked(hessian_diagonal(model, x, 1)))
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert torch.equal(state, torch.get_rng_state())
    shared = seeded(3)  # goes on from call to call
    first, second = (stacked(hessian_diagonal(model, x, 1, generator=shared)) for _ in range(2))
    assert torch.equal(first, draw(3)) and not torch.equal(first, second)


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
@pytest.mark.parametrize("options", [{"columns": 1}, {"columns": 0, "probes": 3}, {"columns": 2, "probes": 2}])
def test_sampled_results_do_not_depend_on_the_chunks(measure, options, monkeypatch):
    model, x = small_mlp(), torch.randn(23, 5)
    whole = measure(model, x, **options)
    monkeypatch.setattr(measurement, "_SMALL_SAMPLES", 0)
    for cache in (1, 4000, 12 * 2**20):
        monkeypatch.setattr("ms_optim.curvature.budget._CACHE_BYTES", cache)
        monkeypatch.setattr("ms_optim.curvature.budget._FEWEST_SAMPLES", 5)
        measurement._PLANS.clear()
        chunked = measure(model, x, **options)
        torch.testing.assert_close(stacked(chunked), stacked(whole), rtol=1e-12, atol=1e-15)
        if measure is hessian_trace and options.get("probes", 1) > 1:
            torch.testing.assert_close(errors_of(chunked), errors_of(whole), rtol=1e-10, atol=1e-15)


# --- adaptive ---------------------------------------------------------------------------------------------------------


def wide_mlp(classes=24):
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, classes))


def judged(result, tolerance):
    """Whether each standard error is within the tolerance: entry by entry for traces, by the norm for diagonals."""
    for name in result:
        error, value = torch.as_tensor(result.standard_error[name]), torch.as_tensor(result[name])
        assert float(error.norm()) <= tolerance * float(value.norm()), name


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
@pytest.mark.parametrize("loss", LOSSES)
def test_adaptive_columns_reach_the_tolerance_and_grow_with_it(measure, loss):
    model, x = wide_mlp(), torch.randn(16, 5)
    exact = measure(model, x, loss=loss)
    sent = []
    for tolerance in (0.5, 0.1, 0.03):
        result = measure(model, x, loss=loss, tolerance=tolerance)
        judged(result, tolerance)
        for name in exact:
            error = torch.as_tensor(result[name]) - torch.as_tensor(exact[name])
            assert float(error.norm()) <= 6 * tolerance * float(torch.as_tensor(exact[name]).norm())
        sent.append(result.backpropagations)
    assert sent == sorted(sent) and sent[0] < sent[-1]
    if measure is hessian_trace or loss == "cross_entropy":  # else no column is larger than another
        assert sent[0] < loss_of(loss).rank(24)


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
def test_adaptive_estimates_are_unbiased(measure):
    model, x = wide_mlp(), torch.randn(3, 5)
    values, _, found = draws(measure, 100, model, x, tolerance=0.1, probes=2)
    assert len({f.backpropagations for f in found}) > 1  # when it stopped depended on the signs
    assert_unbiased(values, stacked(measure(model, x)))


def test_adaptive_estimates_are_unbiased_where_stopping_has_the_most_to_do_with_the_value():
    # One sample and one parameter: with the pilot's own value, stopping prefers the small ones by six standard errors.
    model, x = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 24, bias=False)), torch.randn(1, 5)
    model[1].requires_grad_(False)
    options = {"columns": 0, "tolerance": 0.03, "probes": 2}
    values, _, found = draws(hessian_trace, 1000, model, x, **options)
    assert len({f.backpropagations for f in found}) > 4
    assert_unbiased(values, stacked(hessian_trace(model, x)))


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
def test_the_standard_error_of_an_adaptive_estimate_is_calibrated(measure):
    # That of the signs which stopped it would be too small, by up to a factor of two in the variance.
    model, x = wide_mlp(), torch.randn(6, 5)
    values, errors, found = draws(measure, 300, model, x, tolerance=0.1, probes=2)
    assert len({f.backpropagations for f in found}) > 1
    difference = (values - values.mean(0)).square() * len(values) / (len(values) - 1) - errors.square()
    spread = difference.std(0) / math.sqrt(len(values))
    assert bool((difference.mean(0).abs() <= 5 * spread + 1e-20).all())
    ratio = float((values - values.mean(0)).square().sum() / errors.square().sum())
    assert ratio == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
def test_a_tolerance_that_sampling_cannot_reach_is_exact(measure):
    model, x = small_mlp(classes=9), torch.randn(4, 5)
    exact = measure(model, x)
    for begin in (None, 0, 3, 7, 8, 50):
        result = measure(model, x, columns=begin, tolerance=1e-9)
        torch.testing.assert_close(stacked(result), stacked(exact), rtol=1e-12, atol=1e-14)
        assert not bool(errors_of(result).any())


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal])
def test_over_many_batches_the_running_error_is_judged(measure):
    model, x = wide_mlp(), torch.randn(64, 5)
    data = list(x.split(4))
    tolerance = 0.05
    result = measure(model, data, tolerance=tolerance)
    judged(result, tolerance)
    # Each batch alone would have to be as precise; together they need fewer columns.
    alone = [measure(model, part, tolerance=tolerance).backpropagations for part in data]
    assert result.backpropagations < sum(alone) / len(alone)
    assert_unbiased(draws(measure, 30, model, data, tolerance=0.2)[0], stacked(measure(model, data)))


def test_adaptive_results_are_reproducible():
    model, x = wide_mlp(), torch.randn(16, 5)

    def draw(seed):
        return dict(hessian_trace(model, x, tolerance=0.1, generator=seeded(seed)))

    assert draw(1) == draw(1) != draw(2)


# --- rank -------------------------------------------------------------------------------------------------------------


def staggered(classes, step):
    """A network whose classes are less and less likely, each by a factor of about exp(−step)."""
    model = small_mlp(classes)
    with torch.no_grad():
        model[2].bias.copy_(-step * torch.arange(classes)[torch.randperm(classes)])
    return model


def rank_bound(model, x, eps):
    """ε · max_i σ_max(J_i)² · Σ_i Tr P_i / n for each parameter, from whole Jacobians."""
    logits, jacobian = oracle.jacobians(model, x)
    total = float(oracle.logit_hessian(logits.detach()).diagonal(dim1=1, dim2=2).sum())
    return {
        name: eps * float(torch.linalg.matrix_norm(j, 2).square().max()) * total / len(logits)
        for name, j in jacobian.items()
    }


@pytest.mark.parametrize("step", [0.0, 5.0, 30.0])
def test_the_numerical_rank_keeps_its_bound_and_saves_columns_where_logits_saturate(step):
    model, x = staggered(12, step), torch.randn(6, 5)
    exact, ranked = hessian_trace(model, x), hessian_trace(model, x, columns="rank")
    bound = rank_bound(model, x, torch.finfo(torch.float64).eps)
    for name in exact:
        # Never too large, too small by at most the bound; both to their own rounding.
        rounding = 1e-12 * exact[name]
        assert -rounding <= exact[name] - ranked[name] <= bound[name] + rounding
    if step == 0.0:
        assert ranked.backpropagations == 11
        assert_same(ranked, dict(exact), relative=1e-12)
    else:
        assert 0 < ranked.backpropagations < 11
    diagonals, expected = hessian_diagonal(model, x, columns="rank"), hessian_diagonal(model, x)
    for name in diagonals:
        error = (expected[name] - diagonals[name]).sum()
        assert float(error.abs()) <= bound[name] + 1e-12 * exact[name]


def test_the_bound_holds_where_what_is_left_out_can_be_seen():
    # In float32 the left-out part is 1e-7 of P, and float64 shows it.
    model, x = staggered(12, 5.0), torch.randn(6, 5)
    logits = model(x)
    eps = torch.finfo(torch.float32).eps
    loss = loss_of("cross_entropy")
    rank = loss.numerical_rank(logits, eps)
    assert rank < 11
    _, jacobian = oracle.jacobians(model, x)
    columns = loss.leading(logits, 0, rank)
    bound = rank_bound(model, x, eps)
    exact = oracle.gauss_newton_traces(model, x)
    seen = False
    for name, j in jacobian.items():
        kept = float(torch.einsum("cnk,nkj->cnj", columns, j).square().sum()) / len(x)
        assert -1e-13 * exact[name] <= exact[name] - kept <= bound[name]
        seen |= exact[name] - kept > 1e-12 * exact[name]
    assert seen


def test_a_batch_whose_probabilities_are_all_zero_or_one_needs_no_column():
    model, x = small_mlp(classes=4), torch.randn(3, 5)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([0.0, 4000.0, -4000.0, 0.0]))
    ranked = hessian_trace(model, x, columns="rank")
    assert ranked.backpropagations == 0 and ranked.total == 0.0
    assert hessian_diagonal(model, x, columns="rank")["2.weight"].shape == (4, 7)


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_the_numerical_rank_of_other_losses(loss):
    model, x = small_mlp(classes=5), torch.randn(4, 5)
    assert_same(
        hessian_trace(model, x, columns="rank", loss=loss), dict(hessian_trace(model, x, loss=loss)), relative=1e-12
    )
    with torch.no_grad():
        model[2].bias.add_(torch.tensor([0.0, 90.0, 0.0, 0.0, -90.0]))
    ranked = hessian_trace(model, x, columns="rank", loss=loss)
    assert ranked.backpropagations == (3 if loss == "bce_with_logits" else 5)
    assert_same(ranked, dict(hessian_trace(model, x, loss=loss)), relative=1e-12)


def test_batches_of_different_ranks_add_up():
    model, x = nn.Linear(5, 8, bias=False), torch.randn(6, 5)
    data = [x, 300 * x]
    ranked = hessian_trace(model, data, columns="rank")
    assert_same(ranked, dict(hessian_trace(model, data)), relative=1e-12)
    counts = [hessian_trace(model, part, columns="rank").backpropagations for part in data]
    assert counts[0] != counts[1] and ranked.backpropagations == pytest.approx(sum(counts) / 2)
