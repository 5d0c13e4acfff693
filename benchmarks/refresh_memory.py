r"""A refresh on ResNet-18 at batch 128 needs little more memory than training does.

Method: see :mod:`benchmarks.memory`.  Peak resident set of a process that imports the package, builds ResNet-18 for
32×32 images and runs, on a batch of 128, one forward and backward pass, or one refresh of MSSAM (``columns=2``, the
discovery of the scale group included), or one exact trace.

Goal: the refresh within 3 GiB.  No tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

import ms_optim
from ms_optim import models

from . import harness, memory
from .harness import Claim, Run

CLAIMS = [
    Claim("resnet18", "peak memory of a refresh, batch 128", "refresh", None, 3.0),
    Claim("resnet18", "of one exact trace", "exact", None),
    Claim("resnet18", "of one forward and backward pass", "pass", None),
]


def workload(which: str, full: bool, threads: int) -> None:
    """What the measured process runs.

    Args:
        which: ``"pass"``, ``"refresh"`` or ``"exact"``.
        full: ResNet-18 at batch 128, or something tiny.
        threads: The number of torch's threads.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = models.resnet18() if full else models.small_resnet(channels=4, in_channels=3)
    x = torch.randn(128, 3, 32, 32) if full else torch.randn(2, 3, 8, 8)
    if which == "pass":
        F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
    elif which == "refresh":
        ms_optim.MSSAM(model, rebalance="move", gauge=0.0, lr=0.1).refresh(x)
    else:
        ms_optim.hessian_trace(model, x)


def measure(scale: str) -> list[Run]:
    """All runs.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.

    Returns:
        The lines.
    """
    full, threads = scale == "cpu", torch.get_num_threads()
    return [
        {"network": "resnet18", "contender": which, "peak_bytes": memory.peak_bytes(workload, which, full, threads)}
        for which in ("pass", "refresh", "exact")
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "refresh_memory", measure, arguments)


if __name__ == "__main__":
    main()
