"""One rank of a process group: python ranks.py RANK FOLDER.  Measures its own data and writes what it found.

The parent (test_parallel.py) takes models and data from here, and compares with one process on all the data.
"""

import datetime
import math
import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature import hessian_diagonal, hessian_trace

WORLD = 2
# Inputs of rank 0 and of rank 1, as batches.
SPLITS = {"halves": ((6,), (6,)), "uneven": ((1,), (4, 5, 2)), "many": ((3, 3), (2, 2, 2))}


class Switch(nn.Module):
    """Large inputs take a smooth way with an operation that no rule covers, so that ranks differ in kind and path."""

    def __init__(self):
        super().__init__()
        self.first, self.prototypes, self.last = nn.Linear(5, 6), nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 4)

    def forward(self, x):
        hidden = self.first(x)
        if float(x.detach().abs().max()) > 50:
            return self.last(torch.tanh(hidden)) - torch.cdist(hidden, self.prototypes)
        return self.last(F.relu(hidden)) + F.linear(hidden, self.prototypes)


def network(kind="plain"):
    """The same weights in every process."""
    torch.manual_seed(1)
    if kind == "switch":
        return Switch()
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 6))


def batches(split, rank):
    """The batches of a rank; of both for ``None``."""
    parts = [*SPLITS[split][0], *SPLITS[split][1]]
    torch.manual_seed(2)
    found = list(torch.randn(sum(parts), 5).split(parts))
    first = len(SPLITS[split][0])
    return found if rank is None else found[:first] if rank == 0 else found[first:]


EXACT = {
    f"{measure.__name__} {split} {loss} {reduction}": (measure, split, {"loss": module(reduction=reduction)})
    for measure in (hessian_trace, hessian_diagonal)
    for split in SPLITS
    for loss, module in (("cross-entropy", nn.CrossEntropyLoss), ("bce", nn.BCEWithLogitsLoss))
    for reduction in ("mean", "sum")
}
SAMPLED = {
    f"{measure.__name__} {split} {options}": (measure, split, options)
    for measure in (hessian_trace, hessian_diagonal)
    for split in SPLITS
    for options in ({"columns": 0}, {"columns": 1, "probes": 3}, {"tolerance": 0.3})
}


def described(result):
    """What the parent compares."""
    return {
        "values": {name: torch.as_tensor(value) for name, value in result.items()},
        "errors": {name: torch.as_tensor(value) for name, value in result.standard_error.items()},
        "kind": result.kind,
        "samples": result.samples,
        "generic": result.generic,
        "columns": result.backpropagations,
    }


def failures(rank):
    """Rank 1 fails in every way; name → its data and its model."""
    good = batches("many", rank)

    class Broken(nn.Module):
        def __init__(self, error):
            super().__init__()
            self.body, self.error = network(), error

        def forward(self, x):
            if rank == 1:
                raise self.error
            return self.body(x)

    def interrupted():
        yield good[0]
        raise KeyboardInterrupt

    bad = [good[0], good[1] * math.nan]
    return {
        "not finite": (network(), bad if rank == 1 else good),
        "a model's own error": (Broken(KeyError("inside")), good),
        "an interruption": (network(), interrupted() if rank == 1 else good),
        "no batch": (network(), [] if rank == 1 else good),
        "not split": (network(), good),  # with a budget for rank 1 in which nothing fits
    }


def main(rank, folder):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=30)
    )
    group = dist.group.WORLD
    model, found = network(), {}
    for name, (measure, split, options) in {**EXACT, **SAMPLED}.items():
        found[name] = described(measure(model, batches(split, rank), process_group=group, **options))
    switch = [(1 if rank == 0 else 100) * x for x in batches("many", rank)]
    found["switch"] = described(hessian_trace(network("switch"), switch, process_group=group))

    errors = {}
    for name, (broken, data) in failures(rank).items():
        budget = 1 if name == "not split" and rank == 1 else None
        try:
            hessian_trace(broken, data, process_group=group, max_memory=budget)
        except BaseException as error:  # noqa: BLE001 - that it is the right one is for the parent to judge
            partial = getattr(error, "partial", None)
            errors[name] = (type(error).__name__, str(error), None if partial is None else partial.samples)
    found["errors"] = errors

    # The group has survived all that. A wrapper is no reason to sum: the group is.
    wrapped = nn.parallel.DistributedDataParallel(model)
    found["wrapped"] = described(hessian_trace(wrapped, batches("uneven", rank), process_group=group))
    found["alone"] = described(hessian_trace(wrapped, batches("uneven", rank)))
    # As a rank does whose memory is less.
    budget = 20_000 if rank == 1 else None
    found["budget"] = described(hessian_trace(model, batches("uneven", rank), process_group=group, max_memory=budget))
    groups = [dist.new_group([0]), dist.new_group([1])]
    found["own group"] = described(hessian_trace(model, batches("uneven", rank), process_group=groups[rank]))
    # The same data and the same seed on both: the signs have to be different all the same.
    same = batches("many", None)
    found["same data"] = described(
        hessian_trace(model, same, 0, generator=torch.Generator().manual_seed(7), process_group=group)
    )
    torch.save(found, f"{folder}/found{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
