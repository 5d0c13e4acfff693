"""Rules: every operation commutes with the scales its rule gives it, and no rule gives away more than it must."""

import math
import warnings
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ms_optim.errors import NoEffectWarning
from ms_optim.symmetry import Opaque, rules, scale_rule, scale_symmetries

INDEX = torch.tensor([2, 0, 1])


class Probe(nn.Module):
    """An operation on parameters, between the input and a readout that may take up any scale: r · f(x p)."""

    def __init__(self, function, shapes):
        super().__init__()
        self.function = function
        # Mixed signs, away from zero, and no ties.
        signs = [torch.where(torch.rand(shape) > 0.4, 1.0, -1.0) for shape in shapes]
        self.parts = nn.ParameterList([nn.Parameter((torch.rand_like(sign) + 0.5) * sign) for sign in signs])
        self.readout = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x):
        return (self.readout * self.function(*(x * part for part in self.parts))).flatten()


class Probes(nn.ModuleList):
    """All probes in one graph: they meet only where their outputs are joined."""

    def forward(self, x):
        return torch.cat([probe(x) for probe in self])


@dataclass(frozen=True)
class Found:
    """What discovery said about one probe, and how far a random element of the group moved its output."""

    dimension: int
    opaque: list[Opaque]
    error: float


@cache
def found() -> dict[str, Found]:
    assert not CASES.keys() & (OPAQUE | FIXING).keys()
    functions = [*CASES.items()]
    functions += [(name, (f, (M,), 0)) for name, f in (OPAQUE | FIXING).items()]
    x = torch.tensor(1.7)
    model = Probes(Probe(f, shapes) for _, (f, shapes, _) in functions)
    group = scale_symmetries(model, x)
    with warnings.catch_warnings():
        # scatter(reduce=...) is deprecated, and still an operation to know about.
        warnings.simplefilter("ignore", UserWarning)
        sizes = [probe(x).numel() for probe in model]
    outputs = []
    for t in (torch.zeros(len(group)), group.random(0.3)):
        group.rescale_(model, t)
        for training in (False, True):
            torch.manual_seed(1)
            outputs.append(model.train(training)(x).detach().split(sizes))
    results = {}
    for i, (name, _) in enumerate(functions):
        mine = torch.tensor([parameter.startswith(f"{i}.") for parameter in group.parameters])
        evaluation, training, evaluation_after, training_after = (output[i] for output in outputs)
        error = max((evaluation_after - evaluation).abs().max(), (training_after - training).abs().max())
        results[name] = Found(
            dimension=int(torch.linalg.matrix_rank(group.generators[:, mine])),
            opaque=[o for o in group.opaque if o.where == str(i)],
            error=float(error / evaluation.abs().max().clamp(min=1e-30)),
        )
    assert sum(result.dimension for result in results.values()) == len(group)
    return results


