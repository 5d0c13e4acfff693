"""Runs on two ranks, and the one process that each has to agree with: python scenarios.py FOLDER under torchrun.

A scenario is a function of the rank; it returns tensors.  The parent (test_ranks.py) makes the same on one process.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import sys
import warnings
from pathlib import Path

import torch
from distributed.torchrun import WORLD
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ms_optim

STEPS = 4
GRADIENT = {
    "SAM": (ms_optim.SAM, {"rho": 0.1}),
    "ASAM": (ms_optim.ASAM, {"rho": 0.5}),
    "MSSAM[move]": (ms_optim.MSSAM, {"rho": 0.1, "refresh_every": 2, "columns": None}),
    "MSSAM[metric]": (ms_optim.MSSAM, {"rho": 0.1, "refresh_every": 2, "columns": None, "rebalance": "metric"}),
}
ONE_PASS = {
    "SAM[momentum]": (ms_optim.SAM, {"rho": 0.1, "ascent": "momentum"}),
    "MSSAM[previous]": (ms_optim.MSSAM, {"rho": 0.1, "ascent": "previous", "refresh_every": 2, "columns": None}),
}
LITERATURE = {
    "GSAM": (ms_optim.GSAM, {"rho": 0.1}),
    "SAGM": (ms_optim.SAGM, {"rho": 0.1}),
    "LookSAM": (ms_optim.LookSAM, {"rho": 0.1, "k": 2}),
    "FriendlySAM": (ms_optim.FriendlySAM, {"rho": 0.1}),
    "RSAM": (ms_optim.RSAM, {"rho": 0.05}),
    "WEISSI": (ms_optim.WEISSI, {"strength": 0.01, "sparsity": 0.01}),
}
RANDOM = {
    "MSReg[noise]": (ms_optim.MSRegularizedSGD, {"strength": 1e-4, "gradient": "noise", "refresh_every": 2}),
    "MSReg[antithetic]": (ms_optim.MSRegularizedSGD, {"strength": 1e-4, "gradient": "antithetic", "refresh_every": 2}),
    "MSReg[trace]": (ms_optim.MSRegularizedSGD, {"strength": 1e-2, "refresh_every": 2}),
    "MSSAM[two columns]": (ms_optim.MSSAM, {"rho": 0.1, "refresh_every": 2}),
}
NOISY = {
    "TiltedSAM": (ms_optim.TiltedSAM, {"samples": 2}),
    "FrobSAM": (ms_optim.FrobSAM, {"rho": 0.05, "strength": 0.1}),
    "RandomPerturbation": (ms_optim.RandomPerturbation, {}),
}
KINDS = {**GRADIENT, **ONE_PASS, **LITERATURE, **RANDOM, **NOISY}


def network(normalised=False):
    """The same weights in every process."""
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(8)] if normalised else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4))


def batches(rank, steps=STEPS, size=16):
    """The batches of a rank: a half of each; of both for ``None``."""
    stream = torch.Generator().manual_seed(2)
    found = []
    for _ in range(steps):
        x, y = torch.randn(size, 6, generator=stream), torch.randint(0, 4, (size,), generator=stream)
        part = slice(None) if rank is None else slice(rank * size // WORLD, (rank + 1) * size // WORLD)
        found.append((x[part], y[part]))
    return found


@functools.cache
def known_group(normalised=False):
    """Discovered once for most of the scenarios; some discover it themselves."""
    return ms_optim.scale_symmetries(network(normalised), batches(None)[0])


def build(name, model, **options):
    kind, own = KINDS[name]
    group = known_group() if kind in (ms_optim.MSSAM, ms_optim.MSRegularizedSGD) else None
    return kind(model, **{"lr": 0.05, "momentum": 0.9, "group": group, **own, **options})


def weights(model) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return cross_entropy(self.model(x), y)


def refresh(optimizer, x):
    """By hand, on all samples of the step: of itself it would take the first micro-batch, which is not the same."""
    if optimizer.refresh_due and getattr(optimizer, "refreshed_by_hand", False):
        optimizer.refresh(x)


def by_passes(optimizer, call, data, parts=1, no_sync=contextlib.nullcontext, samples=False, clip=None):
    """Explicit passes, with accumulation over parts, or slices of m samples."""
    for x, y in data:
        refresh(optimizer, x)
        for gradient_pass in optimizer.passes(samples=len(x) if samples else None):
            with gradient_pass:
                a, b = x[gradient_pass.samples], y[gradient_pass.samples]
                pieces = list(zip(a.chunk(parts), b.chunk(parts), strict=True))
                for i, (u, v) in enumerate(pieces):
                    with no_sync() if i + 1 < len(pieces) else contextlib.nullcontext():
                        loss = cross_entropy(call(u), v) / parts
                        loss.backward()
                    known = 0.0 if i == 0 else gradient_pass.loss
                    gradient_pass.loss = known + loss.detach()
        if clip is not None:
            nn.utils.clip_grad_norm_(optimizer.parameters(), clip)
        optimizer.step()


def by_loop(optimizer, module, data, parts=1, closures=False):
    """An unmodified loop around a module that returns the loss; the last part of a step in a closure, as in some."""
    for x, y in data:
        refresh(optimizer, x)
        optimizer.zero_grad()
        for i, (u, v) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):

            def closure(u=u, v=v):
                (module(u, v) / parts).backward()

            if closures and i == parts - 1:
                optimizer.step(closure)
            else:
                closure()
        if not closures:
            optimizer.step()


# --- what a rank does, and (rank=None) what one process does with all samples ---------------------------------------


def averaged(name, rank, given="wrapper", by_hand=False, **how):
    """DistributedDataParallel with one perturbation for all ranks; optimizers get the wrapper or the module inside."""
    model = network()
    call = model if rank is None else DistributedDataParallel(model)
    optimizer = build(name, call if given == "wrapper" else model, group=None)
    optimizer.refreshed_by_hand = by_hand
    if how.pop("accumulate", False):
        how.update(parts=2, no_sync=contextlib.nullcontext if rank is None else call.no_sync)
    by_passes(optimizer, call, batches(rank), **how)
    return weights(model)


def local(name, rank):
    """A perturbation per rank is a perturbation per half of the batch."""
    model = network()
    call = model if rank is None else DistributedDataParallel(model)
    optimizer = build(name, call, m=8 if rank is None else "local")
    optimizer.refreshed_by_hand = True
    by_passes(optimizer, call, batches(rank), samples=rank is None)
    return weights(model)


def numbered(name, rank):
    """A perturbation for every four samples, wherever they are."""
    model = network()
    call = model if rank is None else DistributedDataParallel(model)
    optimizer = build(name, call, m=4)
    optimizer.refreshed_by_hand = True
    by_passes(optimizer, call, batches(rank), samples=True)
    return weights(model)


def in_the_forward(name, rank, m, parts=1, closures=False):
    """Both passes in an unmodified loop: the module that returns the loss inside the wrapper."""
    model = network()
    if rank is None:
        optimizer = build(name, model, m={"local": 8 // parts, "global": "global"}[m])
        optimizer.refreshed_by_hand = True
        by_passes(optimizer, model, batches(None), samples=m == "local")
        return weights(model)
    module = WithLoss(model)
    optimizer = build(name, model, m=m)
    optimizer.attach(module)
    optimizer.refreshed_by_hand = True
    by_loop(optimizer, DistributedDataParallel(module), batches(rank), parts, closures)
    return weights(model)


def wrapper_inside(name, rank, m):
    """The same with the wrapper inside the module that returns the loss, as in timm's task."""
    if rank is None:
        return in_the_forward(name, None, m)
    model = network()
    module = WithLoss(DistributedDataParallel(model))
    optimizer = build(name, model, m=m)
    optimizer.attach(module)
    optimizer.refreshed_by_hand = True
    by_loop(optimizer, module, batches(rank))
    return weights(model)


