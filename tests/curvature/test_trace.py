"""Traces equal what brute force says of random networks, estimates are unbiased, batches add up."""

import itertools
import math

import pytest
import torch
from curvature.agreement import assert_same, assume_unsaturated
from curvature.random_networks import FAMILIES, mlps, settled, small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import ZOO

from ms_optim.curvature import budget, hessian_trace, scheme
from ms_optim.curvature.rules import contraction as contractions
from ms_optim.reference import curvature as oracle


def labels_for(model, inputs):
    return torch.randint(0, oracle.logits_of(model, inputs).shape[1], (len(inputs),))


@pytest.mark.parametrize("family", FAMILIES)
@given(st.data())
def test_trace_equals_brute_force(family, data):
    model, x = data.draw(FAMILIES[family]())
    assume_unsaturated(model, x)
    traces = hessian_trace(model, x)
    assert list(traces) == [name for name, _ in model.named_parameters()]
    assert_same(traces, oracle.gauss_newton_traces(model, x))
    exact = [name for name in traces if traces.kind[name] == "hessian"]
    assert_same(traces, oracle.hessian_traces(model, x, labels_for(model, x)), exact)
    assert traces.samples == len(x)


@pytest.mark.parametrize("network", ZOO, ids=str)
def test_trace_equals_brute_force_on_the_zoo(network):
    model, x = settled(network.build()), network.inputs(2)
    traces = hessian_trace(model, x)
    assert_same(traces, oracle.gauss_newton_traces(model, x))
    exact = [name for name in traces if traces.kind[name] == "hessian"]
    assert_same(traces, oracle.hessian_traces(model, x, torch.tensor([0, 2])), exact)


@given(mlps())
def test_the_algorithm_of_the_paper_gives_the_same_traces(drawn):
    model, x = drawn
    assume_unsaturated(model, x)
    assert_same(hessian_trace(model, x), oracle.paper_traces(model, x))


@given(mlps())
def test_labels_do_not_enter(drawn):
    model, x = drawn
    assume_unsaturated(model, x)
    traces = hessian_trace(model, x)
    exact = [name for name in traces if traces.kind[name] == "hessian"]
    labels = labels_for(model, x)
    other = (labels + 1) % oracle.logits_of(model, x).shape[1]
    assert_same(oracle.hessian_traces(model, x, labels), oracle.hessian_traces(model, x, other), exact)


def test_a_weight_before_a_layer_norm_has_another_hessian_than_gauss_newton_block():
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 3)))
    x = torch.randn(4, 3)
    traces, hessian = hessian_trace(model, x), oracle.hessian_traces(model, x, torch.tensor([0, 1, 2, 0]))
    assert traces.kind["0.weight"] == "gauss-newton"
    assert abs(traces["0.weight"] - hessian["0.weight"]) > 0.01 * abs(hessian["0.weight"])


def test_gram_route_chunks_and_groups_of_columns_change_nothing(monkeypatch):
    # One sample at a time, columns one by one or all at once, S made column by column: the paths of large networks.
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=4), nn.Flatten(), nn.Linear(3, 4)
    )
    x = torch.randn(3, 2, 6, 6)
    expected = oracle.gauss_newton_traces(model, x)
    assert_same(hessian_trace(model, x), expected)
    monkeypatch.setattr(contractions, "_CHUNK_BYTES", 1)
    assert_same(hessian_trace(model, x), expected)
    monkeypatch.setattr(scheme, "_COLUMN_BYTES", 1)
    for together in (0, 2**30):
        monkeypatch.setattr(budget, "_TOGETHER_BYTES", {"cpu": together})
        assert_same(hessian_trace(model, x), expected)


def test_timm_resnet18_with_its_inplace_operations_is_measured_and_left_alone():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=10).double()
    for module in model.modules():  # timm starts the last scale of each block at 0, which would hide the block
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(2, 3, 64, 64)
    before = snapshot(model)
    traces = hessian_trace(model, x)
    assert_undisturbed(model, before)
    assert set(traces.kind.values()) == {"hessian"}
    assert_same(traces, oracle.paper_traces(model.eval(), x))


def test_several_batches_are_one_big_batch():
    model, x = small_mlp(), torch.randn(7, 5)
    whole = hessian_trace(model, x)
    for data in (
        [x[:2], x[2:3], x[3:]],
        [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(5))],
        (part for part in x.split(3)),
        DataLoader(TensorDataset(x, torch.zeros(7)), batch_size=3),
        DataLoader(TensorDataset(x), batch_size=1),
    ):
        traces = hessian_trace(model, data)
        assert traces.samples == 7
        assert_same(traces, whole, relative=1e-13)


def test_repeating_the_samples_leaves_the_mean():
    model, x = small_mlp(), torch.randn(3, 5)
    twice = hessian_trace(model, [x, x, torch.cat([x, x])])
    assert twice.samples == 12
    assert_same(twice, hessian_trace(model, x), relative=1e-13)