# Name, function, shapes of its parameters, dimension of its group: with k parameters, the readout takes up the scale of
# the output, so k scales are free, and one less for every equation between the inputs.
V, M, S, X, Q = (4,), (3, 4), (2, 3, 4), (2, 4, 6, 6), (1, 2, 3, 4)
HOMOGENEOUS = {
    "relu": (F.relu, M),
    "leaky_relu": (F.leaky_relu, M),
    "rrelu": (F.rrelu, M),
    "abs": (torch.abs, M),
    "neg": (torch.neg, M),
    "threshold": (lambda x: F.threshold(x, 0, 0), M),
    "clamp_min": (lambda x: x.clamp_min(0), M),
    "clamp_max": (lambda x: x.clamp(max=0.0), M),
    "hardtanh": (lambda x: F.hardtanh(x, 0.0, math.inf), M),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), S),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, padding=1), X),
    "max_pool with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], X),
    "max_unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), X),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), X),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), S),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2, padding=1), X),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), X),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 2), S),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 3), X),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 2), S),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), X),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), X),
    "mean": (lambda x: x.mean(1), M),
    "sum": (lambda x: x.sum(), M),
    "max": (lambda x: x.max(), M),
    "max.dim": (lambda x: x.max(1).values, M),
    "amin": (lambda x: x.amin(0), M),
    "topk": (lambda x: x.topk(2)[0], M),
    "sort": (lambda x: x.sort(1, descending=True).values, M),
    "median": (lambda x: x.median(1).values, M),
    "cumsum": (lambda x: x.cumsum(1), M),
    "cummax": (lambda x: x.cummax(1).values, M),
    "std": (lambda x: x.std(1), M),
    "norm": (lambda x: x.norm(dim=1), M),
    "1-norm": (lambda x: torch.linalg.vector_norm(x, 1), M),
    "norm of order zero": (lambda x: torch.linalg.vector_norm(x, 0), M),
    "reshape": (lambda x: x.reshape(2, 6).t().contiguous().view(-1), M),
    "squeeze": (lambda x: x[None].squeeze(0), M),
    "permute": (lambda x: x.permute(2, 0, 1).movedim(0, 1).swapaxes(0, 1), S),
    "expand": (lambda x: x.expand(2, 3, 4), M),
    "repeat": (lambda x: x.repeat(2, 1).repeat_interleave(2, 0).tile(1, 2), M),
    "slice": (lambda x: x[1:, ::2], M),
    "select": (lambda x: x[1], M),
    "split": (lambda x: x.split(2, 1)[1], M),
    "chunk": (lambda x: x.chunk(2, 1)[0], M),
    "unbind": (lambda x: x.unbind(0)[2], M),
    "index": (lambda x: x[INDEX], M),
    "roll": (lambda x: x.roll(1, 0).flip(1), M),
    "index_select": (lambda x: x.index_select(0, INDEX), M),
    "gather": (lambda x: x.gather(0, INDEX[:, None]), M),
    "masked_select": (lambda x: x * (x > 0), M),
    "tril": (lambda x: x.tril(), M),
    "diagonal": (lambda x: x.diagonal(), M),
    "unfold": (lambda x: x.unfold(1, 2, 1), M),
    "im2col": (lambda x: F.unfold(x, 2), X),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), X),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), X),
    "clone": (lambda x: x.clone().detach().to(torch.float32).to(torch.float64), M),
    "pad": (lambda x: F.pad(x, (1, 2)), M),
    "reflect": (lambda x: F.pad(x, (1, 2), mode="reflect"), M),
    "circular": (lambda x: F.pad(x, (1, 2), mode="circular"), M),
    "replicate": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), X),
    "infinite pad": (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-math.inf), 3), X),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), X),
    "dropout": (lambda x: F.dropout(x, 0.5), M),
    "bilinear": (lambda x: F.interpolate(x, size=(9, 9), mode="bilinear"), X),
    "dropout2d": (lambda x: F.dropout2d(x), X),
    "bicubic": (lambda x: F.interpolate(x, size=(3, 3), mode="bicubic", antialias=True), X),
    "times number": (lambda x: 2 * x / 3 - 0, M),
    "times constant": (lambda x: x * torch.arange(1.0, 5.0), M),
    "over tensor": (lambda x: 1 / x, M),
    "square": (lambda x: x.square(), M),
    "power": (lambda x: x.abs() ** 1.5, M),
    "rsqrt": (lambda x: x.abs().rsqrt(), M),
    "var": (lambda x: x.var(1), M),
    "sign": (lambda x: x.sign(), M),
    "var_mean": (lambda x: torch.var_mean(x, 1)[1], M),
    "plus itself": (lambda x: x + x, M),
    "relu by comparison": (lambda x: torch.where(x > 0, x, 0.0), M),
    "relu by zeros": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), M),
    "relu by mask": (lambda x: x.masked_fill(x < 0, 0.0), M),
    "relu by constant": (lambda x: torch.max(x, torch.tensor(0.0)), M),
    "written in place": (lambda x: set_row(x.clone(), 0, 0.0), M),
    "zeros beside": (lambda x: torch.cat([x, x.new_zeros(1, 4)]), M),
    "into a buffer": (lambda x: x.new_empty(3, 4).copy_(x), M),
    "argmax": (lambda x: F.one_hot(x.argmax(1), 4) * x, M),
    "order": (lambda x: (x[0] > x[1]) * x[2], M),
    "embedding": (lambda w: F.embedding(INDEX, w), M),
    "embedding_bag": (lambda w: F.embedding_bag(INDEX[None], w, mode="sum"), M),
    "einsum": (lambda x: torch.einsum("ij->j", x), M),
    "layer_norm": (lambda x: F.layer_norm(x, (4,), eps=0.0), M),
    "group_norm": (lambda x: F.group_norm(x, 2, eps=0.0), X),
    "instance_norm": (lambda x: F.instance_norm(x, eps=0.0), X),
    "stochastic depth": (lambda x: x * x.new_empty(3, 1).bernoulli_(0.5), M),
    "complex": (lambda x: torch.view_as_real(torch.complex(x, x)).sum(-1), M),
}
BINARY = {
    "add": (lambda x, y: x + 3 * y, (M, M), 1),
    "sub": (lambda x, y: torch.sub(x, y, alpha=2), (M, M), 1),
    "in place": (lambda x, y: x.clone().add_(y).relu_(), (M, M), 1),
    "cat": (lambda x, y: torch.cat([x, y]), (M, M), 1),
    "stack": (lambda x, y: torch.stack([x, y], 1), (M, M), 1),
    "maximum": (torch.maximum, (M, M), 1),
    "where": (lambda x, y: torch.where(torch.arange(4) > 1, x, y), (M, M), 1),
    "lerp": (lambda x, y: x.lerp(y, 0.3), (M, M), 1),
    "compare": (lambda x, y: (x > y) * x, (M, M), 1),
    "scatter": (lambda x, y: x.scatter(0, INDEX[:, None], y), (M, M), 1),
    "slice assignment": (lambda x, y: set_row(x.clone(), slice(0, 2), y[1:]), (M, M), 1),
    "index_put": (lambda x, y: set_row(x.clone(), INDEX, y), (M, M), 1),
    "index_add": (lambda x, y: x.index_add(0, INDEX, y), (M, M), 1),
    "mul": (torch.mul, (M, V), 2),
    "div": (torch.div, (M, V), 2),
    "square of one": (lambda x, y: x * x * y, (M, M), 2),
    "matmul": (lambda x, y: x @ y, (S, (4, 2)), 2),
    "mm": (torch.mm, (M, (4, 2)), 2),
    "mv": (torch.mv, (M, V), 2),
    "bmm": (torch.bmm, (S, (2, 4, 3)), 2),
    "outer": (torch.outer, (V, V), 2),
    "dot": (torch.dot, (V, V), 2),
    "einsum of two": (lambda x, y: torch.einsum("bij,kj->bik", x, y), (S, M), 2),
    "einsum of three": (lambda x, y: torch.einsum("ij,ij,ij->i", x, y, y), (M, M), 2),
    "linear": (F.linear, (M, (2, 4)), 2),
    "conv1d": (F.conv1d, (S, (2, 3, 2)), 2),
    "conv2d": (F.conv2d, (X, (2, 4, 3, 3)), 2),
    "conv2d same": (lambda x, w: F.conv2d(x, w, padding="same"), (X, (2, 4, 3, 3)), 2),
    "conv3d": (lambda x, w: F.conv3d(x[None], w), (X, (1, 2, 2, 2, 2)), 2),
    "conv_transpose2d": (F.conv_transpose2d, (X, (4, 2, 3, 3)), 2),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), (X, (2, 2, 3, 3)), 2),
    "prelu": (F.prelu, (X, V), 1),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), (M, (3, 1)), 2),
    "linear with bias": (lambda x, w, b: F.linear(x, w, b), (M, (2, 4), (2,)), 2),
    "conv with bias": (F.conv2d, (X, (2, 4, 3, 3), (2,)), 2),
    "addmm": (torch.addmm, ((2,), M, (4, 2)), 2),
    "baddbmm": (torch.baddbmm, ((2, 3, 3), S, (2, 4, 3)), 2),
    "addcmul": (torch.addcmul, (M, M, M), 2),
    "addcdiv": (torch.addcdiv, (M, M, M), 2),
    "bilinear": (F.bilinear, (M, (3, 5), (2, 4, 5), (2,)), 3),
    "attention": (F.scaled_dot_product_attention, (Q, Q, Q), 2),
    "attention with scale": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        (Q, Q, Q),
        2,
    ),
    "attention with mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (Q, Q, Q, (3, 3)), 2),
    "attention by hand": (lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v, (Q, Q, Q), 2),
    "layer_norm affine": (lambda x, w, b: F.layer_norm(x, (4,), w, b, eps=0.0), (M, V, V), 2),
    "layer_norm without bias": (lambda x, w: F.layer_norm(x, (4,), w, eps=0.0), (M, V), 2),
    "group_norm affine": (lambda x, w, b: F.group_norm(x, 2, w, b, eps=0.0), (X, V, V), 2),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w, eps=1e-300), (M, V), 2),
    "instance_norm affine": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=0.0), (X, V, V), 2),
    "batch_norm of the batch": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True, eps=1e-300),
        (X, V, V),
        2,
    ),
}
OPAQUE = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "softmax": lambda x: x.softmax(1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardtanh at one": F.hardtanh,
    "threshold at 0.1": lambda x: F.threshold(x, 0.1, 0),
    "clamp": lambda x: x.clamp(-1, 1),
    "round": torch.round,
    "pad with one": lambda x: F.pad(x, (1, 1), value=1.0),
    "rounded quotient": lambda x: torch.div(x, x.new_ones(4), rounding_mode="floor"),
    "to integer": lambda x: x.to(torch.int64) * 1.0,
    "cube root": lambda x: x.abs() ** (1 / 3),
    "exp": torch.exp,
    "glu": F.glu,
    "normalize": F.normalize,
    "bits": lambda x: x.view(torch.int64) * 1.0,
    "product of reduced": lambda x: x.scatter(0, INDEX[:, None], x, reduce="multiply"),
    "cumprod": lambda x: x.cumprod(1),
}
FIXING = {
    "plus number": lambda x: x + 1,
    "number minus": lambda x: 1 - x,
    "plus constant": lambda x: x + torch.arange(4.0),
    "maximum with one": lambda x: torch.maximum(x, torch.ones(4)),
    "compare with one": lambda x: (x > 1) * x,
    "masked to one": lambda x: x.masked_fill(x > 0, 1.0),
    "one beside": lambda x: torch.cat([x, x.new_ones(1, 4)]),
    "full": lambda x: torch.where(x > 0, x, torch.full_like(x, 0.1)),
    "written": lambda x: set_row(x.clone(), 0, 1.0),
    "probabilities": lambda x: torch.bernoulli(x.abs().clamp(min=0) / 10) + x,
}


