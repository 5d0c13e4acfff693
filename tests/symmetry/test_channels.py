"""Units: every hidden unit of a network moves on its own, the function stays, and nothing that is opaque moves."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import ZOO, Residual, images, mlp

from ms_optim import models
from ms_optim.errors import NoEffectWarning, SymmetryError, UnsupportedError
from ms_optim.symmetry import NeuronGroup, neuron_symmetries, scale_symmetries

# Worked out by hand: hidden channels, plus, for each normaliser, the channels (or groups) in front of it.
UNITS = {
    "chain without biases": 7 + 6,
    "mlp with biases": 7 + 6,
    "leaky relu": 7 + 6,
    "prelu": 7 + 6,
    "rrelu": 7 + 6,
    "relu6 after the second layer": 7,
    "gelu": 0,
    "lenet": 4 + 5 + 6,
    "depthwise": 6 + 6,
    "residual": 4 + 4 + 5 + 5 + 4,  # conv, stream, conv1, norm1, conv2
    "residual with projection": 4 + 4 + 5 + 5 + 6 + 6 + 6,
    "residual in place": 4 + 4 + 5 + 5 + 4,
    "batch norm of a vector": 7 + 7,
    "group norm": 2 + 6,
    "layer norm": 1 + 7,
    "rms norm": 1 + 7,
    "functional": 7,
    "concat": 4 + 3,
    "gate": 6 + 6,
    "maxout": 6,  # pairs of pieces
    "attention": 6 + 6 + 7,  # q against k, v, out
    "tied": 1,
    "used twice": 6,
    "unused parameter": 7 + 6,
    "frozen": 6,
    "dropout": 7 + 6,
    "auxiliary head": 6 + 6,
    "dictionary": 5 + 6,
}


def dense(group: NeuronGroup) -> torch.Tensor:
    """Every entry's log-scale as a row: ``[entries, U]``."""
    rows = []
    for name, shape in zip(group.parameters, group.shapes, strict=True):
        whole = np.zeros((math.prod(shape), group.units))
        for factor in group.factors[name]:
            index = np.arange(math.prod(factor.shape)).reshape(factor.shape)
            whole += factor.matrix.toarray()[np.broadcast_to(index, shape).reshape(-1)]
        rows.append(whole)
    return torch.from_numpy(np.concatenate(rows))


@pytest.mark.parametrize("network", ZOO, ids=str)
@pytest.mark.filterwarnings("ignore::ms_optim.errors.NoEffectWarning")
def test_units_are_found_keep_the_function_and_contain_the_layers(network):
    model, inputs = network.build(), network.inputs(4)
    group = neuron_symmetries(model, inputs)
    assert group.units == UNITS[network.name]
    check = group.check(model, inputs)
    assert network.exact == (check.tolerance < 1e-9)
    # Independent, and every layer-wise generator among them.
    rows = dense(group)
    sizes = torch.tensor([math.prod(shape) for shape in group.shapes])
    layers = network.declared(group.parameters).repeat_interleave(sizes, dim=1).T
    assert int(torch.linalg.matrix_rank(rows)) == group.units if group.units else not network.generators
    together = torch.cat([rows, layers], dim=1)
    assert together.numel() == 0 or int(torch.linalg.matrix_rank(together)) == group.units


@pytest.mark.parametrize(
    ("build", "shape", "units"),
    [
        # The ResNet's stem, three in its first block, three in its second, and the stream, whose padding is zeros.
        (models.lenet, (1, 28, 28), 6 + 16 + 120 + 84),
        (models.small_resnet, (1, 8, 8), 16 + 3 * 16 + 3 * 32 + 16 + 16),
    ],
)
def test_networks_of_the_papers(build, shape, units):
    model, inputs = build(), torch.randn(2, *shape)
    group = neuron_symmetries(model, inputs)
    assert group.units == units
    assert group.check(model, inputs).eval_error < 1e-12


class FusedBlock(nn.Module):
    """One transformer block with a fused projection, a ReLU network and no normaliser; attention by hand or fused."""

    def __init__(self, fused_kernel: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 6), nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.fused_kernel = fused_kernel

    def forward(self, x):
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_kernel:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * 3**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(n, t, 6))
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x.mean(1))


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_slices_of_a_fused_projection_move_on_their_own(fused_kernel):
    model, inputs = FusedBlock(fused_kernel), torch.randn(2, 4, 5)
    group = neuron_symmetries(model, inputs)
    # The stream, q against k (6 pairs), v against the output projection, the hidden units.
    assert group.units == 6 + 6 + 6 + 10
    group.check(model, inputs)
    assert len(scale_symmetries(model, inputs)) == 2  # the layers see the fused weight as one: q fixes v
    a = group.log_scale(group.random())
    q, k, v = a["qkv.bias"].chunk(3)
    torch.testing.assert_close(q, -k)
    torch.testing.assert_close(a["out.weight"], a["out.bias"][:, None] - v[None], rtol=0, atol=1e-14)
    assert float((v - q).abs().min()) > 0


