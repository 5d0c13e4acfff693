"""Networks and data that could make a number silently wrong, or be disturbed without a word."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature import hessian_diagonal, hessian_trace
from ms_optim.errors import CurvatureError, UnsupportedError
from ms_optim.reference import curvature as oracle


class Net(nn.Module):
    """f(parameters, x) as a module, with other modules beside."""

    def __init__(self, function, modules=None, **parameters):
        super().__init__()
        self.function = function
        for name, module in (modules or {}).items():
            self.add_module(name, module)
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def assert_exact(model, x, **options):
    expected = oracle.exact_diagonals(model, x)
    largest = max(float(d.sum()) for d in expected.values())
    traces, diagonals = hessian_trace(model, x, **options), hessian_diagonal(model, x, **options)
    for name, entries in expected.items():
        assert traces[name] == pytest.approx(float(entries.sum()), rel=1e-10, abs=1e-13 * largest), name
        torch.testing.assert_close(diagonals[name], entries, rtol=1e-10, atol=1e-13 * largest)
    return traces


def sequence_first():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(F.relu(m.a(x.transpose(0, 1))).mean(0)))
    model.a, model.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 3)
    with torch.no_grad():
        model.a.weight.abs_()
    x = torch.randn(8, 4, 3)
    x[:2] = -x[:2].abs()  # dead: nothing says where they lie
    return model, x


def test_samples_that_are_dead_say_nothing_about_the_layout_of_the_others():
    model, x = sequence_first()
    for budget in (None, 12000, 9000, 7000):
        assert_exact(model, x, max_memory=budget)
    stream = hessian_trace(model, [x[:2], x[2:]])
    assert dict(stream) == pytest.approx(oracle.gauss_newton_traces(model, x), rel=1e-10)


def filtered(x, w):
    return torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(w), n=6)


COMPLEX = {
    "a filter for every entry": lambda m, x: filtered(x, m.w),
    "a filter that channels share": lambda m, x: filtered(x, m.w[:1]),
    "a learned rotation": lambda m, x: torch.view_as_real(
        torch.fft.rfft(x) * torch.polar(torch.ones(4), m.w[:, 0])
    ).flatten(1),
}


@pytest.mark.parametrize("case", COMPLEX)
def test_complex_numbers_on_the_way_are_measured_by_gradients(case):
    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(torch.tanh(COMPLEX[case](m, x))), w=(4, 2))
    model.head = nn.Linear(8 if "rotation" in case else 6, 3)
    assert assert_exact(model, torch.randn(3, 6)).generic == ("w",)


def test_a_complex_parameter_is_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    model.phase = nn.Parameter(torch.randn(2, dtype=torch.complex128))
    with pytest.raises(UnsupportedError, match=r"phase \(2,\) is complex.*view_as_complex"):
        hessian_trace(model, torch.randn(2, 3))


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("samples", [4, 6, 16, 17, 40, 64])
def test_samples_that_influence_each_other_in_a_pattern_are_found(shift, samples):
    torch.manual_seed(0)
    shift = shift * samples // 4
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x) + 0.7 * m.a(x).roll(shift, 0))))
    model.a, model.b = nn.Linear(3, 4), nn.Linear(4, 3)
    with pytest.raises(CurvatureError, match="influence each other"):
        hessian_trace(model, torch.randn(samples, 3))


def test_a_division_that_rounds_has_no_curvature_in_its_divisor():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(torch.div(x, m.p, rounding_mode="floor") + x / m.q), p=(3,), q=(3,))
    model.head = nn.Linear(3, 3)
    assert assert_exact(model, torch.randn(4, 3))["p"] == 0.0


def test_numpys_integers_count_like_pythons_and_other_things_do_not():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6), torch.randn(5, 4)
    assert dict(hessian_trace(model, x, columns=np.int64(2))) == dict(hessian_trace(model, x, columns=2))
    assert hessian_trace(model, x, columns=np.int64(2)).backpropagations == 3
    for name, value in (("columns", True), ("columns", 2.0), ("probes", 2.5), ("probes", None), ("max_memory", "1GB")):
        with pytest.raises(ValueError, match=f"{name} must be a whole number.* got"):
            hessian_trace(model, x, **{name: value})
    with pytest.raises(ValueError, match="tolerance must be a positive number or None, got 'x'"):
        hessian_trace(model, x, tolerance="x")


class NoBackward(torch.autograd.Function):
    """A forward pass without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("no derivative here")