def set_row(x, index, value):
    x[index] = value
    return x


CASES = {name: (f, (shape,), 1) for name, (f, shape) in HOMOGENEOUS.items()} | BINARY


@pytest.mark.parametrize("name", CASES)
def test_operation_commutes_with_its_scales_and_leaves_them_free(name):
    result = found()[name]
    assert result.opaque == [] or name == "attention by hand"
    assert result.dimension == CASES[name][2]
    # One of them goes through float32 and back.
    assert result.error <= (1e-6 if name == "clone" else 1e-11)


@pytest.mark.parametrize("name", OPAQUE)
def test_operation_that_does_not_scale_is_opaque_with_a_reason(name):
    result = found()[name]
    assert result.dimension == 0
    assert len(result.opaque) == 1 and result.opaque[0].reason


@pytest.mark.parametrize("name", FIXING)
def test_a_constant_that_does_not_scale_fixes_the_scale_beside_it(name):
    result = found()[name]
    assert result.dimension == 0 and result.opaque == []


def test_no_operation_has_two_rules():
    with pytest.raises(ValueError, match="relu already has the rule homogeneous"):
        scale_rule("relu")(lambda op: None)


def test_a_rule_can_be_added_for_an_operation_that_is_opaque_without():
    torch.manual_seed(0)
    model, x = Probes([Probe(lambda a: torch.cdist(a, a + a), (M,))]), torch.tensor(1.7)
    with pytest.warns(NoEffectWarning, match="cdist"):
        assert len(scale_symmetries(model, x)) == 0
    try:
        scale_rule("cdist", "_cdist_forward")(rules.homogeneous)
        assert len(scale_symmetries(model, x)) == 1
    finally:
        for name in ("cdist", "_cdist_forward"):
            del rules.SCALE_RULES[name]
