"""A run that was saved, loaded and went on is bitwise the uninterrupted one, whatever its base, precision and loop."""

import contextlib
import copy
import io

import pytest
import torch
from cases import CASES, EVERY, Case, by_passes, convnet, descend, everything, mlp, same, samples
from contract.faults import WithLoss
from torch.nn.functional import cross_entropy

import ms_optim

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
}
wrapping = [case for case in EVERY if case.kind is not ms_optim.MSRegularizedSGD]
PRECISIONS = {
    "float64": (torch.float64, None, False),
    "bfloat16": (torch.float32, torch.bfloat16, False),
    "float16 and a scaler": (torch.float32, torch.float16, True),
}


def build(case, base, dtype, form):
    model = convnet().to(dtype) if form != "loop" else mlp().to(dtype)
    options = {}
    if base is not None:
        kind, settings = BASES[base]
        options = {"base": kind, **settings}
        if kind is not torch.optim.SGD:
            options["momentum"] = None
    optimizer = _build(case, model, options)
    module = optimizer.attach(WithLoss(model)) if form == "loss module" else None
    return model, optimizer, module


def _build(case, model, options):
    """`Case.build`, for a base that has no momentum."""
    from cases import known_group

    settings = {"lr": 0.05, "momentum": 0.9, "refresh_every": 3, **case.options, **options}
    if settings["momentum"] is None:
        del settings["momentum"]
    if case.rebalances:
        settings["group"] = known_group(model)
    return case.kind(model, **settings)


def run(model, optimizer, module, batches, form, autocast, scaler):
    around = contextlib.nullcontext if autocast is None else lambda: torch.autocast("cpu", dtype=autocast)
    dtype = next(model.parameters()).dtype
    batches = [(x.to(dtype), y) for x, y in batches]
    if form == "passes":
        by_passes(model, optimizer, batches, inside=around, scaler=scaler)
        return
    for x, y in batches:
        optimizer.zero_grad()
        with around():
            loss = cross_entropy(model(x), y) if module is None else module(x, y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        descend(optimizer, scaler)


def interrupted_and_not(case, base, precision, form, stop):
    dtype, autocast, scaled = PRECISIONS[precision]

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if scaled else None

    model, optimizer, module = build(case, base, dtype, form)
    its = scaler()
    batches = samples(model, 7)
    torch.manual_seed(2)
    run(model, optimizer, module, batches[:stop], form, autocast, its)
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save({**state, "scaler": None if its is None else its.state_dict()}, file)
    run(model, optimizer, module, batches[stop:], form, autocast, its)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    again, resumed, its_module = build(case, base, dtype, form)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    other = scaler()
    if other is not None:
        other.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])
    run(again, resumed, its_module, batches[stop:], form, autocast, other)
    return everything(model, optimizer), everything(again, resumed)


@pytest.mark.parametrize("case", wrapping, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_explicit_passes(case: Case, base, precision):
    if case.options.get("ascent") == "momentum" and base == "SGD":
        pytest.skip("needs a momentum")
    assert same(*interrupted_and_not(case, base, precision, "passes", 2))


@pytest.mark.parametrize("case", [case for case in CASES if case.kind is ms_optim.MSRegularizedSGD], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stop", [2, 3])
def test_the_regulariser(case: Case, precision, stop):
    assert same(*interrupted_and_not(case, None, precision, "passes", stop))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_unmodified_loops(case: Case, precision):
    if "antithetic" in case.name:
        pytest.skip("needs two passes to descend along")
    form = "loop" if case.passes == 1 else "loss module"
    assert same(*interrupted_and_not(case, None, precision, form, 3))


@pytest.mark.parametrize("kind", [ms_optim.SAM, ms_optim.ASAM, ms_optim.MSSAM])
@pytest.mark.parametrize("base", BASES)
def test_the_previous_gradient_is_kept_and_moves_with_the_weights(kind, base):
    case = Case("previous", kind, 1, {"rho": 0.0}, {"rho": 0.1, "ascent": "previous"})
    assert same(*interrupted_and_not(case, base, "float64", "loop", 3))
    assert same(*interrupted_and_not(case, base, "float64", "passes", 2))


def test_the_ascent_along_the_previous_gradient_is_what_it_says():
    torch.manual_seed(0)
    model = mlp()
    twin = copy.deepcopy(model)
    rho, lr = 0.3, 0.05
    optimizer = ms_optim.SAM(model, torch.optim.SGD, rho=rho, ascent="previous", lr=lr)
    before = None
    for x, y in samples(model, 5):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        shifted = copy.deepcopy(twin)
        if before is not None:
            norm = torch.sqrt(sum(g.square().sum() for g in before))
            with torch.no_grad():
                for p, g in zip(shifted.parameters(), before, strict=True):
                    p += rho * g / norm
        before = torch.autograd.grad(cross_entropy(shifted(x), y), list(shifted.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), before, strict=True):
                p -= lr * g
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_a_previous_gradient_does_not_depend_on_how_the_network_is_scaled():
    results = []
    for factor in (1.0, 7.0):
        torch.manual_seed(0)
        model = mlp()
        with torch.no_grad():
            model[0].weight.mul_(factor), model[0].bias.mul_(factor), model[2].weight.div_(factor)
        optimizer = ms_optim.MSSAM(
            model, torch.optim.SGD, rho=0.3, ascent="previous", refresh_every=2, columns=None, lr=0.05, momentum=0.9
        )
        batches = samples(model, 6)
        run(model, optimizer, None, batches, "loop", None, None)
        results.append(model(batches[0][0]).detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)