def unmodified(name, rank):
    """A one-pass method in an unmodified loop."""
    model = network()
    call = model if rank is None else DistributedDataParallel(model)
    optimizer = build(name, model)
    for x, y in batches(rank):
        optimizer.zero_grad()
        cross_entropy(call(x), y).backward()
        optimizer.step()
    return weights(model)


def different_statistics(name, rank):
    """Running statistics of their own bound the refresh on each rank: all go to one place all the same."""
    model = network(normalised=True)
    call = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = build(name, call, group=known_group(normalised=True))
    data = batches(rank, steps=5)
    with torch.no_grad():
        model[1].running_var.fill_(1e-7 if rank else 1.0)  # so that the bound is another one
    by_passes(optimizer, call, [(x * (1 + 3 * rank), y) for x, y in data])
    assert optimizer.steps == 5
    return weights(model)


def uneven(name, rank):
    """Batches of different sizes: what is drawn for them must not lead the ranks apart."""
    model = network()
    call = DistributedDataParallel(model)
    optimizer = build(name, call)
    by_passes(optimizer, call, [(x[: 8 - 3 * rank], y[: 8 - 3 * rank]) for x, y in batches(rank)])
    return weights(model)


def overflow_on_one_rank(name, rank):
    """A scaled loss that overflows in the first pass of one rank: no rank waits for the other, all skip the step."""
    torch.set_default_dtype(torch.float32)
    try:
        model = network()
        call = DistributedDataParallel(model)
        optimizer = build(name, call, m="local")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step, (x, y) in enumerate(batches(rank)):
            for gradient_pass in optimizer.passes(scaler=scaler):
                with gradient_pass:
                    loss = cross_entropy(call(x), y)
                    factor = 1e38 if step == 1 and rank == 0 else 1.0
                    scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.steps == STEPS - 1
        return weights(model)
    finally:
        torch.set_default_dtype(torch.float64)


