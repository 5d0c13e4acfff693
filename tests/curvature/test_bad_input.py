"""What cannot be measured is refused by the name of the object and the next move, and nothing is changed."""

import math

import pytest
import torch
from curvature.random_networks import small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ms_optim.curvature import hessian_trace
from ms_optim.errors import CurvatureError, DataError, UnsupportedError


class Functional(nn.Module):
    """f(parameters, x) as a module."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)


def nan_at(tensor, index):
    tensor = tensor.clone()
    tensor.view(-1)[index] = math.nan
    return tensor


def reentrant(module, x):
    from torch.utils.checkpoint import checkpoint

    return F.linear(
        checkpoint(lambda h: F.linear(h, module.table), x.requires_grad_(), use_reentrant=True), module.head
    )


def rand(*shape):
    return torch.randn(shape)


BAD_DATA = {
    "a non-finite input": (lambda: nan_at(rand(4, 5), 7), DataError, r"batch 0 holds 1 non-finite values of 20"),
    "a later non-finite batch": (lambda: [rand(4, 5), nan_at(rand(2, 5), 0)], DataError, "batch 1 holds 1 non-finite"),
    "an empty list": (lambda: [], DataError, r"\(list\) holds no batch"),
    "a used-up generator": (lambda: (_ for _ in ()), DataError, r"\(generator\) holds no batch"),
    "a data set": (lambda: TensorDataset(rand(4, 5)), DataError, "Dataset .*TensorDataset.*DataLoader"),
    "a number": (lambda: 3, DataError, "data is a int"),
    "strings": (lambda: ["ab"], DataError, "a batch is a str"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_and_nothing_changed(case):
    make, error, message = BAD_DATA[case]
    model = small_mlp()
    before, data = snapshot(model), make()
    before["rng"] = torch.get_rng_state()
    with pytest.raises(error, match=message):
        hessian_trace(model, data, statistics="batch")
    assert_undisturbed(model, before)


BAD_MODELS = {
    "one logit per sample": (lambda m, x: x @ m.w[:, 0], {"w": (5, 4)}, DataError, r"shape \(4,\).*\[N, K\]"),
    "logits at positions": (lambda m, x: (x @ m.w)[:, :, None], {"w": (5, 4)}, DataError, r"shape \(4, 4, 1\)"),
    "one class": (lambda m, x: x @ m.w, {"w": (5, 1)}, DataError, "K >= 2"),
    "a tuple of outputs": (lambda m, x: (x @ m.w, x), {"w": (5, 3)}, DataError, "returned a tuple"),
    "detached logits": (lambda m, x: (x @ m.w).detach(), {"w": (5, 3)}, CurvatureError, "not in autograd's graph"),
    "overflow": (lambda m, x: (x @ m.w) * math.inf, {"w": (5, 3)}, DataError, "logits of batch 0 are not finite"),
    "an embedding": (
        lambda m, x: F.linear(F.embedding(x.argmax(1), m.table), m.head),
        {"table": (5, 3), "head": (3, 3)},
        CurvatureError,
        r"table \(5, 3\) is used by Embedding",
    ),
    "a bias table": (
        lambda m, x: F.linear(x + m.table[x.argmax(1)], m.head),
        {"table": (5, 5), "head": (3, 5)},
        CurvatureError,
        r"table \(5, 5\) is used by Index",
    ),
    "a layer scale": (
        lambda m, x: F.linear(x * m.gamma, m.head),
        {"gamma": (5,), "head": (3, 5)},
        CurvatureError,
        r"gamma \(5,\) is used by Mul",
    ),
    "a number plus one": (
        lambda m, x: F.linear(x, m.head) * (1 + m.scale),
        {"scale": (), "head": (3, 5)},
        CurvatureError,
        r"scale \(\) is added to a number",
    ),
    "a vector plus one": (
        lambda m, x: F.linear(x[:, :4] * (1 + m.gamma), m.head),
        {"gamma": (4,), "head": (3, 4)},
        CurvatureError,
        r"gamma \(4,\) is used by Add",
    ),
    "a parameter along the batch": (
        lambda m, x: F.linear(x + m.rows, m.head),
        {"rows": (4, 5), "head": (3, 5)},
        CurvatureError,
        r"rows \(4, 5\).*first axis",
    ),
    "a PReLU slope": (
        lambda m, x: F.linear(F.prelu(x, m.slope), m.head),
        {"slope": (5,), "head": (3, 5)},
        CurvatureError,
        "slope",
    ),
    "a transposed convolution": (
        lambda m, x: F.conv_transpose1d(x[:, None], m.kernel).flatten(1),
        {"kernel": (1, 2, 2)},
        CurvatureError,
        "kernel is the weight of a transposed convolution",
    ),
    "a sequence first": (
        lambda m, x: F.linear(F.relu(F.linear(x.view(4, -1, 1).transpose(0, 1), m.w)), m.head).mean(0),
        {"w": (3, 1), "head": (3, 3)},
        CurvatureError,
        r"parameter \w+ \(3, \d\) is used by Mm on a tensor whose first axis \(20\).*sequence-first",
    ),
    "one position of a sequence first": (
        lambda m, x: F.linear(F.linear(x[:2].view(2, -1, 1).transpose(0, 1)[:2], m.w)[0], m.head),
        {"w": (3, 1), "head": (3, 3)},
        CurvatureError,
        r"parameter w \(3, 1\) is used by Mm on a tensor whose first axis \(4\)",
    ),
    "samples that attend to each other": (
        lambda m, x: F.linear(F.linear(x.view(4, 5, 1), m.w).flip(0), m.head).mean(1),
        {"w": (3, 1), "head": (3, 3)},
        CurvatureError,
        "influence each other",
    ),
    "positions that no sample owns": (
        lambda m, x: F.linear(F.linear(x[:3].reshape(5, 3), m.w)[:4], m.head),
        {"w": (3, 3), "head": (3, 3)},
        CurvatureError,
        "w is used by Mm on a first axis of 5, which is no multiple of the batch's 4 samples",
    ),
    "a layer norm over the batch": (
        lambda m, x: F.linear(F.layer_norm(x, x.shape, m.gamma), m.head),
        {"gamma": (4, 5), "head": (3, 5)},
        CurvatureError,
        "gamma .*the batch among them",
    ),
    "a batch norm in training": (
        lambda m, x: F.batch_norm(F.linear(x, m.w), None, None, training=True),
        {"w": (3, 5)},
        CurvatureError,
        "statistics of its own input",
    ),
    "an instance norm": (
        lambda m, x: F.instance_norm(F.linear(x, m.w)[:, None]).flatten(1),
        {"w": (3, 5)},
        CurvatureError,
        "InstanceNorm",
    ),
    "reentrant checkpoints": (reentrant, {"table": (4, 5), "head": (3, 4)}, CurvatureError, "use_reentrant=False"),
    "addmm with a factor": (
        lambda m, x: torch.addmm(m.b, x, m.w, alpha=2.0),
        {"b": (3,), "w": (5, 3)},
        CurvatureError,
        "addmm with alpha=2",
    ),
    "addition with a factor": (
        lambda m, x: torch.add(F.linear(x, m.w), m.b, alpha=2),
        {"b": (3,), "w": (3, 5)},
        CurvatureError,
        "b .* alpha=2",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_what_cannot_be_measured_is_named_and_nothing_changed(case):
    function, shapes, error, message = BAD_MODELS[case]
    model = Functional(function, **{name: torch.randn(shape) for name, shape in shapes.items()})
    model.norm = nn.BatchNorm1d(3)
    x = torch.randn(4, 5)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        hessian_trace(model, x)
    assert_undisturbed(model, before)


def test_layout_is_checked_on_the_first_batch_that_can_show_it():
    sequence_first = Functional(
        lambda m, x: F.linear(F.linear(x[:, :, None].transpose(0, 1), m.w), m.head).mean(0),
        w=rand(3, 1),
        head=rand(3, 3),
    )
    with pytest.raises(CurvatureError, match="first axis"):
        hessian_trace(sequence_first, [rand(1, 5), rand(4, 5)])
    assert hessian_trace(sequence_first, rand(1, 5)).samples == 1


def test_non_finite_weights_are_refused():
    model = small_mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    with pytest.raises(DataError, match="logits of batch 0 are not finite"):
        hessian_trace(model, torch.randn(4, 5))


def test_a_trace_that_overflows_is_refused():
    model = small_mlp().float()
    with torch.no_grad():
        model[0].weight.mul_(1e-30)
        model[0].bias.zero_()
        model[2].weight.mul_(1e30)
    with pytest.raises(CurvatureError, match=r"0\.weight.* is not finite.*float64"):
        hessian_trace(model, torch.randn(4, 5).float())


def test_a_model_without_trainable_parameters_is_refused():
    model = small_mlp().requires_grad_(False)
    with pytest.raises(CurvatureError, match="Sequential has no parameter with requires_grad=True"):
        hessian_trace(model, torch.randn(4, 5))


def test_wrong_options_are_refused():
    model, x = small_mlp(), torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"columns must be >= 0 or None, got -1"):
        hessian_trace(model, x, columns=-1)
    with pytest.raises(UnsupportedError, match="loss='mse'"):
        hessian_trace(model, x, loss="mse")
    with pytest.raises(ValueError, match="statistics must be 'running', 'batch' or 'training', got 'fresh'"):
        hessian_trace(model, x, statistics="fresh")