class NothingBack(torch.autograd.Function):
    """A backward pass that passes nothing on to its first input."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, grad):
        return None, grad


@pytest.mark.filterwarnings("ignore:Error detected")
@pytest.mark.parametrize("parameter", ["a rule", "the generic path"])
def test_a_layer_that_cannot_be_differentiated_is_named(parameter):
    model = Net(lambda m, x: m.head(NoBackward.apply(m.body(x))))
    model.body, model.head = nn.Linear(3, 3), nn.Linear(3, 3)
    if parameter == "the generic path":
        model.body = nn.Bilinear(3, 3, 3)
        model.function = lambda m, x: m.head(NoBackward.apply(m.body(x, x)))
    with pytest.raises(CurvatureError, match=r"NoBackward cannot be differentiated.*no derivative here.*body\.weight"):
        hessian_trace(model, torch.randn(2, 3))


def test_where_nothing_is_passed_on_the_trace_is_zero():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(NothingBack.apply(m.a(x), m.b(x))))
    model.a, model.b, model.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    traces = hessian_trace(model, torch.randn(4, 3))
    assert traces["a.weight"] == traces["a.bias"] == 0.0 < traces["b.weight"]


def test_a_transformer_with_a_padding_mask_can_be_split():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.head(self.body(x, src_key_padding_mask=mask).mean(1))

    model, x, mask = Masked().eval(), torch.randn(6, 5, 4), torch.zeros(6, 5, dtype=torch.bool)
    mask[:, 3:] = True
    whole = hessian_trace(model, {"x": x, "mask": mask})
    parts = hessian_trace(model, {"x": x, "mask": mask}, max_memory=60_000)
    assert dict(parts) == pytest.approx(dict(whole), rel=1e-10)


@pytest.mark.parametrize("statistics", ["running", "batch", "training"])
def test_a_norm_may_be_called_by_keyword(statistics):
    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(m.norm(input=x)))
    model.norm, model.head = nn.BatchNorm1d(3), nn.Linear(3, 3)
    plain = Net(lambda m, x: m.head(m.norm(x)))
    plain.norm, plain.head = model.norm, model.head
    x = torch.randn(4, 3)
    assert dict(hessian_trace(model, x, statistics=statistics)) == dict(hessian_trace(plain, x, statistics=statistics))


def test_inputs_may_come_from_inference_mode_or_want_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.inference_mode():
        x = torch.randn(4, 3)
    expected = dict(hessian_trace(model, x.clone()))
    assert dict(hessian_trace(model, x)) == expected
    leaf = x.clone().requires_grad_()
    assert dict(hessian_trace(model, leaf)) == expected and leaf.grad is None


def test_buffers_that_are_replaced_and_weights_that_are_renormalised_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return self.head(self.table(x).mean(1))

    torch.manual_seed(0)
    model = Counting()
    count, weight = model.count, model.table.weight.detach().clone()
    hessian_trace(model, torch.randint(0, 5, (4, 2)))
    assert model.count is count and float(count) == 0.0
    assert torch.equal(model.table.weight, weight)


def test_experts_that_take_any_number_of_rows_are_exact_and_said_to_be_generic():
    torch.manual_seed(0)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.head = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), nn.Linear(3, 3)

        def forward(self, x):
            rows, out = x.reshape(-1, 3), torch.zeros(x.shape[0] * x.shape[1], 3)
            chosen = (rows[:, 0] > 0.3).long()
            for index, expert in enumerate(self.experts):
                out = out.index_add(0, (at := (chosen == index).nonzero()[:, 0]), torch.tanh(expert(rows[at])))
            return self.head(out.reshape(x.shape).mean(1))

    model, x = Experts(), torch.randn(4, 5, 3)
    traces = assert_exact(model, x)
    assert "experts.0.weight" in traces.generic
    assert hessian_trace(model, x).generic == traces.generic  # also when its plan is known
