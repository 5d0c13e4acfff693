r"""The exact trace stands close to the least that any method of its kind can cost.

An exact trace by backpropagation needs one forward pass and K − 1 backpropagations, one for each column of a factor of
P = diag(p) − p pᵀ, to the output of the first layer with parameters: to activations only, no gradient of any weight.
That is the *floor*; the contractions that make traces of what is backpropagated come on top of it.  The floor is
measured twice, column by column and with all columns in one call (``is_grads_batched``), and the faster one counts.

Method: see :mod:`benchmarks.harness`.  Batch of 256 random images, float32, evaluation mode, everything in one run;
memory is the peak above model and inputs.

Goals: the exact trace in at most 1.5 times the floor on each network.  No tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import contenders, harness
from .contenders import BACKPACK, BATCHED, CONTENDERS, EXACT, LOOPED, PASS
from .harness import Claim, Run
from .render import side_by_side

DEVICES = ("cpu", "cuda")
ROUNDS = {"mlp": 100, "lenet": 20, "small_cnn": 20}

CLAIMS = [
    claim
    for network in ROUNDS
    for claim in (
        Claim(network, "exact trace, in units of the floor", EXACT, (LOOPED, BATCHED), 1.5),
        Claim(network, "the floor column by column, in forward + backward passes", LOOPED, PASS),
        Claim(network, "the floor with all columns at once", BATCHED, PASS),
        Claim(network, "exact trace, in forward + backward passes", EXACT, PASS),
        Claim(network, "the floor, how much faster than BackPACK", BACKPACK, (LOOPED, BATCHED), at_least=True),
        Claim(network, "its memory above inputs, over the floor's column by column", EXACT, LOOPED, None, "peak_bytes"),
        Claim(network, "its memory above inputs, over BackPACK's", EXACT, BACKPACK, None, "peak_bytes"),
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
    for network, rounds in ROUNDS.items():
        which = (PASS, LOOPED, BATCHED, EXACT, BACKPACK)
        count, peaks = (rounds, 3) if full else (2, 1)
        runs += contenders.side_by_side(network, which, full, device, count, budget=75, peaks=peaks)
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
    harness.main(str(__doc__), "trace_limit", measure, arguments, DEVICES)


if __name__ == "__main__":
    main()
