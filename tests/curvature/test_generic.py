"""Parameters that no rule covers are measured all the same, exactly, by their gradients, and are named."""

import pytest
import torch
from curvature.agreement import assert_same
from curvature.random_networks import small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature import hessian_diagonal, hessian_trace, measurement, reading
from ms_optim.curvature.graph import registry
from ms_optim.errors import CurvatureError, NoRuleError
from ms_optim.reference import curvature as oracle

MEASURES = [hessian_trace, hessian_diagonal]


class Product(torch.autograd.Function):
    """x · w with a derivative of its own, which autograd's graph shows by a name that no rule has."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)


class Unbatched(Product):
    """The same with a look at the numbers, which vmap cannot give."""

    @staticmethod
    def backward(ctx, grad):
        if float(grad.detach().abs().sum()) < 0.0:
            raise AssertionError("a sum of absolute values")
        return Product.backward(ctx, grad)


class Custom(nn.Module):
    """A custom product between two linear layers."""

    def __init__(self, function=Product, shape=(7,)):
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, 7), nn.Parameter(torch.randn(shape)), nn.Linear(7, 4)
        self.function = function

    def forward(self, x):
        return self.last(self.function.apply(F.relu(self.first(x)), self.scale))


class Distances(nn.Module):
    """Logits are distances to prototypes."""

    def __init__(self):
        super().__init__()
        self.first, self.prototypes = nn.Linear(5, 7), nn.Parameter(torch.randn(4, 7))

    def forward(self, x):
        return -torch.cdist(F.relu(self.first(x)), self.prototypes)


class Solver(nn.Module):
    """(diag(x²) + A Aᵀ + 1)⁻¹ x: a system that mixes parameters with data before it is solved."""

    def __init__(self):
        super().__init__()
        self.a, self.last = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 4)

    def forward(self, x):
        system = torch.diag_embed(x.square()) + self.a @ self.a.T + torch.eye(5, dtype=x.dtype)
        return self.last(torch.linalg.solve(system, x))


NETWORKS = {
    "custom": (Custom, {"scale"}),
    "custom number": (lambda: Custom(shape=()), {"scale"}),
    "custom that vmap cannot batch": (lambda: Custom(Unbatched), {"scale"}),
    "distances": (Distances, {"prototypes"}),
    "solver": (Solver, None),  # which of its parameters has a rule is not the point
}


def stacked(values):
    return torch.cat([torch.as_tensor(value).reshape(-1) for value in values.values()])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_generic_path_is_exact_and_says_so(network, loss):
    build, names = NETWORKS[network]
    model, x = build(), torch.randn(4, 5)
    before = snapshot(model)
    traces, diagonals = hessian_trace(model, x, loss=loss), hessian_diagonal(model, x, loss=loss)
    assert_undisturbed(model, before)
    assert_same(traces, oracle.gauss_newton_traces(model, x, loss=loss))
    for name, expected in oracle.exact_diagonals(model, x, loss=loss).items():
        torch.testing.assert_close(diagonals[name], expected, rtol=1e-10, atol=1e-14)
    assert traces.samples == diagonals.samples == 4
    if names is not None:
        assert set(traces.generic) == set(diagonals.generic) == names
        for result in (traces, diagonals):
            lines = {line.split()[0]: line for line in str(result).splitlines()}
            for name in traces:
                assert ("generic path" in lines[name]) == (name in names)
    assert not bool(stacked(traces.standard_error).any()) and not bool(stacked(diagonals.standard_error).any())


@pytest.mark.parametrize("network", ["custom", "custom that vmap cannot batch", "distances"])
def test_without_the_generic_path_the_parameter_is_named(network):
    build, names = NETWORKS[network]
    model, x = build(), torch.randn(4, 5)
    before = snapshot(model)
    for measure in MEASURES:
        with pytest.raises(NoRuleError, match=rf"parameter {next(iter(names))} .*no curvature rule covers it"):
            measure(model, x, generic=False)
    assert_undisturbed(model, before)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("function", [Product, Unbatched])
@pytest.mark.parametrize("options", [{"columns": 0}, {"columns": 1, "probes": 2}])
def test_sampled_columns_take_the_generic_path_too(measure, function, options):
    # With a rule and without one the same signs give the same numbers.
    class Plain(Custom):
        def forward(self, x):
            return self.last(F.relu(self.first(x)) * self.scale)

    model, plain, x = Custom(function), Plain(), torch.randn(6, 5)
    plain.load_state_dict(model.state_dict())
    found, expected = measure(model, x, **options), measure(plain, x, **options)
    assert found.generic == ("scale",) and expected.generic == ()
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=1e-11, atol=1e-15)
    if measure is hessian_trace and "probes" in options:
        torch.testing.assert_close(
            stacked(found.standard_error), stacked(expected.standard_error), rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("options", [{"columns": "rank"}, {"tolerance": 1e-9}])
def test_other_schemes_take_the_generic_path_too(measure, options):
    model, x = Custom(), torch.randn(4, 5)
    torch.testing.assert_close(
        stacked(measure(model, x, **options)), stacked(measure(model, x)), rtol=1e-11, atol=1e-15
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_a_rule_that_is_taken_away_changes_nothing_but_the_path(measure, monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(70, 2, 3, 3)
    expected = measure(model, x)
    for place in (("Convolution", 1), ("Addmm", 0)):
        monkeypatch.delitem(registry._RULES, place)
    assert measurement._PLANS[model]  # a plan for all samples together, which no longer holds
    found = measure(model, x)
    assert found.generic == ("0.weight", "3.bias") and found.samples == 70
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("measure", MEASURES)
def test_columns_that_do_not_fit_together_change_nothing(measure, monkeypatch):
    model, x = Custom(), torch.randn(3, 5)
    expected = measure(model, x)
    monkeypatch.setattr(reading, "_GRADIENT_BYTES", 1)
    torch.testing.assert_close(stacked(measure(model, x)), stacked(expected), rtol=1e-12, atol=1e-15)


def test_batches_of_one_sample_and_streams_of_them():
    model, x = Custom(), torch.randn(5, 5)
    whole = hessian_trace(model, x)
    for data in (x.split(1), x.split(2), x.split([1, 4]), x.split([4, 1])):
        found = hessian_trace(model, list(data))
        assert found.samples == 5 and found.generic == ("scale",)
        assert_same(found, dict(whole), relative=1e-12)
    one = hessian_trace(model, x[:1])
    assert_same(one, oracle.gauss_newton_traces(model, x[:1]))


def test_the_generic_path_uses_the_statistics_of_the_whole_batch():
    class Normalised(Custom):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(7)

        def forward(self, x):
            return self.last(Product.apply(F.relu(self.norm(self.first(x))), self.scale))

    class Plain(Normalised):
        def forward(self, x):
            return self.last(F.relu(self.norm(self.first(x))) * self.scale)

    model, plain, x = Normalised(), Plain(), 1 + torch.randn(6, 5)
    plain.load_state_dict(model.state_dict())
    before = snapshot(model)
    found = hessian_trace(model, x, statistics="batch")
    assert_undisturbed(model, before)
    assert found.generic == ("scale",)
    assert_same(found, dict(hessian_trace(plain, x, statistics="batch")), relative=1e-11)


@pytest.mark.parametrize("size", [60, 7])
def test_a_path_that_only_some_batches_take(size, monkeypatch):
    # What was planned for the first batch, all samples together or seven of them, does not hold for the second.
    monkeypatch.setattr(measurement, "plan_chunk", lambda *args, **options: measurement.Chunk(size, 3))

    class Switch(Custom):
        def forward(self, x):
            hidden = F.relu(self.first(x))
            if float(x.detach().max()) > 50:
                return self.last(Product.apply(hidden, self.scale))
            return self.last(hidden * self.scale)

    model, x = Switch(), torch.randn(3, 60, 5)
    x[1] *= 100
    found = hessian_trace(model, list(x))
    assert found.generic == ("scale",) and found.samples == 180
    parts = [hessian_trace(model, part) for part in x]
    assert [part.generic for part in parts] == [(), ("scale",), ()]
    assert_same(found, {name: sum(part[name] for part in parts) / 3 for name in found}, relative=1e-12)
    single = [oracle.gauss_newton_traces(model, part[:2]) for part in x[1:2]]
    assert_same(hessian_trace(model, x[1, :2]), single[0])


def test_a_batch_that_cannot_be_split_is_refused_where_the_generic_path_has_to():
    class Folded(Custom):
        def forward(self, x):
            return super().forward(x.view(-1, 5))

    class Shifted(Custom):
        def forward(self, x, shift):
            return super().forward(x + shift)

    model, x = Folded(), torch.randn(6, 2, 5)
    before = snapshot(model)
    with pytest.raises(
        CurvatureError, match="Folded returned 12 rows of logits for inputs of 6 rows: its batch cannot"
    ):
        hessian_trace(model, x)
    assert_undisturbed(model, before)
    with pytest.raises(CurvatureError, match="Shifted returned 6 rows of logits for inputs of different first axes"):
        hessian_trace(Shifted(), {"x": x[:, 0], "shift": torch.zeros(5)})
    assert hessian_trace(Shifted(), {"x": x[:1, 0], "shift": torch.zeros(5)}).samples == 1


def test_samples_that_influence_each_other_are_refused():
    class Centred(Custom):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    model, x = Centred(), torch.randn(4, 5)
    before = snapshot(model)
    with pytest.raises(CurvatureError, match="influence each other"):
        hessian_trace(model, x)
    assert_undisturbed(model, before)


def test_a_backward_pass_that_fails_is_not_hidden():
    class Broken(Product):
        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no derivative today")

    with pytest.raises(RuntimeError, match="no derivative today"):
        hessian_trace(Custom(Broken), torch.randn(3, 5))


def test_half_precision_on_the_generic_path():
    model, x = Custom().bfloat16(), torch.randn(6, 5).bfloat16()
    wide = Custom()
    wide.load_state_dict(model.double().state_dict())
    expected = hessian_diagonal(wide, x.double())
    found = hessian_diagonal(model.bfloat16(), x)
    assert all(value.dtype == torch.float32 for value in found.values())
    for name, value in expected.items():
        assert float((found[name].double() - value).abs().max()) <= 0.1 * float(value.max())


def test_a_ruled_network_does_not_take_the_generic_path():
    assert hessian_trace(small_mlp(), torch.randn(4, 5)).generic == ()
