"""Every kind of layer: its trace and its diagonal are those of whole Jacobians, on random shapes, by a rule."""

import pytest
import torch
from curvature.random_layers import RULED, FirstOfSequence, Function, Measured
from curvature.random_networks import settled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ms_optim.batch import Batch
from ms_optim.curvature import hessian_diagonal, hessian_trace
from ms_optim.curvature.evaluation import evaluation
from ms_optim.curvature.graph.layout import Layout
from ms_optim.curvature.graph.tape import read_tape
from ms_optim.curvature.rules import contraction as contractions
from ms_optim.curvature.rules.contraction import Piece
from ms_optim.curvature.rules.layers import contraction
from ms_optim.curvature.weighted import weighted_trace
from ms_optim.errors import CurvatureError
from ms_optim.reference import curvature as oracle

# PyTorch says that it copies when a convolution's padding differs on two sides.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def assert_exact(model, x, generic=()):
    """Traces and diagonals to 1e-10 of the largest entry of each parameter, up to rounding in the largest of all."""
    expected = oracle.exact_diagonals(model, x)
    largest = max(float(entries.max()) for entries in expected.values())
    diagonals, traces = hessian_diagonal(model, x), hessian_trace(model, x)
    assert traces.generic == diagonals.generic == generic
    for name, entries in expected.items():
        close = {"rtol": 1e-10, "atol": 1e-10 * float(entries.max()) + 1e-14 * largest}
        torch.testing.assert_close(diagonals[name], entries, **close, msg=lambda text, name=name: f"{name}: {text}")
        total = float(entries.sum())
        assert traces[name] == pytest.approx(total, rel=1e-10, abs=1e-13 * largest), name


@pytest.mark.parametrize("kind", RULED)
@given(st.data())
@settings(max_examples=60)
def test_trace_and_diagonal_are_those_of_whole_jacobians(kind, data):
    model, x = data.draw(RULED[kind]())
    assert_exact(model, x)


@pytest.mark.parametrize("kind", RULED)
@given(st.data())
@settings(max_examples=10)
def test_nothing_depends_on_how_much_is_done_at_once(kind, data):
    model, x = data.draw(RULED[kind]())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contractions, "_CHUNK_BYTES", 1)
        assert_exact(model, x)


@pytest.mark.parametrize("kind", RULED)
@given(st.data())
@settings(max_examples=10)
def test_what_is_called_hessian_is_the_hessian(kind, data):
    model, x = data.draw(RULED[kind]())
    linear = Linearised(model)
    traces = hessian_trace(linear, x)
    hessian = oracle.hessian_traces(linear, x, torch.zeros(len(x), dtype=torch.long))
    largest = max(abs(value) for value in hessian.values())
    for name in traces:
        if traces.kind[name] == "hessian":
            assert traces[name] == pytest.approx(hessian[name], rel=1e-8, abs=1e-10 * max(1.0, largest)), name


