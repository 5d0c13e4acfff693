r"""The exact trace of every layer costs a few forward and backward passes.

Method: see :mod:`benchmarks.harness`.  Batch of 256 random images, cross-entropy, float32; everything is divided by one
forward and backward pass of the training loss on the same batch.  "Exact" is all K − 1 = 9 columns, ``columns=2`` two
exact ones and one signed.  Included in both: the forward pass, reading the graph, and the checks of the input.

For comparison: BackPACK's exact diagonal of the Gauss-Newton matrix (``DiagGGNExact``, which holds the same traces in
more detail, and the gradient besides), and the algorithm of arXiv 2106.12612, section 4, K + 1 backward passes for each
sample (``ms_optim.reference.curvature.paper_traces``; it goes sample by sample, so an eighth of the batch is measured).

Goals: exact at most 3.5 passes on the MLP and 8 on LeNet, ``columns=2`` at most 2.5 on both.  No tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ms_optim import hessian_trace, models
from ms_optim.reference.curvature import paper_traces

from . import harness
from .contenders import BACKPACK, PASS, backpack_diagonal, training_pass
from .harness import Claim, Contender, Run

PAPER = "K + 1 backward passes per sample, an eighth of the batch"

CLAIMS = [
    claim
    for network, goal in (("mlp", 3.5), ("lenet", 8.0))
    for claim in (
        Claim(network, "exact trace, in forward + backward passes", "exact", PASS, goal),
        Claim(network, "`columns=2`, in forward + backward passes", "columns=2", PASS, 2.5),
        Claim(network, "BackPACK's exact GGN diagonal", BACKPACK, PASS),
        Claim(network, "the paper's algorithm, K + 1 passes per sample", {PAPER: 8.0}, PASS),
    )
]


def measure(scale: str) -> list[Run]:
    """All runs.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.

    Returns:
        The lines.
    """
    full = scale == "cpu"
    builders: dict[str, Callable[[], nn.Sequential]] = {
        "mlp": models.mlp if full else models.small_fcnn,
        "lenet": models.lenet if full else models.small_cnn,
    }
    rounds = {"mlp": 150, "lenet": 25} if full else {"mlp": 2, "lenet": 2}
    runs: list[Run] = []
    for network, build in builders.items():
        torch.manual_seed(0)
        model, other = build(), build()
        x, y = torch.randn(256 if full else 4, 1, 28, 28), torch.randint(0, 10, (256 if full else 4,))
        contenders: dict[str, Contender] = {
            PASS: training_pass(model, x, y),
            "exact": lambda model=model, x=x: hessian_trace(model, x),
            "columns=2": lambda model=model, x=x: hessian_trace(model, x, columns=2),
            PAPER: lambda model=model, x=x: paper_traces(model, x[: max(1, len(x) // 8)]),
        }
        try:
            contenders[BACKPACK] = backpack_diagonal()(other, x, y)
        except ModuleNotFoundError:
            runs.append(harness.missing(network, BACKPACK))
        runs += harness.paired(network, contenders, rounds[network], slow={PAPER: 1}, budget=75)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "trace_speed", measure, arguments)


if __name__ == "__main__":
    main()
