"""Inside, the evaluation network; outside, nothing happened."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature.evaluation import evaluation


def network():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Dropout(), nn.Flatten(), nn.BatchNorm1d(9, affine=False)
    )
    model(torch.randn(5, 2, 4))  # running statistics of their own
    return model


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_modules_are_in_evaluation_mode_inside_and_as_before_outside(statistics):
    model = network()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluation(model, statistics):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_running_statistics_give_the_output_of_evaluation_mode():
    model, x = network(), torch.randn(5, 2, 4)
    expected = copy.deepcopy(model).eval()(x)
    with evaluation(model):
        assert torch.equal(model(x), expected)


def test_batch_statistics_give_the_output_of_training_mode_without_dropout():
    model, x = network(), torch.randn(5, 2, 4)
    twin = copy.deepcopy(model)
    twin[2].eval()
    with evaluation(model, "batch"):
        torch.testing.assert_close(model(x), twin.train(True)[3:](twin[:2](x)), rtol=1e-12, atol=1e-12)


def test_batch_statistics_are_constants():
    model, x = network(), torch.randn(5, 2, 4, requires_grad=True)
    with evaluation(model, "batch"):
        output = model(x)
    # With the statistics constant, sample 0's output reaches sample 0's input only.
    (gradient,) = torch.autograd.grad(output[0].square().sum(), x)
    assert float(gradient[1:].abs().max()) == 0.0 < float(gradient[0].abs().max())


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("broken", [False, True])
def test_buffers_hooks_and_random_streams_are_as_before(statistics, broken):
    model, x = network(), torch.randn(5, 2, 4)
    before, state = buffers(model), torch.get_rng_state()
    identities = {name: id(buffer) for name, buffer in model.named_buffers()}
    try:
        with evaluation(model, statistics):
            model(x)
            torch.rand(7)
            if broken:
                raise KeyError("inside")
    except KeyError:
        assert broken
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == identities
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_a_batch_norm_without_running_statistics_gets_the_batch_as_constants(statistics):
    model, x = nn.BatchNorm1d(3, track_running_stats=False), torch.randn(5, 3)
    with evaluation(model, statistics):
        output = model(x)
        assert not output.grad_fn._saved_training
    torch.testing.assert_close(output, F.batch_norm(x, None, None, model.weight, model.bias, training=True))
    assert model.running_mean is None and model.running_var is None


def test_a_batch_norm_used_twice_has_the_statistics_of_each_use():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    with evaluation(norm, "batch"):
        first, second = norm(x), norm(3 * x + 1)
    torch.testing.assert_close(first, second, rtol=0.0, atol=1e-4)  # equal up to ε


def test_evaluations_nest():
    model, x = network(), torch.randn(5, 2, 4)
    before = buffers(model)
    with evaluation(model, "batch"):
        outer = model(x)
        with evaluation(model, "running"):
            assert not any(module.training for module in model.modules())
            model(x)
        assert torch.equal(model(x), outer)
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_gradients_are_on_and_autocast_is_off_inside():
    model, x = network(), torch.randn(5, 2, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), evaluation(model.float()):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert model(x.float()).dtype == torch.float32


def test_another_word_for_the_statistics_is_refused_before_anything_is_touched():
    model = network()
    with (
        pytest.raises(ValueError, match="statistics must be 'running', 'batch' or 'training', got 'own'"),
        evaluation(model, "own"),
    ):
        pass
    assert model.training


def test_training_statistics_are_those_of_each_modules_own_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5))
    for norm in (model[1], model[4]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(16, 4)
    model.train()
    model[1].eval()
    with evaluation(model, "training"):
        mixed = model(x)
    with torch.no_grad():
        reference = copy.deepcopy(model)(x)
    torch.testing.assert_close(mixed, reference)
    with evaluation(model, "batch"):
        assert not torch.allclose(model(x), reference)
    with evaluation(model, "running"):
        assert not torch.allclose(model(x), reference)


def pieces_of(model, x, statistics, sizes):
    """The outputs of parts of a batch with the statistics of the whole."""
    with evaluation(model, statistics) as taken, torch.no_grad():
        with taken.recording():
            whole = model(x)
        found = []
        for part in x.split(sizes):
            taken.rewind()
            found.append(model(part))
        taken.forget()
        live = model(x[:3])
    return taken.of_batch, whole, torch.cat(found), live


@pytest.mark.parametrize("statistics", ["running", "batch", "training"])
@pytest.mark.parametrize("sizes", [1, 2, 5])
def test_parts_of_a_batch_replay_the_statistics_of_the_whole(statistics, sizes):
    model, x = network(), 1 + torch.randn(5, 2, 4)
    before = buffers(model)
    of_batch, whole, found, live = pieces_of(model, x, statistics, sizes)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    assert of_batch == (statistics != "running")
    # Once forgotten, a batch has its own statistics again.
    assert torch.allclose(live, whole[:3]) == (statistics == "running")
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_each_use_of_a_batch_norm_replays_its_own_statistics():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.norm(x).square() + 3.0 * x)

    model, x = Twice(), torch.randn(6, 3)
    _, whole, found, _ = pieces_of(model, x, "batch", 2)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    with evaluation(model, "batch"):
        assert torch.equal(model(x), whole)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.005), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("affine", [True, False])
def test_low_precision_statistics_are_summed_in_single_precision(dtype, tolerance, affine):
    model, x = nn.BatchNorm1d(3, affine=affine).to(dtype), (200 * torch.randn(4096, 3)).to(dtype)  # Σ x² overflows
    with evaluation(model, "batch"), torch.no_grad():
        found = model(x)
    assert found.dtype == dtype
    expected = F.batch_norm(x.double(), None, None, training=True)
    assert float((found.double() - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_a_variance_that_overflows_is_not_silent():
    model, x = nn.BatchNorm1d(3).half(), (300 * torch.randn(64, 3)).half()
    with evaluation(model, "batch"), torch.no_grad():
        assert bool(model(x).isnan().all())


def test_a_failure_while_recording_leaves_nothing():
    model, x = network(), torch.randn(5, 2, 4)
    before = buffers(model)
    with pytest.raises(KeyError), evaluation(model, "batch") as taken, taken.recording():
        model(x)
        raise KeyError("inside")
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_pre_hooks for module in model.modules())
