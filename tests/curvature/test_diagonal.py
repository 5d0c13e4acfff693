"""Diagonals equal what brute force says of random networks, for every loss; their sums are the traces."""

import copy

import pytest
import torch
from curvature.agreement import assert_same, assume_unsaturated
from curvature.random_networks import FAMILIES, settled, small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import ZOO

from ms_optim.curvature import hessian_diagonal, hessian_trace
from ms_optim.curvature.rules import contraction as contractions
from ms_optim.errors import CurvatureError, UnsupportedError
from ms_optim.reference import curvature as oracle

LOSSES = ("cross_entropy", "bce_with_logits", "mse")


def assert_close(actual, expected, names=None, relative=1e-10):
    """Agreement of every entry to 1e-10 of the largest of its parameter, and to 1e-14 of the largest of all."""
    largest = max(float(diagonal.abs().max()) for diagonal in expected.values())
    for name in expected if names is None else names:
        assert actual[name].shape == expected[name].shape, name
        bound = relative * float(expected[name].abs().max()) + 1e-14 * largest
        assert float((actual[name] - expected[name]).abs().max()) <= bound, name


def targets_for(loss, logits):
    """Some targets of the right kind: they must not matter."""
    if loss == "cross_entropy":
        return torch.randint(0, logits.shape[1], (len(logits),))
    return torch.rand_like(logits)


def check(model, x, loss):
    """A diagonal against Jacobians, second derivatives and the trace."""
    diagonals = hessian_diagonal(model, x, loss=loss)
    assert_close(diagonals, oracle.exact_diagonals(model, x, loss=loss))
    exact = [name for name in diagonals if diagonals.kind[name] == "hessian"]
    targets = targets_for(loss, oracle.logits_of(model, x).detach())
    assert_close(diagonals, oracle.brute_force_hessian_diagonals(model, x, targets, loss), exact)
    traces = hessian_trace(model, x, loss=loss)
    assert_same({name: float(diagonal.sum()) for name, diagonal in diagonals.items()}, dict(traces))
    assert diagonals.kind == traces.kind and diagonals.generic == traces.generic
    assert diagonals.samples == traces.samples
    assert all(not bool(error.any()) for error in diagonals.standard_error.values())
    return traces, targets


@pytest.mark.parametrize("family", FAMILIES)
@given(st.data())
@settings(max_examples=12)
def test_diagonal_equals_brute_force(family, data):
    model, x = data.draw(FAMILIES[family]())
    assume_unsaturated(model, x)
    check(model, x, "cross_entropy")


@pytest.mark.parametrize("loss", LOSSES[1:])
@pytest.mark.parametrize("family", FAMILIES)
@given(st.data())
@settings(max_examples=5)
def test_trace_and_diagonal_equal_brute_force_for_other_losses(family, loss, data):
    model, x = data.draw(FAMILIES[family]())
    traces, targets = check(model, x, loss)
    assert_same(traces, oracle.gauss_newton_traces(model, x, loss=loss))
    exact = [name for name in traces if traces.kind[name] == "hessian"]
    assert_same(traces, oracle.hessian_traces(model, x, targets, loss), exact, relative=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", ZOO, ids=str)
def test_diagonal_equals_brute_force_on_the_zoo(network, loss):
    model, x = settled(network.build()), network.inputs(2)
    diagonals = hessian_diagonal(model, x, loss=loss)
    assert_close(diagonals, oracle.exact_diagonals(model, x, loss=loss))
    if loss != "cross_entropy":
        assert_same(hessian_trace(model, x, loss=loss), oracle.gauss_newton_traces(model, x, loss=loss))
    exact = [name for name in diagonals if diagonals.kind[name] == "hessian"]
    targets = targets_for(loss, oracle.logits_of(model, x).detach())
    assert_close(diagonals, oracle.brute_force_hessian_diagonals(model, x, targets, loss), exact)


def test_chunks_of_every_size_change_nothing(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=4), nn.Flatten(), nn.Linear(3, 4)
    )
    x = torch.randn(3, 2, 6, 6)
    monkeypatch.setattr(contractions, "_CHUNK_BYTES", 1)
    assert_close(hessian_diagonal(model, x), oracle.exact_diagonals(model, x))


MODULES = {
    "cross_entropy": [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.3),
    ],
    "bce_with_logits": [nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(weight=torch.ones(6))],
    "mse": [nn.MSELoss(), "squared_error"],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_may_be_named_or_be_the_module_and_its_sum_is_samples_times_its_mean(loss):
    model, x = small_mlp(), torch.randn(4, 5)
    diagonals, traces = hessian_diagonal(model, x, loss=loss), hessian_trace(model, x, loss=loss)
    for module in MODULES[loss]:
        assert_close(hessian_diagonal(model, x, loss=module), dict(diagonals), relative=1e-14)
        assert_same(hessian_trace(model, x, loss=module), dict(traces), relative=1e-14)
    # torch sums over all elements, where its mean divides by samples (and by outputs, but for the cross-entropy).
    factor = len(x) * (1 if loss == "cross_entropy" else 6)
    summed = type(MODULES[loss][0])(reduction="sum")
    assert_same(
        hessian_trace(model, list(x.split(3)), loss=summed), {n: factor * c for n, c in traces.items()}, relative=1e-13
    )
    assert_close(
        hessian_diagonal(model, list(x.split(3)), loss=summed),
        {n: factor * d for n, d in diagonals.items()},
        relative=1e-13,
    )


