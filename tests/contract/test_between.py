"""What somebody else does between the refresh of a step and its end is theirs, and what fails there is undone."""

import warnings

import pytest
import torch
from cases import convnet, everything, known_group, mlp, same, samples
from contract.faults import WithLoss
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.errors import NonFiniteWarning, OptimizerError

NOISE = {"strength": 1e-3, "gradient": "noise"}
WINDOWS = [
    pytest.param(ms_optim.MSRegularizedSGD, NOISE, id="noise"),
    pytest.param(ms_optim.MSSAM, {"rho": 0.1, "ascent": "momentum"}, id="momentum"),
]


def build(kind, options, network=mlp, **further):
    torch.manual_seed(0)
    model = network()
    settings = {"lr": 0.0, "momentum": 0.9, "refresh_every": 1, "group": known_group(model), **options, **further}
    return model, kind(model, **settings)


def backward(model, x, y):
    cross_entropy(model(x), y).backward()


@pytest.mark.parametrize(("kind", "options"), WINDOWS)
@pytest.mark.parametrize("how", ["load", "clamp"])
def test_weights_that_are_set_inside_a_window_with_a_refresh_stay(kind, options, how):
    model, optimizer = build(kind, options)
    batches = samples(model, 3)
    backward(model, *batches[0])
    optimizer.step()  # makes a momentum
    best = {name: torch.full_like(value, 0.01) for name, value in model.state_dict().items()}
    backward(model, *batches[1])
    if how == "load":
        model.load_state_dict(best)
    else:
        model.eval()
        model(batches[1][0])
        model.train()
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.01, 0.01)
        best = {name: value.clone() for name, value in model.state_dict().items()}
    backward(model, *batches[2])
    optimizer.step()
    assert same(list(best.values()), list(model.state_dict().values()))


def test_a_refresh_by_hand_between_two_passes_is_kept():
    """The weights and the momentum stay those of one representative."""
    model, optimizer = build(ms_optim.MSSAM, {"rho": 0.1}, refresh_every=1000)
    batches = samples(model, 3)
    for _ in range(2):
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                backward(model, *batches[0])
        optimizer.step()
    optimizer.representative.due = 0
    passes = optimizer.passes()
    with next(passes):
        backward(model, *batches[1])
    optimizer.group.rescale_(model, torch.tensor([0.5, -0.3], dtype=torch.float64), optimizer)
    weights = [p.detach().clone() for p in model.parameters()]
    with next(passes):
        backward(model, *batches[1])
    assert same(weights, list(model.parameters()))


def test_an_embedding_with_a_largest_norm_trains_alike_with_and_without_a_refresh():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 6, max_norm=0.5)
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, words):
            return self.second(torch.relu(self.first(self.table(words).mean(1))))

    torch.manual_seed(0)
    model = Words()
    words, y = torch.randint(0, 20, (8, 3)), torch.randint(0, 4, (8,))
    group = ms_optim.scale_symmetries(model, words)
    optimizer = ms_optim.MSSAM(model, rho=0.1, lr=0.0, group=group, refresh_every=1)
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            backward(model, words, y)
    assert float(model.table.weight[words].detach().norm(dim=-1).max()) < 0.5 * (1 + 1e-5)


class Times(WithLoss):
    """A loss times a number."""

    factor = 1.0

    def forward(self, x, y):
        return self.factor * super().forward(x, y)


@pytest.mark.parametrize("network", [mlp, convnet])
@pytest.mark.parametrize("form", ["passes", "closure", "module", "momentum"])
def test_a_norm_on_the_device_that_is_not_finite_undoes_the_step_where_warnings_are_errors(network, form, monkeypatch):
    monkeypatch.setattr("ms_optim.optim.sam.stays_on_device", lambda tensors: True)
    options = {"rho": 0.1, **({"ascent": "momentum"} if form == "momentum" else {})}
    model, optimizer = build(ms_optim.MSSAM, options, network, lr=0.1)
    (x, y), *_ = samples(model, 1)

    def closure():
        optimizer.zero_grad()
        loss = factor * cross_entropy(model(x), y)
        loss.backward()
        return loss

    factor = 1.0
    module = optimizer.attach(Times(model)) if form == "module" else None
    if form == "module":
        module(x, y).backward()
        optimizer.step()
    else:
        optimizer.step(closure)
    if form == "momentum":
        for state in optimizer.state.values():
            state["momentum_buffer"].fill_(float("nan"))
    before, streams = everything(model, optimizer), torch.get_rng_state()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NonFiniteWarning)
        with pytest.raises(NonFiniteWarning):
            if form == "module":
                module.factor = float("nan")
                module(x, y).backward()
                optimizer.step()
            elif form == "momentum":
                backward(model, x, y)
                optimizer.step()
            elif form == "passes":
                for gradient_pass in optimizer.passes():
                    with gradient_pass:
                        (float("nan") * cross_entropy(model(x), y)).backward()
            else:
                factor = float("nan")
                optimizer.step(closure)
    optimizer.zero_grad()
    after = everything(model, optimizer)
    grads_aside = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    nan_alike = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in grads_aside)
    assert nan_alike and torch.equal(streams, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_digits_on_the_device(dtype):
    from ms_optim.optim.perturbation import add_scaled

    torch.manual_seed(0)
    directions = [(1e-6 * torch.randn(64)).to(dtype), (1e-6 * torch.randn(32)).to(dtype)]
    weights = [torch.zeros_like(d) for d in directions]
    norm = torch.cat([d.double() for d in directions]).norm()
    factors = [0.05, 0.0003]
    add_scaled(weights, directions, factors, 1.0 / norm)
    for w, d, f in zip(weights, directions, factors, strict=True):
        torch.testing.assert_close(w, (f * d.double() / norm).to(dtype), rtol=2**-7, atol=0.0 if dtype ==
        torch.bfloat16 else 6e-8)


def test_parameters_added_inside_an_interrupted_window_begin_the_step_anew():
    torch.manual_seed(0)
    model = mlp()
    optimizer = ms_optim.MSRegularizedSGD(list(model[:3].parameters()), model=model, lr=0.1, rebalance=None, **NOISE)
    batches = samples(model, 3)
    backward(model, *batches[0])
    model.eval()
    model(batches[0][0])
    model.train()
    optimizer.add_param_group({"params": list(model[4].parameters())})
    before = model[4].weight.detach().clone()
    backward(model, *batches[1])
    optimizer.step()
    assert not torch.equal(before, model[4].weight)


def test_a_step_inside_a_closure_is_refused_and_nothing_is_lost():
    model, optimizer = build(ms_optim.MSSAM, {"rho": 0.1}, convnet, lr=0.1)
    module = optimizer.attach(WithLoss(model))
    (x, y), *_ = samples(model, 1)
    before = everything(model, optimizer)

    def closure():
        loss = module(x, y)
        loss.backward()
        optimizer.step()
        return loss

    with pytest.raises(OptimizerError, match="inside the closure that another step"):
        optimizer.step(closure)
    optimizer.zero_grad()
    after = everything(model, optimizer)
    assert same([t for t in before if t is not None], [t for t in after if t is not None])
