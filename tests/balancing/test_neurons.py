"""Single units: the minimum is the oracle's, one number for all equivalent networks, and never above that of layers."""

import copy

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn
from zoo import Residual, images, lenet, mlp

import ms_optim
from ms_optim.balancing.osborne import Terms, minimise
from ms_optim.errors import BalanceError
from ms_optim.reference.neurons import reference_osborne, reference_unit_minimum, reference_units


def relu_network(widths, biases):
    layers = []
    for width, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(width, after, bias=biases), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def leaky_network(widths, biases):
    """Without dead units: every entry of the diagonal is positive."""
    return nn.Sequential(*(nn.LeakyReLU(0.2) if isinstance(m, nn.ReLU) else m for m in relu_network(widths, biases)))


def tables(model, diagonal):
    names = [name for name, _ in model.named_modules() if f"{name}.weight" in diagonal]
    return [(diagonal[f"{name}.weight"], diagonal.get(f"{name}.bias")) for name in names]


def random_chain(seed, widths, spread=3.0):
    """Terms of a fully connected network with entries e^{N(0, spread²)}, as the solver and as the oracle take them."""
    stream = torch.Generator().manual_seed(seed)
    layers = []
    for width, after in zip(widths, widths[1:], strict=False):
        entries = [torch.randn(*s, generator=stream, dtype=torch.float64) for s in ((after, width), (after,))]
        layers.append((torch.exp(spread * entries[0]), torch.exp(spread * entries[1])))
    offsets = np.cumsum([0, *widths[1:-1]])
    count = int(offsets[-1])
    nothing = scipy.sparse.csr_matrix((1, count))

    def units(layer, width, sign):
        if layer in (0, len(widths) - 1):
            return scipy.sparse.csr_matrix((width, count))
        places = (np.arange(width), offsets[layer - 1] + np.arange(width))
        return scipy.sparse.csr_matrix((np.full(width, sign), places), shape=(width, count))

    terms = []
    for i, (weight, bias) in enumerate(layers):
        rows, columns = units(i + 1, widths[i + 1], 1.0), units(i, widths[i], -1.0)
        terms += [Terms(rows, columns, weight.numpy()), Terms(rows, nothing, bias.numpy()[:, None])]
    return terms, count, layers


@pytest.mark.parametrize("seed", range(3))
def test_osborne_equals_newton_equals_the_oracles(seed):
    terms, count, layers = random_chain(seed, (3, 5, 4, 3))
    newton, residual = minimise(terms, count)
    assert residual < 1e-13
    sweeps, residual = minimise(terms, count, newton=False, tolerance=1e-12)
    assert residual < 1e-12
    np.testing.assert_allclose(sweeps, newton, rtol=0, atol=1e-9)
    one_by_one = torch.cat(reference_osborne(layers)).numpy()
    np.testing.assert_allclose(one_by_one, newton, rtol=0, atol=1e-10)
    _, minimum = reference_unit_minimum(layers)
    found = float(reference_units(list(torch.from_numpy(newton).split([5, 4])), layers))
    assert found == pytest.approx(minimum, rel=1e-10) and found <= minimum * (1 + 1e-14)


def test_a_network_that_is_scaled_by_hundreds_is_balanced_as_exactly():
    terms, count, _ = random_chain(0, (4, 6, 6, 5, 3))
    here, _ = minimise(terms, count)
    shift = np.random.default_rng(0).normal(0.0, 20.0, count)
    moved = [Terms(t.rows, t.columns, t.at(shift)) for t in terms]
    there, residual = minimise(moved, count)
    assert residual < 1e-12
    np.testing.assert_allclose(there + shift, here, rtol=0, atol=1e-10)


def test_products_of_units_have_coefficients_of_their_own():
    """Σ a e^{−2(2u − v)} + b e^{−2(v − u)} + c e^{−2(−u)}: u twice in one term."""
    sparse = scipy.sparse.csr_matrix
    nothing = sparse((1, 2))
    terms = [
        Terms(sparse([[2.0, -1.0]]), nothing, np.array([[3.0]])),
        Terms(sparse([[-1.0, 1.0]]), nothing, np.array([[5.0]])),
        Terms(sparse([[-1.0, 0.0]]), nothing, np.array([[0.7]])),
    ]
    for newton in (True, False):
        (u, v), _ = minimise(terms, 2, newton=newton)
        x, y, z = 3 * np.exp(-4 * u + 2 * v), 5 * np.exp(2 * u - 2 * v), 0.7 * np.exp(2 * u)
        np.testing.assert_allclose([2 * x, y], [y + z, x], rtol=1e-9)


