"""What cannot be measured is refused by the name of the object and the next move, and nothing is changed."""

import math

import pytest
import torch
from curvature.agreement import assert_same
from curvature.random_networks import small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ms_optim.curvature import hessian_trace
from ms_optim.errors import CurvatureError, DataError, UnsupportedError
from ms_optim.reference import curvature as oracle


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
    "a parameter along the batch": (
        lambda m, x: F.linear(x + m.rows, m.head),
        {"rows": (4, 5), "head": (3, 5)},
        CurvatureError,
        r"parameter rows \(4, 5\) is used by Add \(input 1\)",
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
        r"parameter w \(3, 3\) is used by T .*no curvature rule covers it",
    ),
    "a layer norm over the batch": (
        lambda m, x: F.linear(F.layer_norm(x, x.shape, m.gamma), m.head),
        {"gamma": (4, 5), "head": (3, 5)},
        CurvatureError,
        r"parameter gamma \(4, 5\) is used by NativeLayerNorm",
    ),
    "a batch norm in training": (
        lambda m, x: F.batch_norm(F.linear(x, m.w), None, None, training=True),
        {"w": (3, 5)},
        CurvatureError,
        "differentiates through the statistics of a batch",
    ),
    "reentrant checkpoints": (reentrant, {"table": (4, 5), "head": (3, 4)}, CurvatureError, "use_reentrant=False"),
    "addmm with a factor": (
        lambda m, x: torch.addmm(m.b, x, m.w, alpha=2.0),
        {"b": (3,), "w": (5, 3)},
        CurvatureError,
        r"parameter b \(3,\) is used by Addmm \(input 0\)",
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
        hessian_trace(model, x, generic=False)
    assert_undisturbed(model, before)


# What cannot be measured without a rule can neither be split into samples, which the generic path would have to do.
UNSPLITTABLE = {
    "a parameter along the batch": ("rows", r"returned 4 rows of logits for inputs of 1 rows"),
    "samples that attend to each other": ("w", "fails on 1 of 4 rows"),
    "positions that no sample owns": ("w", "fails on 1 of 4 rows"),
    "a layer norm over the batch": ("gamma", "fails on 1 of 4 rows"),
}


@pytest.mark.parametrize("case", UNSPLITTABLE)
def test_what_has_no_rule_and_cannot_be_split_is_named_with_the_generic_path_too(case):
    function, shapes, *_ = BAD_MODELS[case]
    name, message = UNSPLITTABLE[case]
    model, x = Functional(function, **{name: torch.randn(shape) for name, shape in shapes.items()}), torch.randn(4, 5)
    before = snapshot(model)
    with pytest.raises(CurvatureError, match=f"Functional {message}.*generic path needs it for {name}") as caught:
        hessian_trace(model, x)
    assert (caught.value.__cause__ is not None) == message.startswith("fails")
    assert_undisturbed(model, before)


def fold(m, x):
    return F.linear(F.relu(F.linear(x.view(len(x), -1, 1).transpose(0, 1), m.w)), m.head).mean(0)


MEASURED = {
    "a sequence first": (fold, {"w": (3, 1), "head": (3, 3)}),
    "one position of a sequence first": (
        lambda m, x: F.linear(F.linear(x.view(len(x), -1, 1).transpose(0, 1)[:2], m.w)[0], m.head),
        {"w": (3, 1), "head": (3, 3)},
    ),
    "an instance norm": (lambda m, x: F.instance_norm(F.linear(x, m.w)[:, None]).flatten(1), {"w": (3, 5)}),
    "addmm with a factor": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2.0), {"b": (3,), "w": (5, 3)}),
}


@pytest.mark.parametrize("case", MEASURED)
def test_what_looks_odd_and_is_no_reason_to_refuse_is_measured(case):
    function, shapes = MEASURED[case]
    model, x = Functional(function, **{name: torch.randn(shape) for name, shape in shapes.items()}), torch.randn(4, 5)
    expected = oracle.gauss_newton_traces(model, x)
    assert_same(hessian_trace(model, x), expected)
    # Where the samples are is found in the first batch that can show it, and known from then on.
    for sizes in ([1, 3], [3, 1], [2, 2]):
        assert_same(hessian_trace(model, list(x.split(sizes))), expected)


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
    with pytest.raises(ValueError, match=r"columns must be >= 0, 'rank' or None, got -1"):
        hessian_trace(model, x, columns=-1)
    with pytest.raises(UnsupportedError, match="hinge"):
        hessian_trace(model, x, loss="hinge")
    wrong = ({"probes": 0}, {"tolerance": 0.0}, {"tolerance": math.inf}, {"tolerance": math.nan}, {"max_memory": 0})
    for options in (*wrong, {"columns": "all"}, {"columns": 2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            hessian_trace(model, x, **options)
    with pytest.raises(ValueError, match="leaves none to add"):
        hessian_trace(model, x, columns="rank", tolerance=0.1)
    with pytest.raises(ValueError, match="statistics must be 'running', 'batch' or 'training', got 'fresh'"):
        hessian_trace(model, x, statistics="fresh")