class Linearised(nn.Module):
    """The same network without the nonlinearity of its readout, where a parameter has a chance to be "hessian"."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return F.relu(self.model.before(x)) @ self.model.readout


@pytest.mark.parametrize("kind", RULED)
@given(st.data())
@settings(max_examples=10)
def test_the_weighted_trace_can_be_differentiated_through_every_rule(kind, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measured, "classes", 2)  # P of two classes has one column, so that its sign does not matter
        model, x = data.draw(RULED[kind]())
    weights = {name: 0.5 + i for i, (name, _) in enumerate(model.named_parameters())}
    parameters = list(model.parameters())
    with evaluation(model):
        value = weighted_trace(model, Batch((x,), {}), weights, torch.Generator(), statistics="running")
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    truth = oracle.weighted_trace(model, x, weights)
    expected = torch.autograd.grad(truth, parameters, allow_unused=True, materialize_grads=True)
    scale = max(float(g.abs().max()) for g in expected)
    torch.testing.assert_close(value, truth, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * max(1.0, scale))


def test_sparse_gradients_do_not_matter():
    dense, sparse = nn.Embedding(4, 3), nn.Embedding(4, 3, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    indices = torch.tensor([[0, 1, 1], [3, 3, 3]])
    models = [Measured(table, indices, scaled=False) for table in (dense, sparse)]
    models[1].readout = models[0].readout
    assert_exact(models[0], indices)
    assert dict(hessian_trace(models[1], indices)) == dict(hessian_trace(models[0], indices))


def test_a_table_of_many_rows_is_not_formed_for_every_sample():
    table, indices = nn.Embedding(10**6, 4), torch.randint(0, 10**6, (40, 5))
    model = Measured(table, indices, scaled=False)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    logits = model(indices)
    ((use,),) = read_tape(logits, {"w": table.weight}).uses.values()
    accumulator = contraction(use, Layout(40)).trace(2)
    with torch.no_grad(), Sizes():
        accumulator.add(Piece(torch.randn(2, 40, 5, 4)))
        accumulator.result()
    assert max(largest) <= 2 * 40 * 5 * 4


# Networks with a parameter that no rule covers: (layer, sample shape, the parameters).
GENERIC = {
    "bilinear": (lambda: Function(lambda x, w, b: F.bilinear(x, x.sin(), w, b), (2, 3, 3), (2,)), (3,), ["0"]),
    "einsum over positions": (lambda: Function(lambda x, w: torch.einsum("nti,io->nto", x, w), (3, 2)), (2, 3), ["0"]),
    "a scaled product": (
        lambda: Function(lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2.0), (3, 2), (2,)),
        (3,),
        ["0", "1"],
    ),
    "samples in columns": (lambda: Function(lambda x, w: (w @ x.t()).t(), (2, 3)), (3,), ["0"]),
    "a nonlinear function of both": (
        lambda: Function(lambda x, p: torch.atan2(x, p.expand(x.shape)), (3,)),
        (3,),
        [],
    ),
    "a distance": (lambda: Function(lambda x, p: torch.cdist(x, p), (4, 3)), (3,), ["0"]),
    "a convolution of the batch as channels": (
        lambda: Function(lambda x, w: F.conv1d(x.flatten(0, 1)[None], w.repeat(len(x), 1, 1), groups=2 * len(x))[0]
                         .unflatten(0, (len(x), 2)), (2, 1, 2)),
        (2, 4),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERIC)
def test_parameters_without_a_rule_are_exact_and_reported(case):
    make, sample, names = GENERIC[case]
    x = torch.randn(3, *sample)
    model = Measured(make(), x, scaled=True)
    assert_exact(model, x, tuple(f"layer.p.{name}" for name in names))
    if names:
        with pytest.raises(CurvatureError, match=f"layer.p.{names[0]} .* no curvature rule covers it"):
            hessian_trace(model, x, generic=False)


def test_an_embedding_bag_is_exact():
    indices = torch.randint(0, 5, (3, 4))
    assert_exact(Measured(nn.EmbeddingBag(5, 3, mode="mean"), indices, scaled=False), indices, ("layer.weight",))


def test_a_fused_recurrent_network_is_measured_as_well():
    x = torch.randn(3, 4, 2)
    model = Measured(FirstOfSequence(nn.LSTM(2, 3, batch_first=True, bidirectional=True)), x, scaled=False)
    exact = hessian_trace(model, x)
    single = hessian_trace(model.float(), x.float())  # one operation for the whole network, where there is MKL-DNN
    assert exact.generic == ()
    assert all(single[name] == pytest.approx(exact[name], rel=1e-4) for name in exact)


LAYOUTS = {
    "linear": lambda: nn.Linear(4, 4),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True),
    "norm": lambda: nn.LayerNorm(4),
    "scale": lambda: Function(lambda x, g, b: x * g + b, (4,), (4,)),
}


class SequenceFirst(nn.Module):
    """The twin of a network of positions ``[N, T, D]`` that runs on ``[T, N, D]``, or on rows ``[T·N, D]``."""

    def __init__(self, layer, folded) -> None:
        super().__init__()
        self.layer, self.folded = layer, folded

    def forward(self, x):
        y = x.transpose(0, 1)
        if self.folded:
            return self.layer(y.flatten(0, 1)).unflatten(0, y.shape[:2]).transpose(0, 1)
        return self.layer(y).transpose(0, 1)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_sequence_first_network_has_the_traces_of_its_twin(kind, folded):
    if kind == "attention" and folded:
        pytest.skip("attention needs the positions as an axis")
    layer, x = settled(LAYOUTS[kind]()), torch.randn(3, 5, 4)
    twin = SequenceFirst(layer, folded)
    if kind == "attention":
        twin = SequenceFirst(nn.TransformerEncoderLayer(4, 2, 5, batch_first=False), folded)
        twin.layer.load_state_dict(layer.state_dict())
    first, second = Measured(layer, x, True).eval(), Measured(twin, x, True).eval()
    second.readout = first.readout
    a, b = hessian_trace(first, x), hessian_trace(second, x)
    assert a.generic == b.generic == ()
    assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-11)
    assert list(a.kind.values()) == list(b.kind.values())


@pytest.mark.parametrize("kind", RULED)
@given(st.data())
@settings(max_examples=10)
def test_batches_of_other_sizes_are_read_afresh(kind, data):
    # What was found out about many samples may not hold for one, where other operations are the uses.
    model, x = data.draw(RULED[kind]())
    together = hessian_trace(model, x)
    mixed = hessian_trace(model, [x, x[:1], *x.split(1)])
    first = hessian_trace(model, x[:1])
    for name in together:
        expected = (2 * len(x) * together[name] + first[name]) / (2 * len(x) + 1)
        assert mixed[name] == pytest.approx(expected, rel=1e-9, abs=1e-12), name


ON_A_GPU = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "rms norm": lambda: nn.RMSNorm(4),
    "layer norm": lambda: nn.LayerNorm((4, 4)),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "convolution": lambda: nn.Conv2d(4, 4, 3, 2, 1, groups=2),
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, 1),
    "attention": lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)),
}


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ON_A_GPU)
def test_the_operations_of_a_gpu_have_the_traces_of_the_cpu(kind):
    x = torch.randn(3, 4, 4, 4)
    model = Measured(settled(ON_A_GPU[kind]()), x, scaled=True).eval()
    expected = hessian_trace(model, x)
    found = hessian_trace(model.cuda(), x.cuda())
    assert expected.generic == found.generic == ()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-9)


class PositionMajor(nn.Module):
    """Tokens folded before the samples, ``[T·N, features]``."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(2, 3), nn.Parameter(torch.randn(3))
        self.second = nn.Linear(3, 3)

    def forward(self, x):
        rows = x.transpose(0, 1).reshape(-1, 2)
        rows = F.relu(self.first(rows)) * self.scale
        return self.second(rows).reshape(x.shape[1], x.shape[0], -1).square().sum(0)


@pytest.mark.parametrize("lengths", [(1, 4), (4, 1), (1, 2, 3), (2, 1, 2)])
def test_batches_of_other_lengths_are_looked_at_again(lengths):
    # One position fits every layout, so what such a batch shows must not be believed of the others.
    torch.manual_seed(0)
    model = PositionMajor()
    batches = [torch.randn(3, length, 2) for length in lengths]
    traces = hessian_trace(model, batches, generic=False)
    each = [oracle.gauss_newton_traces(model, x) for x in batches]
    for name in traces:
        assert traces[name] == pytest.approx(sum(one[name] for one in each) / len(each), rel=1e-10)