def second_derivatives(model, value):
    """∂²value/∂W_j² entry by entry, for a loss that the oracle has no name for."""
    found = {}
    for name, parameter in model.named_parameters():
        (first,) = torch.autograd.grad(value, parameter, create_graph=True)
        rows = [
            torch.autograd.grad(g, parameter, retain_graph=True)[0].flatten()[j] for j, g in enumerate(first.flatten())
        ]
        found[name] = torch.stack(rows).view_as(parameter)
    return found


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.3), torch.tensor([0, 5, 2])),
        (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), torch.tensor([0, 5, 2])),
        (nn.CrossEntropyLoss(), torch.softmax(torch.linspace(-1, 2, 18, dtype=torch.float64).view(3, 6), 1)),
        (nn.BCEWithLogitsLoss(weight=torch.linspace(0, 3, 6, dtype=torch.float64)), torch.full((3, 6), 0.3).double()),
        (nn.BCEWithLogitsLoss(reduction="sum"), torch.full((3, 6), 0.3).double()),
        (nn.MSELoss(reduction="sum"), torch.full((3, 6), 0.3).double()),
    ],
    ids=["smoothing", "smoothing summed", "probabilities", "bce weight", "bce summed", "mse summed"],
)
def test_second_derivatives_of_torchs_own_loss_agree(loss, targets):
    model, x = small_mlp(), torch.randn(3, 5)
    expected = second_derivatives(model, loss(model(x), targets))
    assert_close(hessian_diagonal(model, x, loss=loss), expected, relative=1e-10)
    assert_same(hessian_trace(model, x, loss=loss), {name: float(d.sum()) for name, d in expected.items()})


def test_several_batches_are_one_big_batch():
    model, x = small_mlp(), torch.randn(7, 5)
    whole = hessian_diagonal(model, x)
    for data in ([x[:2], x[2:3], x[3:]], DataLoader(TensorDataset(x, torch.zeros(7)), batch_size=3), iter(x.split(5))):
        diagonals = hessian_diagonal(model, data)
        assert diagonals.samples == 7
        assert_close(diagonals, dict(whole), relative=1e-13)


def test_unused_parameters_have_a_zero_diagonal_and_nothing_is_disturbed():
    model, x = small_mlp(), torch.randn(4, 5)
    model.register_parameter("idle", nn.Parameter(torch.randn(3, 2)))
    model.register_parameter("empty", nn.Parameter(torch.randn(0, 2)))
    before = snapshot(model)
    diagonals = hessian_diagonal(model, x)
    assert_undisturbed(model, before)
    assert torch.equal(diagonals["idle"], torch.zeros(3, 2)) and diagonals["empty"].shape == (0, 2)
    assert not any(value.requires_grad for value in diagonals.values())


def test_low_precision_weights_give_float32_diagonals():
    # Without kinks, where rounding would switch a unit on or off.
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6)), torch.randn(8, 5)
    expected = hessian_diagonal(model, x)
    for dtype, relative in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.005)):
        found = hessian_diagonal(copy.deepcopy(model).to(dtype), x.to(dtype))
        assert all(value.dtype == torch.float32 for value in found.values())
        assert_close({n: v.double() for n, v in found.items()}, dict(expected), relative=relative)


def test_a_diagonal_that_overflows_is_refused():
    model = small_mlp().float()
    with torch.no_grad():
        model[0].weight.mul_(1e-30)
        model[0].bias.zero_()
        model[2].weight.mul_(1e30)
    with pytest.raises(CurvatureError, match=r"0\.weight.* is not finite.*float64"):
        hessian_diagonal(model, torch.randn(4, 5).float())


def test_wrong_options_are_refused():
    model, x = small_mlp(), torch.randn(4, 5)
    for options in ({"columns": -1}, {"columns": 1.5}, {"probes": 0}, {"tolerance": -1.0}, {"max_memory": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            hessian_diagonal(model, x, **options)
    with pytest.raises(UnsupportedError, match="weight"):
        hessian_diagonal(model, x, loss=nn.CrossEntropyLoss(weight=torch.ones(6)))


def test_diagonals_print_as_a_table():
    model, x = small_mlp(), torch.randn(4, 5)
    diagonals = hessian_diagonal(model, x)
    text = str(diagonals)
    assert "0.weight" in text and "[7, 5]" in text and "hessian" in text and "generic path" not in text
    assert len(diagonals) == 4 and list(diagonals) == [name for name, _ in model.named_parameters()]


@pytest.mark.cuda
def test_the_device_does_not_matter():
    model, x = small_mlp(), torch.randn(4, 5)
    expected = hessian_diagonal(model, x)
    found = hessian_diagonal(model.cuda(), x)
    assert all(value.is_cuda for value in found.values())
    assert_close({name: value.cpu() for name, value in found.items()}, dict(expected))