@pytest.mark.parametrize("biases", [True, False])
def test_the_minimum_of_a_network_is_the_oracles(biases):
    model, x = leaky_network((5, 7, 6, 3), biases), torch.randn(32, 5)
    diagonal = ms_optim.hessian_diagonal(model, x)
    group = ms_optim.neuron_symmetries(model, x)
    found = ms_optim.balance_neurons(model, diagonal, group)
    _, minimum = reference_unit_minimum(tables(model, diagonal))
    assert found.minimum_sharpness == pytest.approx(minimum, rel=1e-10)
    assert found.reached == pytest.approx(minimum, rel=1e-10)
    assert found.residual < 1e-12 and not found.notes
    group.rescale_(model, found.t)
    there = sum(float(d.sum()) for d in ms_optim.hessian_diagonal(model, x).values())
    assert there == pytest.approx(minimum, rel=1e-10)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    widths=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    biases=st.booleans(),
    std=st.floats(0.1, 3.0),
    seed=st.integers(0, 2**16),
)
def test_equivalent_networks_get_one_value_and_one_representative(widths, biases, std, seed):
    """Also with units that are dead, as many are in such small networks."""
    torch.manual_seed(seed)
    model, x = relu_network((5, *widths, 3), biases), torch.randn(16, 5)
    group = ms_optim.neuron_symmetries(model, x)
    other = copy.deepcopy(model)
    group.rescale_(other, group.random(std))
    found = [ms_optim.balance_neurons(m, ms_optim.hessian_diagonal(m, x), group) for m in (model, other)]
    assert found[0].minimum_sharpness == pytest.approx(found[1].minimum_sharpness, rel=1e-10)
    assert torch.equal(found[0].dead, found[1].dead)
    layers = ms_optim.minimum_sharpness(model, x)
    assert found[0].minimum_sharpness <= layers * (1 + 1e-12)
    for m, balance in zip((model, other), found, strict=True):
        group.rescale_(m, balance.t)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("build", "inputs"), [(lenet, images), (lambda: Residual().eval(), images)])
def test_with_kernels_and_normalisers_the_value_is_one(build, inputs):
    model, x = build(), inputs(16)
    group = ms_optim.neuron_symmetries(model, x)
    here = ms_optim.minimum_sharpness(model, x, group=group, granularity="neuron")
    t = group.bound(model, group.random(0.7))
    before = model(x).detach()
    group.rescale_(model, t)
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-12)
    there = ms_optim.minimum_sharpness(model, x, group=group, granularity="neuron")
    assert there == pytest.approx(here, rel=1e-10)
    # The trace is none of the group's invariants, and the layers' minimum is invariant under layers only.
    assert abs(there.details["trace"] / here.details["trace"] - 1) > 1e-2
    assert there.details["residual"] < 1e-12


def test_the_layers_minimum_depends_on_the_scales_of_units():
    model, x = mlp(nn.LeakyReLU), torch.randn(32, 5)
    group = ms_optim.neuron_symmetries(model, x)
    values = [float(ms_optim.minimum_sharpness(model, x))]
    units = [float(ms_optim.minimum_sharpness(model, x, granularity="neuron"))]
    group.rescale_(model, group.random(1.0))
    values.append(float(ms_optim.minimum_sharpness(model, x)))
    units.append(float(ms_optim.minimum_sharpness(model, x, granularity="neuron")))
    assert abs(values[1] / values[0] - 1) > 0.05
    assert units[1] == pytest.approx(units[0], rel=1e-10) and units[0] < min(values)


def test_a_dead_unit_gets_balanced_norms_and_adds_nothing():
    model, x = mlp(nn.ReLU), torch.randn(32, 5)
    with torch.no_grad():
        model[0].bias[2] = -100.0
    group = ms_optim.neuron_symmetries(model, x)
    found = ms_optim.balance_neurons(model, ms_optim.hessian_diagonal(model, x), group)
    dead = [int(i) for i in found.dead.nonzero()]
    assert 2 in dead and "no curvature on one side" in found.notes[0]
    group.rescale_(model, found.t)
    incoming = float((model[0].weight[2].square().sum() + model[0].bias[2].square()).detach())
    assert incoming == pytest.approx(float(model[2].weight[:, 2].detach().square().sum()), rel=1e-10)


def test_units_in_front_of_a_normaliser_have_rows_of_norm_one():
    model, x = Residual().eval(), images(16)
    group = ms_optim.neuron_symmetries(model, x)
    found = ms_optim.balance_neurons(model, ms_optim.hessian_diagonal(model, x), group)
    assert int(found.scale_free.sum()) == 4 + 5 + 5 + 4  # conv, conv1, norm1 (its only use is conv2), conv2
    group.rescale_(model, group.bound(model, found.t))
    for conv in (model.conv, model.conv1, model.conv2):
        norms = conv.weight.square().sum((1, 2, 3))
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-10, atol=0)
    moved = ms_optim.hessian_diagonal(model, x)
    torch.testing.assert_close(
        found.pulls["conv.weight"].flatten(), moved["conv.weight"].sum((1, 2, 3)), rtol=1e-8, atol=0
    )


