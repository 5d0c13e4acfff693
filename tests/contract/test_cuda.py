"""The contract on a CUDA device: the same forms, precision, streams and weights as on the CPU."""

import pytest
import torch
from cases import CASES, Case, by_passes, convnet, everything, known_group, mlp, same, samples
from contract.faults import WithLoss
from torch.nn.functional import cross_entropy

every_case = pytest.mark.parametrize("case", CASES, ids=str)
pytestmark = pytest.mark.cuda


def build(case, network, dtype=torch.float64, device="cuda", **options):
    torch.manual_seed(0)
    model = network()
    group = known_group(model) if case.rebalances else None
    model = model.to(device, dtype)
    return model, case.build(model, group=group, **options)


def on(batches, dtype=torch.float64, device="cuda"):
    return [(x.to(device, dtype), y.to(device)) for x, y in batches]


@every_case
@pytest.mark.parametrize("network", [mlp, convnet])
def test_closures_and_passes_give_the_same_numbers(case: Case, network):
    model, by_closure = build(case, network)
    other, explicit = build(case, network)
    batches = on(samples(network(), 5))
    torch.manual_seed(1)
    for x, y in batches:

        def closure(x=x, y=y):
            by_closure.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        by_closure.step(closure)
    torch.manual_seed(1)
    by_passes(other, explicit, batches)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", [c for c in CASES if "noise" not in c.name and "trace" not in c.name], ids=str)
def test_it_trains_as_on_the_cpu(case: Case):
    """(Noise and signs are drawn by other generators there.)"""
    results = []
    for device in ("cpu", "cuda"):
        model, optimizer = build(case, mlp, device=device, columns=None)
        by_passes(model, optimizer, on(samples(mlp(), 5), device=device))
        results.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler(case: Case, dtype):
    model, optimizer = build(case, convnet, torch.float32)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    before = [p.detach().clone() for p in model.parameters()]
    around = lambda: torch.autocast("cuda", dtype=dtype)  # noqa: E731
    by_passes(model, optimizer, on(samples(convnet(), 8), torch.float32), inside=around, scaler=scaler)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not same(before, list(model.parameters()))


@every_case
def test_weights_are_restored_bit_for_bit_and_stay_where_they_are(case: Case):
    model, optimizer = build(case, convnet, torch.float32, lr=0.0, momentum=0.0, refresh_every=1000)
    batches = on(samples(convnet(), 4), torch.float32)
    by_passes(model, optimizer, batches[:1])
    weights, places = [p.detach().clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    by_passes(model, optimizer, batches)
    assert same(weights, list(model.parameters()))
    assert places == [p.data_ptr() for p in model.parameters()]


@every_case
def test_all_passes_draw_the_same_masks_on_the_device(case: Case):
    model, optimizer = build(case, convnet, rebalance=None)
    (x, y), *_ = on(samples(convnet(), 1))
    states = []
    model[3].register_forward_pre_hook(lambda *_: states.append(torch.cuda.get_rng_state()))
    by_passes(model, optimizer, [(x, y)])
    assert all(torch.equal(states[0], state) for state in states)


@pytest.mark.parametrize("case", [c for c in CASES if c.passes == 2 and "noise" not in c.name], ids=str)
def test_a_module_that_returns_the_loss(case: Case):
    model, optimizer = build(case, mlp)
    module = optimizer.attach(WithLoss(model))
    other, explicit = build(case, mlp)
    batches = on(samples(mlp(), 4))
    for x, y in batches:
        optimizer.zero_grad()
        module(x, y).backward()
        optimizer.step()
    by_passes(other, explicit, batches)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@every_case
def test_no_wait_for_the_device_in_a_step(case: Case):
    """Between refreshes; the norm of the ascent is read when the pass has been queued behind it."""
    if "trace" in case.name:
        pytest.skip("the sum of the trace is looked at, too")
    model, optimizer = build(case, mlp, torch.float32, refresh_every=1000)
    batches = on(samples(mlp(), 4), torch.float32)
    by_passes(model, optimizer, batches[:2])
    torch.cuda.synchronize()
    waits = []
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            by_passes(model, optimizer, batches[2:3])
        waits = [w for w in found if "synchronizing" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waits


@every_case
def test_an_exception_leaves_everything_as_before(case: Case):
    model, optimizer = build(case, convnet)
    (x, y), *_ = on(samples(convnet(), 1))
    before, stream = everything(model, optimizer), torch.cuda.get_rng_state()

    def closure():
        model(x)
        raise torch.OutOfMemoryError("planted")

    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        optimizer.step(closure)
    assert same(before, everything(model, optimizer))
    assert torch.equal(stream, torch.cuda.get_rng_state())
