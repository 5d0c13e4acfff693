"""Single units: training does not depend on how the network's hidden units happen to be scaled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ms_optim
from ms_optim.errors import UnsupportedError


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))


def small_lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4)),
    )


def with_batch_norm():
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))


def batches_for(model, count=10):
    stream = torch.Generator().manual_seed(1)
    shape = (1, 10, 10) if isinstance(model[0], nn.Conv2d) else (6,)
    return [
        (torch.randn(12, *shape, generator=stream), torch.randint(0, 4, (12,), generator=stream)) for _ in range(count)
    ]


def step(model, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)


def divergence(model, build, count=10):
    """Largest difference of logits, relative to their size, between training from W and from an equivalent W'."""
    batches, other = batches_for(model, count), copy.deepcopy(model)
    group = ms_optim.neuron_symmetries(other, batches[0][0])
    t = group.bound(other, group.random(1.0, torch.Generator().manual_seed(2)))
    group.rescale_(other, t)
    runs = [(net, build(net)) for net in (model, other)]
    worst = 0.0
    for batch in batches:
        logits = []
        for net, optimizer in runs:
            step(net, optimizer, batch)
            logits.append(net(batches[0][0]).detach())
        worst = max(worst, float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()))
    return worst


def mssam(granularity, **options):
    return lambda net: ms_optim.MSSAM(
        net, rho=0.1, lr=0.05, momentum=0.9, weight_decay=1e-3, refresh_every=4, granularity=granularity,
        **{"columns": None, **options},
    )  # fmt: skip


def mssgd(granularity, **options):
    return lambda net: ms_optim.MSRegularizedSGD(
        net, lr=0.05, momentum=0.9, strength=0.01, refresh_every=4, granularity=granularity, columns=None, **options
    )


@pytest.mark.parametrize("network", [mlp, small_lenet], ids=["mlp", "lenet"])
@pytest.mark.parametrize("build", [mssam("neuron"), mssgd("neuron")], ids=["MSSAM", "MSRegularizedSGD"])
def test_the_trajectory_is_the_same_from_every_rescaling_of_units(network, build):
    assert divergence(network(), build) < 1e-9


@pytest.mark.parametrize("build", [mssam("layer"), mssgd("layer")], ids=["MSSAM", "MSRegularizedSGD"])
def test_layers_alone_do_not_make_it_the_same(build):
    assert divergence(mlp(), build) > 1e-2


def test_with_batch_norm_and_sampled_columns_it_is_the_same():
    assert divergence(with_batch_norm(), mssam("neuron")) < 1e-8
    assert divergence(mlp(), mssam("neuron", columns=2)) < 1e-9
    assert divergence(mlp(), mssam("neuron", gauge=1.0)) < 1e-9


@pytest.mark.parametrize("gradient", ["noise", "antithetic"])
def test_noise_of_units_at_the_representative(gradient):
    assert divergence(mlp(), mssgd("neuron", gradient=gradient), count=5) < 1e-9


@pytest.mark.parametrize("build", [mssam("neuron"), mssgd("neuron")], ids=["MSSAM", "MSRegularizedSGD"])
def test_a_checkpoint_resumes_bit_by_bit(build, tmp_path):
    model = with_batch_norm()
    batches, optimizer = batches_for(model), build(model)
    for batch in batches[:6]:
        step(model, optimizer, batch)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = with_batch_norm()
    resumed.load_state_dict(kept["model"])
    other = build(resumed)
    other.load_state_dict(kept["optimizer"])
    assert other.balance.minimum_sharpness == optimizer.balance.minimum_sharpness
    for batch in batches[6:]:
        step(model, optimizer, batch)
        step(resumed, other, batch)
    for p, q in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_of_layers_begins_with_a_refresh():
    model = mlp()
    optimizer = mssam("layer")(model)
    step(model, optimizer, batches_for(model)[0])
    other = mssam("neuron")(model)
    other.load_state_dict(optimizer.state_dict())
    assert other.balance is None and other.representative.due == 0


def test_an_exception_puts_the_units_back():
    model = mlp()
    optimizer, batches = mssam("neuron")(model), batches_for(model)
    for batch in batches[:4]:
        step(model, optimizer, batch)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    moved = []
    optimizer.register_rescale_hook(lambda group, t: moved.append((group, t)))

    def closure():
        optimizer.zero_grad()
        F.cross_entropy(model(batches[4][0]), batches[4][1]).backward()
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        optimizer.step(closure)
    assert len(moved) == 2 and isinstance(moved[0][0], ms_optim.NeuronGroup)
    torch.testing.assert_close(moved[0][1], -moved[1][1], rtol=0, atol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    for i, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before[1][i]["momentum_buffer"])


def test_frozen_parameters_stay():
    model = mlp()
    model[0].requires_grad_(False)
    kept = model[0].weight.clone()
    optimizer = mssam("neuron")(model)
    for batch in batches_for(model)[:2]:
        step(model, optimizer, batch)
    assert torch.equal(model[0].weight, kept)
    assert optimizer.group.units == 7


def test_the_weights_are_balanced_after_a_refresh():
    model = mlp()
    x = batches_for(model)[0][0]
    optimizer = mssam("neuron")(model)
    found = optimizer.refresh(x)
    assert found.trace == pytest.approx(float(ms_optim.minimum_sharpness(model, x, granularity="neuron")), rel=1e-10)
    there = ms_optim.balance_neurons(model, ms_optim.hessian_diagonal(model, x), optimizer.group)
    assert float(there.t.abs().max()) < 1e-9


def test_what_is_not_defined_for_units_is_refused():
    model = mlp()
    with pytest.raises(UnsupportedError, match="rebalance='metric' at granularity='neuron'.*use rebalance='move'"):
        ms_optim.MSSAM(model, granularity="neuron", rebalance="metric", lr=0.1)
    with pytest.raises(ValueError, match="gauge must be 0 or 1 at granularity='neuron', got 0.5"):
        ms_optim.MSSAM(model, granularity="neuron", gauge=0.5, lr=0.1)
    with pytest.raises(ValueError, match="granularity must be 'layer' or 'neuron', got 'unit'"):
        ms_optim.MSSAM(model, granularity="unit", lr=0.1)
    group = ms_optim.scale_symmetries(model, torch.randn(2, 6))
    with pytest.raises(ValueError, match="takes a NeuronGroup, and the group is a ScaleGroup"):
        ms_optim.MSRegularizedSGD(model, granularity="neuron", group=group)
