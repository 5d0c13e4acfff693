"""Loops on two ranks, sick and healthy: python ranks.py FOLDER under torchrun.

Each is a function of the rank and returns what ``doctor`` is called with; what it finds on either rank is saved.
"""

from __future__ import annotations

import contextlib
import datetime
import sys

import torch
from checkup.loops import Loop
from checkup.optimizers import TwoStepSAM
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ms_optim


def network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def batch(rank):
    stream = torch.Generator().manual_seed(rank)
    return torch.randn(8, 6, generator=stream), torch.randint(0, 4, (8,), generator=stream)


def ours(rank, m="global", data=None, first_by=lambda model: model, wrapped=True):
    """Our SAM by explicit passes."""
    model = DistributedDataParallel(network())
    optimizer = ms_optim.SAM(model if wrapped else model.module, rho=0.1, lr=0.1, m=m)
    x, y = batch(rank if data is None else data)

    def step():
        for gradient_pass in optimizer.passes():
            call = first_by(model) if gradient_pass.first else model
            with gradient_pass:
                cross_entropy(call(x), y).backward()
        optimizer.step()

    return Loop(model, optimizer, step)


def two_step(rank, forward=contextlib.nullcontext, backward=contextlib.nullcontext, call=lambda model: model):
    """A two-step SAM; around the first forward and the first backward pass there may be something."""
    model = DistributedDataParallel(network())
    optimizer = TwoStepSAM(model.parameters(), lr=0.1)
    x, y = batch(rank)

    def step():
        optimizer.zero_grad()
        buffers = [b.clone() for b in model.buffers()]
        with forward(model) if forward is not contextlib.nullcontext else forward():
            loss = cross_entropy(call(model)(x), y)
            with backward(model) if backward is not contextlib.nullcontext else backward():
                loss.backward()
        optimizer.first_step()
        optimizer.zero_grad()
        cross_entropy(call(model)(x), y).backward()
        for b, kept in zip(model.buffers(), buffers, strict=True):
            b.copy_(kept)
        optimizer.second_step()

    return Loop(model, optimizer, step)


def no_sync(model):
    return model.no_sync()


def inside(model):
    return model.module


def single(rank, seed=1, data=0, call=lambda model, x: model(x), steps=True, raises=False, kind=torch.optim.SGD, **how):
    """An ordinary loop, and no wrapper."""
    model = network(seed)
    optimizer = kind(model.parameters(), lr=0.1, **how)
    x, y = batch(data)

    def step():
        if raises:
            raise RuntimeError("planted")
        optimizer.zero_grad()
        cross_entropy(call(model, x), y).backward()
        if steps:
            optimizer.step()

    return Loop(model, optimizer, step)


# Title → the loop, and the rules that find a problem in it, on each rank.
LOOPS = {
    "ours, one perturbation for all": (ours, [set(), set()]),
    "ours, a perturbation for each": (lambda rank: ours(rank, m="local"), [set(), set()]),
    "ours, a number of samples": (lambda rank: numbered(rank), [set(), set()]),
    "two steps": (two_step, [set(), set()]),
    "two steps, the first unsynchronised": (lambda rank: two_step(rank, forward=no_sync), [set(), set()]),
    "two steps, unsynchronised too late": (
        lambda rank: two_step(rank, backward=no_sync),
        [{"no_sync_too_late"}, {"no_sync_too_late"}],
    ),
    "the module inside": (
        lambda rank: two_step(rank, call=inside),
        [{"gradients_apart"}, {"gradients_apart"}],
    ),
    "one loop on all ranks": (single, [set(), set()]),
    "different weights": (lambda rank: single(rank, seed=rank), [{"ranks_start_apart"}, {"ranks_start_apart"}]),
    "different data and no wrapper": (
        lambda rank: single(rank, data=rank),
        [{"gradients_apart"}, {"gradients_apart"}],
    ),
    "alone by choice": (
        lambda rank: single(
            rank, data=rank, kind=ms_optim.SAM, rho=0.1, ascent="momentum", momentum=0.9, process_group=None
        ),
        [set(), set()],
    ),
    "one rank does not step": (
        lambda rank: single(rank, steps=rank == 0),
        [{"gradients_apart"}, {"gradients_apart", "not_stepped"}],
    ),
    "one rank fails": (lambda rank: single(rank, raises=rank == 1), [set(), {"step_raised"}]),
    "local, and everywhere the same data": (
        lambda rank: ours(rank, m="local", data=0),
        [{"perturbations_apart"}, {"perturbations_apart"}],
    ),
    "global, and the first pass past the wrapper": (
        lambda rank: ours(rank, first_by=inside),
        [{"perturbations_apart"}, {"perturbations_apart"}],
    ),
    "local, and the optimizer does not know the wrapper": (
        lambda rank: ours(rank, m="local", wrapped=False),
        [{"step_raised"}, {"step_raised"}],
    ),
}


def numbered(rank):
    """Our SAM with perturbations of their own for four samples each."""
    loop = ours(rank, m=4)
    model, optimizer = loop.model, loop.optimizer
    x, y = batch(rank)

    def step():
        for gradient_pass in optimizer.passes(samples=len(x)):
            with gradient_pass:
                part = gradient_pass.samples
                cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()

    return Loop(model, optimizer, step)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    found = {}
    for title, (build, _) in LOOPS.items():
        loop = build(rank)
        before = [t.detach().clone() for t in loop.model.state_dict().values()]
        diagnosis = loop.examined()
        after = list(loop.model.state_dict().values())
        found[title] = {
            "problems": [finding.name for finding in diagnosis.problems],
            "restored": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "report": str(diagnosis),
        }
    torch.save(found, f"{folder}/found{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
