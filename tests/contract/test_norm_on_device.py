"""The norm that the host does not wait for: the path of GPUs, taken on the CPU."""

import pytest
import torch
from cases import CASES, Case, by_passes, convnet, everything, mlp, same, samples
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import ms_optim
from ms_optim.errors import NonFiniteWarning
from ms_optim.optim.perturbation import add_scaled

SAMS = [case for case in CASES if case.kind in (ms_optim.SAM, ms_optim.ASAM, ms_optim.MSSAM)]
every_sam = pytest.mark.parametrize("case", SAMS, ids=str)


@pytest.fixture
def on_device(monkeypatch):
    monkeypatch.setattr("ms_optim.optim.sam.stays_on_device", lambda tensors: True)


class Waits(TorchDispatchMode):
    """Counts where the host reads a number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def build(case, network, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = network().to(dtype)
    return model, case.build(model, **options)


def doubled(batches):
    return [(x.double(), y) for x, y in batches]


@every_sam
@pytest.mark.parametrize("network", [mlp, convnet])
def test_it_trains_as_with_the_norm_on_the_host(case: Case, network, monkeypatch):
    results = []
    for forced in (False, True):
        with monkeypatch.context() as patched:
            if forced:
                patched.setattr("ms_optim.optim.sam.stays_on_device", lambda tensors: True)
            model, optimizer = build(case, network)
            torch.manual_seed(1)
            by_passes(model, optimizer, doubled(samples(network(), 6)))
            results.append(list(model.state_dict().values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every_sam
def test_the_host_reads_the_norm_after_the_last_pass_only(case: Case, on_device):
    model, optimizer = build(case, mlp, refresh_every=1000)
    batches = doubled(samples(mlp(), 3))
    by_passes(model, optimizer, batches[:2])
    x, y = batches[2]
    passes = list(range(case.passes))
    with Waits() as waits:
        for number, gradient_pass in zip(passes, optimizer.passes(), strict=False):
            with gradient_pass:
                cross_entropy(model(x), y).backward()
                assert waits.count == 0
            assert waits.count == (number == passes[-1])


@pytest.mark.parametrize("case", [case for case in SAMS if case.passes == 2], ids=str)
def test_a_gradient_that_is_not_finite_perturbs_nothing_and_is_told(case: Case, on_device):
    model, optimizer = build(case, convnet, refresh_every=1000, buffers="last", rebalance=None)
    (x, y), *_ = doubled(samples(convnet(), 1))
    weights = [p.detach().clone() for p in model.parameters()]
    passes = optimizer.passes()
    with next(passes):
        cross_entropy(model(x), y).backward()
        model[5].weight.grad[0, 0] = float("nan")
        model[0].weight.grad[0, 0, 0, 0] = float("inf")
    second = next(passes)
    with pytest.warns(NonFiniteWarning, match="without a perturbation"), second:
        assert same(weights, list(model.parameters()))
        cross_entropy(model(x), y).backward()
    assert next(passes, None) is None
    assert all(bool(b.isfinite().all()) for b in model.buffers() if b.is_floating_point())


def test_a_zero_gradient_perturbs_nothing_quietly(on_device, recwarn):
    model = mlp().double()
    optimizer = ms_optim.SAM(model, rho=0.1, lr=0.1)
    x = torch.randn(8, 6, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            assert same(before, list(model.parameters()))
            (0.0 * model(x).sum()).backward()
    optimizer.step()
    assert same(before, list(model.parameters()))
    assert not recwarn.list


def test_an_exception_in_the_second_pass_restores_everything(on_device):
    model, optimizer = build(CASES[5], convnet)
    batches = doubled(samples(convnet(), 2))
    by_passes(model, optimizer, batches[:1])
    before = everything(model, optimizer)
    passes = optimizer.passes()
    with next(passes):
        cross_entropy(model(batches[1][0]), batches[1][1]).backward()
    with pytest.raises(RuntimeError, match="planted"), next(passes):
        raise RuntimeError("planted")
    optimizer.zero_grad()
    after = everything(model, optimizer)
    assert same([t for t in before if t is not None], [t for t in after if t is not None])


@pytest.mark.parametrize("portion", [1, 2**26])
@pytest.mark.parametrize("factors", [[2.0, 2.0, 2.0, 2.0], [2.0, 0.0, 0.25, 3.0]])
def test_added_entry_by_entry_whatever_the_types(factors, portion, monkeypatch):
    monkeypatch.setattr("ms_optim.optim.perturbation._PORTION_BYTES", portion)
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 1, 3), ()]
    tensors = [torch.randn(s, dtype=torch.float64).to(k) for s, k in zip(shapes, kinds, strict=True)]
    directions = [torch.randn(s, dtype=torch.float64).to(k) for s, k in zip(shapes, kinds, strict=True)]
    directions[0] = directions[0].t().contiguous().t()
    expected = [t + 0.5 * f * d for t, d, f in zip(tensors, directions, factors, strict=True)]
    add_scaled(tensors, directions, factors, torch.tensor(0.5))  # powers of two: no rounding of its own
    for a, b in zip(tensors, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype is torch.bfloat16 else 1e-6, atol=1e-7)


def test_diagnostics_are_the_same(on_device):
    model = nn.Linear(6, 4)
    optimizer = ms_optim.SAM(model, rho=0.1, lr=0.1, diagnose=True)
    x, y = samples(mlp(), 1)[0]
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            cross_entropy(model(x), y).backward()
    optimizer.step()
    total = sum(norm**2 for norm in optimizer.diagnostics.perturbation.values()) ** 0.5
    assert total == pytest.approx(0.1, rel=1e-5)