def test_a_zero_head_leaves_units_to_their_norms():
    model, x = mlp(nn.ReLU), torch.randn(32, 5)
    nn.init.zeros_(model[4].weight)
    group = ms_optim.neuron_symmetries(model, x)
    found = ms_optim.balance_neurons(model, ms_optim.hessian_diagonal(model, x), group)
    assert bool(found.dead.all()) and bool(found.t.isfinite().all()) and float(found.t.abs().max()) < 5


def test_gauge_one_balances_norms():
    model, x = mlp(nn.LeakyReLU), torch.randn(32, 5)
    group = ms_optim.neuron_symmetries(model, x)
    diagonal = ms_optim.hessian_diagonal(model, x)
    group.rescale_(model, ms_optim.balance_neurons(model, diagonal, group, gauge=1.0).t)
    incoming = model[0].weight.square().sum(1) + model[0].bias.square()
    torch.testing.assert_close(incoming, model[2].weight.square().sum(0), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"gauge must be 0 or 1 for single units, got 0.5"):
        ms_optim.balance_neurons(model, diagonal, group, gauge=0.5)


def test_rebalance_goes_there_with_the_optimizer():
    model, x = lenet(), images(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    state, weight = optimizer.state[model[0].weight]["momentum_buffer"].clone(), model[0].weight.detach().clone()
    before = model(x).detach()
    found = ms_optim.rebalance_(model, x, optimizer, granularity="neuron")
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    a = found.log_scale["0.weight"]
    torch.testing.assert_close(model[0].weight.detach(), weight * a.exp())
    torch.testing.assert_close(optimizer.state[model[0].weight]["momentum_buffer"], state * (-a).exp())
    again = ms_optim.rebalance_(model, x, granularity="neuron")
    assert float(again.t.abs().max()) < 1e-10
    assert again.minimum_sharpness == pytest.approx(found.minimum_sharpness, rel=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("2.weight"), "2.weight missing"),
        (lambda d: d.update(foreign=torch.ones(3)), "foreign unknown"),
        (lambda d: d["2.weight"].neg_(), "the diagonal of parameter 2.weight has shape .* smallest entry -"),
        (lambda d: d.update({"2.weight": torch.ones(3)}), r"has shape \(3,\)"),
    ],
)
def test_diagonals_that_do_not_fit_are_refused(change, message):
    model, x = mlp(nn.ReLU), torch.randn(8, 5)
    group = ms_optim.neuron_symmetries(model, x)
    diagonal = {name: value.clone() for name, value in ms_optim.hessian_diagonal(model, x).items()}
    change(diagonal)
    with pytest.raises(BalanceError, match=message):
        ms_optim.balance_neurons(model, diagonal, group)


def test_a_group_of_the_other_granularity_is_refused():
    model, x = mlp(nn.ReLU), torch.randn(8, 5)
    with pytest.raises(ValueError, match="the group is a NeuronGroup; pass the other granularity"):
        ms_optim.minimum_sharpness(model, x, group=ms_optim.neuron_symmetries(model, x))
    with pytest.raises(ValueError, match="granularity must be 'layer' or 'neuron', got 'channel'"):
        ms_optim.minimum_sharpness(model, x, granularity="channel")


@pytest.mark.parametrize("normalised", [False, True])
def test_at_the_representative_the_gradient_of_the_trace_and_the_pulls_is_that_of_the_minimum(normalised):
    """The envelope theorem: scales need not be differentiated; rows of norm 1 add C_j W_j."""
    norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
    model = nn.Sequential(nn.Linear(5, 6, bias=False), norm, nn.LeakyReLU(0.2), nn.Linear(6, 3)).eval()
    x = torch.randn(16, 5)
    group = ms_optim.neuron_symmetries(model, x)
    found = ms_optim.rebalance_(model, x, group=group, granularity="neuron")
    assert bool(found.scale_free.any()) == normalised
    weight, direction = model[0].weight, torch.randn(6, 5)

    def at(step):
        with torch.no_grad():
            weight.add_(step * direction)
            trace = sum(float(d.sum()) for d in ms_optim.hessian_diagonal(model, x).values())
            value = float(ms_optim.minimum_sharpness(model, x, group=group, granularity="neuron"))
            weight.sub_(step * direction)
        return trace, value

    up, down = at(1e-4), at(-1e-4)
    trace, value = ((u - d) / 2e-4 for u, d in zip(up, down, strict=True))
    pulled = 2 * float((found.pulls["0.weight"] * weight.detach() * direction).sum()) if normalised else 0.0
    assert trace + pulled == pytest.approx(value, rel=1e-5)
    assert not normalised or abs(pulled / value) > 1e-2
