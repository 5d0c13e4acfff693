"""The slow diagonals agree with each other: three roads, three losses, on networks small enough to write it all out."""

import pytest
import torch
from curvature.agreement import assert_same, assume_unsaturated
from curvature.random_networks import FAMILIES, mlps, settled, small_mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ms_optim.reference import curvature as oracle

LOSSES = ["cross_entropy", "bce_with_logits", "mse"]


def targets_for(logits, loss):
    if loss == "cross_entropy":
        return torch.randint(0, logits.shape[1], (len(logits),))
    return torch.rand_like(logits) if loss == "bce_with_logits" else torch.randn_like(logits)


def assert_same_entries(actual, expected, relative=1e-10):
    """Agreement of every entry to 1e-10 of the largest of its parameter; of 0 to rounding in the largest of all."""
    assert actual.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        error = float((actual[name] - value).abs().max())
        assert error <= relative * float(value.abs().max()) + 1e-14 * largest, name


def piecewise_linear_nets():
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    images = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    return [(settled(dense), torch.randn(4, 4)), (settled(images), torch.randn(3, 2, 4, 4))]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", [0, 1], ids=["dense", "images"])
def test_gauss_newton_diagonals_are_second_derivatives_of_the_loss_of_piecewise_linear_logits(network, loss):
    model, x = piecewise_linear_nets()[network]
    targets = targets_for(model(x).detach(), loss)
    expected = oracle.brute_force_hessian_diagonals(model, x, targets, loss)
    assert max(float(value.max()) for value in expected.values()) > 1e-3
    assert_same_entries(oracle.exact_diagonals(model, x, loss), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_hessian_in_the_logits_is_that_of_the_loss_of_one_sample(loss):
    logits = torch.randn(5, 4)
    targets = targets_for(logits, loss)
    for n in range(len(logits)):
        hessian = torch.autograd.functional.hessian(
            lambda o, n=n: oracle.mean_loss(o[None], targets[n : n + 1], loss), logits[n]
        )
        assert torch.allclose(oracle.logit_hessian(logits, loss)[n], hessian, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
@given(st.data())
def test_diagonals_add_up_to_traces_and_are_those_of_the_blocks(loss, data):
    model, x = data.draw(FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]())
    diagonals = oracle.exact_diagonals(model, x, loss)
    blocks = oracle.gauss_newton_blocks(model, x, loss=loss)
    shaped = {name: blocks[name].diagonal().view_as(diagonal) for name, diagonal in diagonals.items()}
    assert_same_entries(diagonals, shaped, relative=1e-12)
    sums = {name: float(diagonal.sum()) for name, diagonal in diagonals.items()}
    assert_same(sums, oracle.gauss_newton_traces(model, x, loss), relative=1e-12)


@given(mlps())
def test_the_algorithm_of_the_paper_gives_the_same_diagonals(drawn):
    model, x = drawn
    assume_unsaturated(model, x)
    diagonals = oracle.paper_diagonals(model, x)
    assert_same_entries(diagonals, oracle.exact_diagonals(model, x))
    sums = {name: float(diagonal.sum()) for name, diagonal in diagonals.items()}
    assert_same(sums, oracle.paper_traces(model, x))


@pytest.mark.parametrize("loss", LOSSES)
def test_brute_force_is_the_diagonal_of_the_full_hessian_of_a_smooth_network(loss):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(4, 3)
    targets = targets_for(model(x).detach(), loss)
    names, values = zip(*model.named_parameters(), strict=True)

    def value(*weights):
        logits = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))
        return oracle.mean_loss(logits, targets, loss)

    blocks = torch.autograd.functional.hessian(value, tuple(values))
    diagonals = oracle.brute_force_hessian_diagonals(model, x, targets, loss)
    for index, (name, weight) in enumerate(zip(names, values, strict=True)):
        block = blocks[index][index].reshape(weight.numel(), weight.numel())
        assert torch.allclose(diagonals[name].flatten(), block.diagonal(), rtol=1e-12, atol=1e-15)
    traces = oracle.hessian_traces(model, x, targets, loss)
    assert_same(traces, {name: float(d.sum()) for name, d in diagonals.items()}, relative=1e-14)


def test_the_diagonal_of_one_linear_layer_in_closed_form():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    mse = oracle.exact_diagonals(model, x, "mse")  # (2 / K) mean of x², the same in both rows
    assert torch.allclose(mse["weight"], x.square().mean(0).expand(2, 3), rtol=1e-14)
    assert torch.allclose(mse["bias"], torch.ones(2), rtol=1e-14)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    entropy = oracle.exact_diagonals(model, x)  # p = ½: P_kk = ¼
    assert torch.allclose(entropy["weight"], x.square().mean(0).expand(2, 3) / 4, rtol=1e-14)
    binary = oracle.exact_diagonals(model, x, "bce_with_logits")  # s = ½: P_kk = ¼ / K
    assert torch.allclose(binary["weight"], x.square().mean(0).expand(2, 3) / 8, rtol=1e-14)


def test_an_unused_or_frozen_parameter():
    model, x = small_mlp(), torch.randn(3, 5)
    model.register_parameter("unused", nn.Parameter(torch.randn(2, 2)))
    model[0].weight.requires_grad_(False)
    labels = torch.tensor([0, 1, 2])
    for diagonals in (
        oracle.exact_diagonals(model, x),
        oracle.paper_diagonals(model, x),
        oracle.brute_force_hessian_diagonals(model, x, labels),
    ):
        assert diagonals.keys() == {"unused", "0.bias", "2.weight", "2.bias"}
        assert torch.equal(diagonals["unused"], torch.zeros(2, 2))


def test_an_unknown_loss_is_refused():
    model, x = small_mlp(), torch.randn(3, 5)
    with pytest.raises(ValueError, match="loss must be 'cross_entropy', 'bce_with_logits' or 'mse', got 'hinge'"):
        oracle.exact_diagonals(model, x, "hinge")
    with pytest.raises(ValueError, match="got 'hinge'"):
        oracle.mean_loss(model(x), F.one_hot(torch.tensor([0, 1, 2]), 6), "hinge")
