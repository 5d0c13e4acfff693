r"""The exact trace of every layer takes a third of the time of BackPACK's, and half of its memory.

Method: see :mod:`benchmarks.harness`; who is measured, and which quantity each peer gives, is in
:mod:`benchmarks.contenders`.  All contenders of a network in one run: MLP, LeNet and the small CNN on 256 random 28×28
images, ResNet-18 and ViT-tiny (patches of 4×4) on 32 random 32×32 images, cross-entropy of ten classes, float32,
evaluation mode, time and peak memory above model and inputs.  Stochastic peers run with the fewest probes they accept:
one, for Hutch++ three products, for XTrace two.  What a peer cannot do is "unsupported", with its error.

Ours and BackPACK give a trace for every layer.  curvlinops gives the trace of the whole Gauss-Newton matrix and
PyHessian that of the whole Hessian, which on ViT-tiny (GELU, softmax, LayerNorm) is another number.

Goals: the exact trace at least 3 times faster than BackPACK's exact diagonal and in at most half of its memory, on each
network where BackPACK runs.  No tolerance.  For errors at equal time see :mod:`benchmarks.equal_time`.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import contenders, harness
from .contenders import (
    BACKPACK,
    BACKPACK_MC,
    CONTENDERS,
    EXACT,
    HUTCHINSON,
    HUTCHPP,
    PASS,
    PYHESSIAN,
    SAMPLED,
    XTRACE,
)
from .harness import Claim, Run
from .render import side_by_side

DEVICES = ("cpu", "cuda")
WHICH = (PASS, EXACT, SAMPLED, BACKPACK, BACKPACK_MC, HUTCHINSON, HUTCHPP, XTRACE, PYHESSIAN)
# Rounds, seconds after which no further round begins, processes for a peak of memory, calls before the first round.
EFFORT = {
    "mlp": (50, 60, 3, 2),
    "lenet": (10, 90, 3, 1),
    "small_cnn": (15, 60, 3, 2),
    "resnet18": (3, 60, 1, 1),
    "vit_tiny": (5, 60, 1, 1),
}

CLAIMS = [
    claim
    for network in EFFORT
    for claim in (
        Claim(network, "exact trace, how much faster than BackPACK", BACKPACK, EXACT, 3.0, at_least=True),
        Claim(network, "exact trace, memory above inputs over BackPACK's", EXACT, BACKPACK, 0.5, "peak_bytes"),
    )
]


def measure(scale: str, device: str) -> list[Run]:
    """All runs.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.
        device: Where they run.

    Returns:
        The lines.
    """
    full = scale == "cpu"
    runs: list[Run] = []
    for network, (rounds, budget, peaks, warm) in EFFORT.items():
        effort = (rounds, budget, peaks) if full else (2, 1.0, 1)
        runs += contenders.side_by_side(network, WHICH, full, device, *effort, warm=warm)
    return runs


def details(runs: Sequence[Run]) -> list[str]:
    """What every contender took.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    return side_by_side(runs, PASS, tuple(CONTENDERS))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "peers", measure, arguments, DEVICES)


if __name__ == "__main__":
    main()