class Named(nn.Module):
    """A model with keyword inputs and an output object, as the transformers library has them."""

    def __init__(self):
        super().__init__()
        self.body = small_mlp()

    def forward(self, pixels, scale=None):
        class Output:
            logits = self.body(pixels if scale is None else pixels * scale)

        return Output()


def test_dictionary_inputs_and_outputs_with_logits_are_read():
    model, x, scale = Named(), torch.randn(4, 5), torch.rand(4, 1)
    traces = hessian_trace(model, [{"pixels": x, "scale": scale}])
    expected = hessian_trace(model.body, x * scale)
    assert dict(traces) == {f"body.{name}": value for name, value in expected.items()}


@given(st.integers(0, 2**16), st.floats(-3.0, 3.0))
@settings(max_examples=10)
def test_traces_scale_inversely_to_squared_weights(seed, a):
    torch.manual_seed(seed)
    model, x = small_mlp(), torch.randn(4, 5)
    before = hessian_trace(model, x)
    with torch.no_grad():
        for name, sign in (("0.weight", 1), ("0.bias", 1), ("2.weight", -1)):
            model.get_parameter(name).mul_(math.exp(sign * a))
    factors = {"0.weight": -2 * a, "0.bias": -2 * a, "2.weight": 2 * a, "2.bias": 0.0}
    expected = {name: value * math.exp(factors[name]) for name, value in before.items()}
    assert_same(hessian_trace(model, x), expected, relative=1e-11)


def test_frozen_parameters_are_left_out_and_unused_ones_have_trace_zero():
    model, x = small_mlp(), torch.randn(4, 5)
    model.register_parameter("idle", nn.Parameter(torch.randn(3)))
    everything = hessian_trace(model, x)
    assert everything["idle"] == 0.0
    model[0].weight.requires_grad_(False)
    rest = hessian_trace(model, x)
    assert dict(rest) == {name: value for name, value in everything.items() if name != "0.weight"}


def test_float32_agrees_with_float64():
    model, x = small_mlp(), torch.randn(4, 5)
    expected = hessian_trace(model, x)
    assert_same(hessian_trace(model.float(), x.float()), expected, relative=1e-5)


def test_half_precision_weights_give_finite_traces():
    model, x = small_mlp(), torch.randn(4, 5)
    expected = hessian_trace(model, x)
    assert_same(hessian_trace(model.bfloat16(), x.bfloat16()), expected, relative=0.1)


@pytest.mark.cuda
def test_the_device_does_not_matter():
    model, x = small_mlp(), torch.randn(4, 5)
    expected = hessian_trace(model, x)
    assert_same(hessian_trace(model.cuda(), x), expected, relative=1e-10)


@pytest.mark.parametrize("columns", [4, 5, 100])
def test_from_two_fewer_columns_than_classes_on_nothing_is_sampled(columns):
    model, x = small_mlp(classes=6), torch.randn(4, 5)
    assert dict(hessian_trace(model, x, columns=columns)) == dict(hessian_trace(model, x))


def test_sampled_traces_are_unbiased_and_their_error_falls_with_the_columns():
    model, x = small_mlp(classes=6), torch.randn(6, 5)
    exact = hessian_trace(model, x)
    errors = []
    for columns in range(4):
        draws = torch.tensor(
            [
                list(hessian_trace(model, x, columns, generator=torch.Generator().manual_seed(seed)).values())
                for seed in range(150)
            ]
        )
        standard_error = draws.std(0) / math.sqrt(len(draws))
        assert bool(((draws.mean(0) - torch.tensor(list(exact.values()))).abs() <= 5 * standard_error).all())
        errors.append(draws.std(0).square().sum())
    assert all(fewer > more for fewer, more in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 4


def test_a_sampled_trace_is_reproducible_and_follows_its_generator():
    model, x = small_mlp(), torch.randn(4, 5)

    def draw(seed):
        return dict(hessian_trace(model, x, 1, generator=torch.Generator().manual_seed(seed)))

    state = torch.get_rng_state()
    assert dict(hessian_trace(model, x, 1)) == dict(hessian_trace(model, x, 1))
    assert draw(3) == draw(3) != draw(4)
    assert torch.equal(state, torch.get_rng_state())


def test_traces_print_as_a_table_and_add_up():
    model, x = small_mlp(), torch.randn(4, 5)
    traces = hessian_trace(model, x, columns=2)
    assert traces.total == pytest.approx(sum(traces.values()), rel=1e-15)
    assert "0.weight" in str(traces) and "4 samples, 3 columns per sample, some of them signed" in str(traces)
    assert "±" not in str(traces) and "±" in str(hessian_trace(model, x, columns=2, probes=2))
    assert "4 samples, exact" in str(hessian_trace(model, x))
    assert len(traces) == 4 and traces.columns == 2
