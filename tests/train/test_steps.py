"""Steps of the trainer are those of a plain loop, whatever the optimizer, the accumulation or the precision."""

import argparse

import pytest
import torch
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim import models
from ms_optim.errors import CommandLineError
from ms_optim.train.process import Process
from ms_optim.train.steps import Steps

HERE = Process(torch.device("cpu"))
OPTIONS = {"amp": False, "amp_dtype": "float16", "clip_grad": None, "clip_mode": "norm", "grad_accum_steps": 1}


def options(**more):
    return argparse.Namespace(**{**OPTIONS, **more})


def batches(count=4, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def network():
    torch.manual_seed(0)
    return models.digits_mlp()


MADE = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "SAM": lambda model: ms_optim.SAM(model, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9),
    "MSSAM": lambda model: ms_optim.MSSAM(model, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, refresh_every=2),
    "GSAM": lambda model: ms_optim.GSAM(model, torch.optim.SGD, rho=0.1, lr=0.1),
    "TiltedSAM": lambda model: ms_optim.TiltedSAM(model, torch.optim.SGD, rho=0.1, lr=0.1),
    "MSRegularizedSGD": lambda model: ms_optim.MSRegularizedSGD(model, strength=0.01, lr=0.1, refresh_every=2),
}


def by_closure(name, clip=None):
    """The slow twin: PyTorch's own way of making a step."""
    model = network()
    optimizer = MADE[name](model)
    losses = []
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(float(torch.as_tensor(optimizer.step(closure)).detach()))
    return list(model.parameters()), losses


@pytest.mark.parametrize("name", MADE)
def test_steps_are_those_of_a_closure(name):
    model = network()
    steps = Steps(model, MADE[name](model), torch.nn.CrossEntropyLoss(), options(), HERE)
    losses = [float(steps.take([batch])) for batch in batches()]
    expected, theirs = by_closure(name)
    for mine, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert losses == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("name", ["SGD", "SAM", "GSAM"])
def test_micro_batches_are_one_batch_for_every_pass(name):
    """SAM's perturbation is that of the whole window, not of its micro-batches."""
    found = []
    for parts in (1, 3):
        model = network()
        steps = Steps(model, MADE[name](model), torch.nn.CrossEntropyLoss(), options(grad_accum_steps=parts), HERE)
        losses = []
        for x, y in batches():
            size = len(x) // parts
            window = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
            losses.append(float(steps.take(window)))
        found.append((list(model.parameters()), losses))
    for mine, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


def test_clipping_acts_on_the_gradient_that_is_descended_along():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ms_optim.SAM(model, torch.optim.SGD, rho=0.5, lr=1.0)
    Steps(model, optimizer, torch.nn.CrossEntropyLoss(), options(clip_grad=0.01), HERE).take(batches(1)[0:1])
    moved = torch.stack([(p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)]).sum().sqrt()
    assert float(moved.detach()) == pytest.approx(0.01, rel=1e-4)


def test_adaptive_clipping_leaves_the_classifier_alone():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=10)
    head = {id(p) for p in model.get_classifier().parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = Steps(model, optimizer, torch.nn.CrossEntropyLoss(), options(clip_grad=0.01, clip_mode="agc"), HERE)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    steps.model(x).sum().backward()
    clipped = {id(p) for p in steps._clipped()}
    assert head and not head & clipped and clipped
    steps.take([(x, y)])


def test_a_number_of_samples_per_perturbation_needs_whole_batches():
    model = network()
    optimizer = ms_optim.SAM(model, torch.optim.SGD, rho=0.1, lr=0.1, m=4)
    with pytest.raises(CommandLineError, match="m=4 takes a perturbation for so many samples of one batch"):
        Steps(model, optimizer, torch.nn.CrossEntropyLoss(), options(grad_accum_steps=2), HERE)
    steps = Steps(model, optimizer, torch.nn.CrossEntropyLoss(), options(), HERE)
    other = network()
    twin = ms_optim.SAM(other, torch.optim.SGD, rho=0.1, lr=0.1, m=4)
    for x, y in batches(2):
        steps.take([(x, y)])
        for gradient_pass in twin.passes(samples=len(x)):
            with gradient_pass:
                cross_entropy(other(x[gradient_pass.samples]), y[gradient_pass.samples]).backward()
        twin.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["SGD", "SAM", "MSSAM"])
def test_mixed_precision_takes_nearly_the_same_steps(name, dtype):
    model = network().float()
    steps = Steps(model, MADE[name](model), torch.nn.CrossEntropyLoss(), options(amp=True, amp_dtype=dtype), HERE)
    if dtype == "float16":
        steps.scaler = torch.amp.GradScaler("cpu", init_scale=256)  # the usual one overflows, and steps are lost
    for x, y in batches():
        steps.take([(x.float(), y)])
    expected, _ = by_closure(name)
    assert (steps.scaler is not None) == (dtype == "float16")
    moved = [q - p for p, q in zip(network().parameters(), expected, strict=True)]
    for mine, other, move in zip(model.parameters(), expected, moved, strict=True):
        assert float((mine.detach() - other.detach()).norm()) < 0.1 * float(move.detach().norm()) + 1e-3
