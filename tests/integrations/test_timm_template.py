"""timm's template for optimizers: what its own tests ask of every one of them."""

import copy
import io
import itertools

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from ms_optim.integrations.timm import OPTIMIZERS


class Affine(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return x @ self.weight.T + self.bias


CONSTRUCTORS = {
    "tensors": lambda w, b, name, **o: create_optimizer_v2([w, b], name, lr=1e-3, **o),
    "groups": lambda w, b, name, **o: create_optimizer_v2(
        [{"params": [w]}, {"params": [b], "lr": 1e-2}], name, lr=1e-3, **o
    ),
    "one group": lambda w, b, name, **o: create_optimizer_v2([{"params": b, "lr": 1e-2}], name, lr=1e-3, **o),
    "own rate": lambda w, b, name, **o: create_optimizer_v2([{"params": b, "lr": 1e-2}], name, **o),
    "decay": lambda w, b, name, **o: create_optimizer_v2([w, b], name, lr=1e-3, weight_decay=0.1, **o),
}


def functional(name):
    """Parameters of no module: no names, no representative, no trace."""
    return {
        "mssam": {"rebalance": None},
        "mssamadamw": {"rebalance": None},
        "msreg": {"rebalance": None, "gradient": "noise"},
        "msoptimasam": {"operator": "elementwise"},
        "msoptimasamadamw": {"operator": "elementwise"},
    }.get(name, {})


def problem(how, x):
    """A loss and its two parameters: by a module, whose weight and bias they are, or by functions."""

    def of(weight, bias):
        if how == "module":
            module = Affine(weight, bias)
            return module.weight, module.bias, lambda: module(x).square().sum()
        weight, bias = nn.Parameter(weight), nn.Parameter(bias)
        return weight, bias, lambda: (x @ weight.T + bias).square().sum()

    return of


def closure_of(optimizer, loss_of):
    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


# Until the first step is over, it waits for a model that could be found, after loading as well.
TEMPLATE = [
    pytest.param(name, how, options, id=f"{name}-{how}")
    for name in OPTIMIZERS
    if name != "msoptimsamon"  # which needs a normaliser
    for how, options in (
        ("functions", functional(name)),
        # Of one layer nothing can be balanced; MSReg's trace is that of a classifier, which this is not.
        *([("module", {"rebalance": None})] if name != "msreg" else []),
    )
]


@pytest.mark.filterwarnings("ignore:no module that owns all the parameters")
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize(("name", "how", "options"), TEMPLATE)
def test_the_template_holds(name, how, options, constructor, device):
    if how == "module" and "asam" in name and constructor in ("one group", "own rate"):
        constructor = "tensors"
    build = CONSTRUCTORS[constructor]
    x = torch.randn(3, 5)
    of = problem(how, x)

    # Steps by closure alone, with schedulers or without, contiguous parameters or not; it can be printed.
    for contiguous, schedule in itertools.product((True, False), (None, StepLR, ReduceLROnPlateau)):
        given = [each[..., 0] for each in (torch.randn(10, 5, 2), torch.randn(10, 2))]
        weight, bias, loss_of = of(*([each.contiguous() for each in given] if contiguous else given))
        assert weight.is_contiguous() is contiguous
        optimizer = build(weight, bias, name, **options)
        assert type(optimizer).__name__ in repr(optimizer)
        closure = closure_of(optimizer, loss_of)
        scheduler = None if schedule is None else schedule(optimizer, 10 if schedule is StepLR else "min")
        first = closure().item()
        for _ in range(20):
            assert isinstance(optimizer.step(closure), torch.Tensor)
            if scheduler is not None:
                scheduler.step(*(() if schedule is StepLR else (closure().item(),)))
        assert closure().item() < first

    # The same steps after loading; a state of another dtype and device is taken; a copy keeps its public attributes.
    weight, bias, loss_of = of(torch.randn(10, 5), torch.randn(10))
    optimizer = build(weight, bias, name, **options)
    closure = closure_of(optimizer, loss_of)
    for _ in range(20):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other_weight, other_bias, other_loss = of(weight.detach().clone(), bias.detach().clone())
    other = build(other_weight, other_bias, name, **options)
    kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other.load_state_dict(kept)
    assert_equal_states(kept, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    other_closure = closure_of(other, other_loss)
    for _ in range(20):
        optimizer.step(closure)
        other.step(other_closure)
        assert torch.equal(weight, other_weight) and torch.equal(bias, other_bias)
    assert_equal_states(optimizer.state_dict(), other.state_dict())

    x.data = x.data.to(device, torch.float32)
    single_weight, single_bias, single_loss = of(*(p.detach().to(x, copy=True) for p in (weight, bias)))
    single = build(single_weight, single_bias, name, **options)
    single.load_state_dict(optimizer.state_dict())
    moved = [v for s in single.state.values() for k, v in s.items() if k != "step" and v is not None]
    assert all((v.dtype, v.device) == (x.dtype, x.device) for v in moved)
    single.step(closure_of(single, single_loss))

    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public == {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")}


def assert_equal_states(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_states(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