class Shuffles(nn.Module):
    """Channels are moved about: grouped convolutions, a channel shuffle, a split, a pad by zeros, a strided slice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.first(x))))
        x = x.reshape(len(x), 2, 4, 8, 8).transpose(1, 2).reshape(len(x), 8, 8, 8)
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, F.relu(self.depthwise(changed))], 1)[:, :, ::3, ::3]
        x = F.relu(self.up(x)) + F.pad(x[:, :3], (0, 3, 0, 3, 0, 1))
        return self.head(x.flatten(1))


def test_labels_follow_the_entries_wherever_they_go():
    model, inputs = Shuffles(), images(2)
    group = neuron_symmetries(model, inputs)
    group.check(model, inputs)
    # first, grouped, depthwise; the four of `up`, of which three are equal to the channels they are added to.
    assert group.units == 8 + 8 + 4 + 1


def test_what_is_not_understood_is_fixed_and_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.third(F.relu(self.second(x.cumsum(1).sort(1).values)).sigmoid())

    model = Odd()
    group = neuron_symmetries(model, torch.randn(4, 5))
    # Sorting mixes channels, so they share one scale; the sigmoid fixes the second layer's.
    assert group.units == 1
    assert [(o.operation, o.where) for o in group.opaque] == [("aten.sigmoid.default", "")]
    group.check(model, torch.randn(4, 5))


class Einsum(nn.Module):
    """Attention of two heads, written as sums over indices."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 4)) for layer in (self.q, self.k, self.v))
        attention = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(-1)
        return self.out(torch.einsum("nhqk,nkhd->nqhd", attention, v).flatten(2).mean(1))


class TiedEmbedding(nn.Module):
    """One table at both ends: rows minus columns on one side, entries on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place, self.mix = nn.Embedding(7, 5), nn.Parameter(torch.randn(1, 4, 5)), nn.Linear(5, 5)

    def forward(self, x):
        return F.relu(self.mix(self.table(x) + self.place)).sum(1) @ self.table.weight.t()


class Squeeze(nn.Module):
    """Channels times gates between 0 and 1, which must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(2, 4, 3), nn.Linear(4, 2), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.conv(x))
        gates = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.head((x * gates[:, :, None, None]).amax((2, 3)))


class WeightNorm(nn.Module):
    """A weight that is computed from others, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
        self.second, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class Positions(nn.Module):
    """A network over positions between two over channels, as in a mixer: the middle one makes channels equal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(5, 6), nn.Linear(4, 9), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.embed(x)).transpose(1, 2)
        return self.head(F.relu(self.mix(x)).transpose(1, 2).mean(1))


@pytest.mark.parametrize(
    ("build", "inputs", "units"),
    [
        (Einsum, lambda: torch.randn(3, 4, 5), 8 + 8),  # q against k, v
        (TiedEmbedding, lambda: torch.randint(0, 7, (3, 4)), 5),
        (Squeeze, lambda: images(3), 4 + 2),
        (WeightNorm, lambda: torch.randn(3, 5), 1 + 1 + 4),  # v, g, the second layer
        (Positions, lambda: torch.randn(3, 4, 5), 1 + 1),  # all channels, all mixed positions
    ],
)
def test_what_is_used_in_other_ways_keeps_its_function(build, inputs, units):
    model, x = build(), inputs()
    group = neuron_symmetries(model, x)
    for seed in range(3):
        assert group.check(model, x, generator=torch.Generator().manual_seed(seed)).eval_error < 1e-12
    assert group.units == units


@st.composite
def random_networks(draw):
    sizes = draw(st.lists(st.integers(2, 6), min_size=3, max_size=5))
    layers = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        layers.append(nn.Linear(i, o, bias=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm1d(o))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.1), nn.Dropout(0.3)])))
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3)), sizes[0]