def failing_refresh(name, rank):
    """Inputs that are not finite on one rank: all raise, and nothing has changed."""
    model = network()
    call = DistributedDataParallel(model)
    optimizer = build(name, call)
    (x, y), *_ = batches(rank)
    before = weights(model)
    try:
        by_passes(optimizer, call, [(x * float("nan") if rank else x, y)])
    except ms_optim.errors.DataError as error:
        assert ("non-finite" if rank else "1 of 2 ranks") in str(error)
    else:
        raise AssertionError("a refresh on inputs that are not finite went through")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    call = DistributedDataParallel(model)  # (the wrapper does not survive an exception in a forward pass)
    by_passes(optimizer, call, batches(rank))
    return weights(model)


def unknown_wrapper(name, rank):
    """m="local" cannot be kept by an optimizer that does not know the wrapper: it says so, and nothing has changed."""
    model = network()
    call = DistributedDataParallel(model)
    optimizer = build(name, model, m="local")
    (x, y), *_ = batches(rank)
    before = weights(model)
    try:
        by_passes(optimizer, call, [(x, y)])
    except ms_optim.errors.OptimizerError as error:
        assert "build the optimizer with the wrapped model" in str(error)
    else:
        raise AssertionError("gradients were averaged that were to stay local")
    return before


def sharded(name, rank, base=torch.optim.SGD, **options):
    """FSDP2: the same as one process, with the group discovered before sharding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    group = known_group()  # before it is sharded
    if rank is not None:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    kind, own = KINDS[name]
    own = {**own, **options}
    if "gradient" in own or kind is ms_optim.MSRegularizedSGD:
        optimizer = kind(model, lr=0.05, momentum=0.9, group=group, **own)
    else:
        settings = {"lr": 0.05, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.01}
        optimizer = kind(model, base, group=group, **settings, **own)
    for x, y in batches(rank):
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach().full_tensor() if rank is not None else p.detach() for p in model.parameters()]


def refused_when_sharded(name, rank):
    """A perturbation of its own for each rank needs weights of its own for each rank."""
    try:
        sharded(name, rank, m="local")
    except ms_optim.errors.UnsupportedError as error:
        assert "sharded" in str(error)
        return []
    raise AssertionError("m='local' was taken with sharded weights")


def refused_on_each_rank(name, rank):
    """Where a step is made of several gradients, those of one rank would lead its weights elsewhere."""
    model = network()
    call = DistributedDataParallel(model)
    optimizer = KINDS[name][0](call, lr=0.05, m="local", **KINDS[name][1])
    before = weights(model)
    try:
        by_passes(optimizer, call, batches(rank)[:1])
    except ms_optim.errors.UnsupportedError as error:
        assert "m='global'" in str(error)
    else:
        raise AssertionError("a step of its own was taken on every rank")
    return before


def resumed(name, rank):
    """Saved and loaded in the middle, a run on two ranks is bitwise the uninterrupted one."""
    found = []
    for stop in (None, 2):
        model = network()
        call = DistributedDataParallel(model)
        optimizer = build(name, call)
        data = batches(rank)
        by_passes(optimizer, call, data[:2] if stop else data)
        if stop:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = network()
            call = DistributedDataParallel(model)
            optimizer = build(name, call, seed=9)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            by_passes(optimizer, call, data[2:])
        found.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return found[0]


# Scenario → (function, arguments); the first group is compared with one process, the second only rank with rank.
COMPARED = {
    **{f"averaged {name} {given}": (averaged, (name,), {"given": given})
       for name in (*GRADIENT, *ONE_PASS) for given in ("wrapper", "inside")},
    **{f"accumulated {name}": (averaged, (name,), {"accumulate": True, "by_hand": True}) for name in GRADIENT},
    **{f"averaged {name}": (averaged, (name,), {"given": "wrapper"}) for name in LITERATURE},
    "clipped MSSAM[move]": (averaged, ("MSSAM[move]",), {"clip": 0.01}),
    **{f"local {name}": (local, (name,), {}) for name in GRADIENT},
    **{f"numbered {name}": (numbered, (name,), {}) for name in GRADIENT},
    **{f"in the forward {name} {m}": (in_the_forward, (name, ), {"m": m}) for name in GRADIENT
       for m in ("local", "global")},
    "in the forward, accumulated SAM local": (in_the_forward, ("SAM",), {"m": "local", "parts": 2}),
    "in the forward, closures SAM global": (in_the_forward, ("SAM",), {"m": "global", "closures": True}),
    "in the forward, accumulated, closures SAM local":
        (in_the_forward, ("SAM",), {"m": "local", "parts": 2, "closures": True}),
    **{f"wrapper inside {name} {m}": (wrapper_inside, (name, ), {"m": m}) for name in ("SAM", "MSSAM[move]")
       for m in ("local", "global")},
    **{f"unmodified {name}": (unmodified, (name,), {}) for name in ONE_PASS},
    **{f"sharded {name}": (sharded, (name,), {}) for name in (*GRADIENT, *ONE_PASS)},
    "sharded MSSAM[move] AdamW": (sharded, ("MSSAM[move]",), {"base": torch.optim.AdamW}),
}  # fmt: skip
TOGETHER = {
    **{f"averaged {name}": (averaged, (name,), {}) for name in (*RANDOM, *NOISY)},
    **{f"unmodified {name}": (unmodified, (name,), {}) for name in ("MSReg[noise]", "MSReg[trace]")},
    **{f"different statistics {name}": (different_statistics, (name,), {}) for name in ("MSSAM[move]", "MSReg[trace]")},
    **{f"uneven {name}": (uneven, (name,), {}) for name in RANDOM},
    **{f"sharded {name}": (sharded, (name,), {}) for name in RANDOM},
    **{f"overflow on one rank {name}": (overflow_on_one_rank, (name,), {}) for name in ("SAM", "MSSAM[metric]")},
    **{f"failing refresh {name}": (failing_refresh, (name,), {}) for name in ("MSSAM[move]", "MSReg[trace]")},
    "unknown wrapper SAM": (unknown_wrapper, ("SAM",), {}),
    **{f"refused on each rank {name}": (refused_on_each_rank, (name,), {}) for name in ("GSAM", "LookSAM", "FrobSAM")},
    **{f"resumed {name}": (resumed, (name,), {}) for name in ("LookSAM", "FriendlySAM")},
    "refused when sharded SAM": (refused_when_sharded, ("SAM",), {}),
    **{f"resumed {name}": (resumed, (name,), {}) for name in (*GRADIENT, *ONE_PASS, *RANDOM)},
}

if not hasattr(torch.cpu.Stream, "record_event"):
    # torch 2.6 cannot shard on a CPU: its all-gather records an event on a stream that cannot.
    for table in (COMPARED, TOGETHER):
        for title in [title for title, (function, *_) in table.items() if function in (sharded, refused_when_sharded)]:
            del table[title]


def main(folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    found = {}
    for kind, scenarios in (("compared", COMPARED), ("together", TOGETHER)):
        for title, (function, arguments, how) in scenarios.items():
            try:
                found[kind, title] = function(*arguments, rank, **how)
            except BaseException as error:
                print(f"rank {rank}: {title}: {type(error).__name__}: {error}", flush=True)
                raise
    torch.save(found, Path(folder) / f"found{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
