"""A compiled model trains as the model itself does, whichever of the two the optimizer is given."""

import copy
import gc

import pytest
import torch
from cases import everything, same, samples, train
from contract.faults import WithLoss
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim

# What the compiler says of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
OPTIMIZERS = {
    "MSSAM": lambda model, group: ms_optim.MSSAM(model, lr=0.1, rho=0.1, refresh_every=2, group=group),
    "MSRegularizedSGD": lambda model, group: ms_optim.MSRegularizedSGD(
        model, lr=0.1, strength=1e-3, refresh_every=2, group=group
    ),
    "SAM[momentum]": lambda model, group: ms_optim.SAM(model, lr=0.1, rho=0.1, momentum=0.9, ascent="momentum"),
}


class Network(nn.Module):
    """Not a bare Sequential, which the compiler treats as a special case, but with one inside."""

    def __init__(self, bare=False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(8, 4)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(autouse=True)
def fresh():
    # An optimizer of another test that still looks for its model, and that a cycle (of a scheduler) keeps until Python
    # happens to collect it, has a hook on all modules, of which a compiled one warns.
    gc.collect()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def start():
    torch.manual_seed(0)
    model = Network()
    group = ms_optim.scale_symmetries(model, torch.randn(8, 6))
    batches = [(x, y) for x, y in samples(nn.Sequential(nn.Linear(6, 4)), 4)]
    return model, group, batches


def plainly(name):
    model, group, batches = start()
    optimizer = OPTIMIZERS[name](model, group)
    torch.manual_seed(1)
    list(train(model, optimizer, batches))
    return everything(model, optimizer)


HOW = ["compiled given", "model given", "in place", "compiled before"]
ROWS = [("MSSAM", how) for how in HOW] + [(name, "compiled given") for name in OPTIMIZERS if name != "MSSAM"]


@pytest.mark.parametrize(("name", "how"), ROWS)
def test_by_a_closure(name, how):
    model, group, batches = start()
    call = model
    if how == "compiled before":
        call = compiled(model)
        state = copy.deepcopy(model.state_dict())
        call(batches[0][0])
        model.load_state_dict(state)
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        call = compiled(model)
    optimizer = OPTIMIZERS[name](call if how == "compiled given" else model, group)
    torch.manual_seed(1)
    list(train(call, optimizer, batches))
    assert optimizer.model is model
    assert same(everything(model, optimizer), plainly(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_that_is_found_is_the_one_inside_and_torch_warns_of_the_search_once(name):
    model, group, batches = start()
    call = compiled(model)
    optimizer = OPTIMIZERS[name](call.parameters(), group)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="global hooks on modules"):
        list(train(call, optimizer, batches[:1]))
    list(train(call, optimizer, batches[1:]))  # where warnings are errors
    assert optimizer.model is model
    assert same(everything(model, optimizer), plainly(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_an_unmodified_loop(name):
    model, group, batches = start()
    optimizer = OPTIMIZERS[name](model, group)
    module = compiled(WithLoss(model))
    if name == "MSSAM":
        optimizer.attach(module)
    torch.manual_seed(1)
    for x, y in batches:
        optimizer.zero_grad()
        loss = module(x, y)
        loss.backward()
        optimizer.step()
    results = everything(model, optimizer)
    if name == "MSSAM":
        assert same(results, plainly(name))
    model, group, batches = start()
    optimizer = OPTIMIZERS[name](model, group)
    module = WithLoss(model)
    if name == "MSSAM":
        optimizer.attach(module)
    torch.manual_seed(1)
    for x, y in batches:
        optimizer.zero_grad()
        module(x, y).backward()
        optimizer.step()
    assert same(results, everything(model, optimizer))


def test_addresses_stay_so_that_graphs_hold():
    model, group, batches = start()
    optimizer = OPTIMIZERS["MSSAM"](model, group)
    places = [p.data_ptr() for p in model.parameters()]
    for x, y in batches:
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                cross_entropy(model(x), y).backward()
                assert places == [p.data_ptr() for p in model.parameters()]
        optimizer.step()
    assert places == [p.data_ptr() for p in model.parameters()]