@settings(max_examples=6)
@given(random_networks(), st.integers(0, 1000))
def test_random_networks_keep_their_function(drawn, seed):
    torch.manual_seed(seed)
    model, size = drawn
    group = neuron_symmetries(model, torch.randn(4, size))
    hidden = sum(layer.out_features for layer in model[:-1] if isinstance(layer, nn.Linear))
    normalised = sum(layer.num_features for layer in model if isinstance(layer, nn.BatchNorm1d))
    assert group.units == hidden + normalised
    assert group.check(model, torch.randn(4, size)).eval_error < 1e-12


def test_statistics_move_channel_by_channel_and_are_bounded():
    model, inputs = Residual().eval(), images(4)
    group = neuron_symmetries(model, inputs)
    before = model(inputs)
    t = group.random(1.0)
    group.rescale_(model, group.bound(model, t))
    torch.testing.assert_close(model(inputs), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.norm.running_var[1] = 1e-6
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(SymmetryError, match=r"channel 1 of buffer norm.running_var would become -.*group.bound"):
        group.rescale_(model, -torch.ones(group.units))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    before = model(inputs)
    bounded = group.bound(model, -torch.ones(group.units))
    assert int((bounded != -1).sum()) == 1
    group.rescale_(model, bounded)
    assert float(model.norm.running_var[1]) == pytest.approx(0.0, abs=1e-16)
    torch.testing.assert_close(model(inputs), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_gradients_and_state_move_entry_by_entry(kind):
    model, x = mlp(nn.ReLU), torch.randn(4, 5)
    group = neuron_symmetries(model, x)
    optimizer = kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    t = group.random(0.7)
    a, before = group.log_scale(t), copy.deepcopy(optimizer.state_dict()["state"])
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    group.rescale_(model, t, optimizer)
    moved = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    exponents = {"momentum_buffer": -1, "exp_avg": -1, "exp_avg_sq": -2, "step": 0}
    for i, (name, p) in enumerate(model.named_parameters()):
        torch.testing.assert_close(moved[name], grads[name] * torch.exp(-a[name]), rtol=1e-13, atol=0)
        torch.testing.assert_close(p.grad, moved[name], rtol=1e-11, atol=1e-13)
        for key, value in optimizer.state_dict()["state"][i].items():
            factor = torch.exp(exponents[key] * a[name]) if exponents[key] else 1.0
            torch.testing.assert_close(value, before[i][key] * factor, rtol=1e-13, atol=0)


def test_everything_is_validated_before_anything_is_changed():
    model, x = mlp(nn.ReLU), torch.randn(4, 5)
    group = neuron_symmetries(model, x)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match="RMSprop keeps"):
        group.rescale_(model, group.random(), optimizer)
    with pytest.raises(SymmetryError, match=r"0.weight \(torch.float64\) would be scaled by e\^800"):
        group.rescale_(model, 800.0 * torch.ones(group.units))
    with pytest.raises(ValueError, match=r"t has shape \(1,\), but the group has 13 generators"):
        group.rescale_(model, [1.0])
    with pytest.raises(SymmetryError, match=r"lacks .*neuron_symmetries"):
        group.rescale_(Residual(), group.random())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_subgroup_that_fixes_parameters_moves_none_of_them():
    model, inputs = Residual(), images(2)
    group = neuron_symmetries(model, inputs)
    fixed = group.fixing(["head.weight", "conv2.weight"])
    # Without the stream's four channels, and conv2's rows only together with its columns: one number.
    assert fixed.units == 4 + 5 + 1 + 0
    a = fixed.log_scale(fixed.random())
    assert not bool(a["head.weight"].any()) and not bool(a["conv2.weight"].any())
    fixed.check(model, inputs)
    assert group.fixing(["head.bias"]) is group


def test_check_sees_a_group_that_is_not_the_models():
    model, x = mlp(nn.ReLU), torch.randn(4, 5)
    group = neuron_symmetries(model, x)
    wrong = NeuronGroup(**{**vars(group), "factors": {**group.factors, "2.weight": group.factors["2.weight"][:1]}})
    with pytest.raises(SymmetryError, match="changed the logits of Sequential"):
        wrong.check(model, x)


def test_a_network_without_units_is_warned_of():
    with pytest.warns(NoEffectWarning, match=r"no hidden unit .*aten.gelu.default"):
        neuron_symmetries(mlp(nn.GELU), torch.randn(4, 5))


def test_print_says_how_much_moves():
    assert repr(neuron_symmetries(mlp(nn.ReLU), torch.randn(4, 5))) == (
        "NeuronGroup(13 units, 5 of 6 parameters move, 0 opaque operations)"
    )
