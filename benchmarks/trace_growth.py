r"""With sampled columns a trace costs the same few passes however many classes there are.

Method: see :mod:`benchmarks.harness`.  Random images, float32, evaluation mode.  The MLP 784-512-128-512-K and a
ResNet-8 for 32×32 images, exact and with ``columns=2``, for K = 10, 100, 1000 at one batch size and for batches of 64,
256, 1024 at K = 10; every number in units of one forward and backward pass of the same network on the same batch, which
itself grows with K through the last layer.  Then timm's resnet50 with K = 1000, 64×64 images, batch 16.  Memory is the
peak above model and inputs.

Goals: ResNet-50 with K = 1000 in at most 4 passes with ``columns=2``, and *flat in K*, which is read here as: a trace
with ``columns=2`` costs at K = 1000 at most 1.25 times the passes that it costs at K = 10.  No tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import contenders, harness
from .contenders import CONTENDERS, EXACT, PASS, SAMPLED
from .harness import Claim, Run
from .render import side_by_side

DEVICES = ("cpu", "cuda")
CLASSES = (10, 100, 1000)
BATCHES = (64, 256, 1024)
# The batch at which K grows; for the ResNet, smaller: at K = 1000 its exact trace is a thousand backpropagations.
NETWORKS = {"mlp": 256, "resnet8": 64}
RESNET50 = "resnet50, K = 1000, batch 16"


def label(network: str, classes: int, batch: int) -> str:
    """The name of one cell of the table.

    Args:
        network: The network.
        classes: K.
        batch: The number of images.

    Returns:
        Its name.
    """
    return f"{network}, K = {classes}, batch {batch}"


def _flat(network: str) -> str:
    """The name of the comparison over K."""
    return f"{network}, batch {NETWORKS[network]}"


CLAIMS = [
    *(
        Claim(_flat(network), "passes of `columns=2`, K = 1000 over K = 10", "K = 1000", "K = 10", 1.25, "passes")
        for network in NETWORKS
    ),
    *(
        Claim(label(network, classes, batch), "`columns=2`, in forward + backward passes", SAMPLED, PASS)
        for network, batch in NETWORKS.items()
        for classes in CLASSES
    ),
    *(
        Claim(label(network, 10, batch), f"{text}, in forward + backward passes", which, PASS)
        for network in NETWORKS
        for batch in BATCHES
        for which, text in ((EXACT, "exact"), (SAMPLED, "`columns=2`"))
    ),
    Claim(RESNET50, "`columns=2`, in forward + backward passes", SAMPLED, PASS, 4.0),
]


def cells() -> list[tuple[str, int, int]]:
    """The cells of the table.

    Returns:
        Network, K, batch: every K at the network's own batch, and every batch at K = 10.
    """
    found = [(network, classes, batch) for network, batch in NETWORKS.items() for classes in CLASSES]
    found += [(network, 10, batch) for network in NETWORKS for batch in BATCHES]
    return list(dict.fromkeys(found))


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
    for network, classes, batch in cells():
        runs += contenders.side_by_side(
            *(network, (PASS, EXACT, SAMPLED), full, device, 15 if full else 1),
            budget=30,
            label=label(network, classes, batch),
            classes=classes if full else min(classes, 20),
            batch=batch,
            slow={EXACT: 1} if classes == max(CLASSES) else {EXACT: 3},
        )
    runs += contenders.side_by_side(
        *("resnet50", (PASS, SAMPLED), full, device, 10 if full else 1),
        budget=90,
        label=RESNET50,
        classes=1000 if full else 20,
        batch=16,
    )
    return runs + growth(runs)


def growth(runs: Sequence[Run]) -> list[Run]:
    """The passes that ``columns=2`` costs for every K, as lines to compare with each other.

    Args:
        runs: All lines so far.

    Returns:
        A line for every K and round, whose ``passes`` are the seconds over those of the pass in the same round.
    """
    found = []
    for network, batch in NETWORKS.items():
        for classes in CLASSES:
            mine = [run for run in runs if run["network"] == label(network, classes, batch) and "seconds" in run]
            units = {run["round"]: run["seconds"] for run in mine if run["contender"] == PASS}
            for run in mine:
                if run["contender"] == SAMPLED:
                    line = {"network": _flat(network), "contender": f"K = {classes}", "round": run["round"]}
                    found.append({**line, "passes": run["seconds"] / units[run["round"]]})
    return found


def details(runs: Sequence[Run]) -> list[str]:
    """What every contender took.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    return side_by_side([run for run in runs if "passes" not in run], PASS, tuple(CONTENDERS))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "trace_growth", measure, arguments, DEVICES)


if __name__ == "__main__":
    main()
