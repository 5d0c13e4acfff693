r"""Exact traces against brute force: the speed-ups of the paper's Fig. 1, and three times each of them as the goal.

Reproduces Fig. 1 of arXiv 2106.12612 (section 5.1): Tr H of every layer of the fully connected network 784-20-20-10 and
of the small convolutional network, for the mean cross-entropy of n = 10, 100, 1000 images of MNIST, at ten random
initialisations with a random subset each (the seeds).

* **Naive**: the gradient with ``create_graph``, then one second derivative for each of the 16,330 or 13,750 entries.
  It is run in full for n = 10, and for the fully connected network at n = 100.  Elsewhere it is measured on a random
  subset of entries, drawn from each layer in proportion to its size and at least one from each, and *extrapolated
  linearly in the number of entries*; the table says from how many.  Where it is run in full the extrapolation is made
  as well, and compared.
* **The paper's algorithm**: K + 1 backward passes for each sample, one sample at a time
  (``ms_optim.reference.curvature.paper_traces``).
* **Ours**: ``hessian_trace``, all columns, and ``columns=2``.

Time: a round is a seed; naive and the paper's algorithm are called once, ours five times after two calls to warm up,
and the median counts.  Deviation: max over the layers of |c − c*| / c*, with c* from the paper's algorithm in float64;
everything timed is float32.

The paper's speed-ups over brute force, on a GPU of its time: fully connected 617, 582, 582; convolutional 392, 298, 64.
Goal: three times each of these.  No tolerance.
"""

from __future__ import annotations

import copy
import functools
import random
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ms_optim import hessian_trace
from ms_optim.reference.curvature import paper_traces

from . import harness
from .harness import Claim, Run, timed
from .networks import NETWORKS, mnist
from .render import measured
from .rows import Row, verdict_of

DEVICES = ("cpu", "cuda")
SAMPLES = (10, 100, 1000)
SEEDS = 10
SUBSET = 250
FULLY = {("small_fcnn", 10), ("small_fcnn", 100), ("small_cnn", 10)}
PAPER_SPEEDUP = {"small_fcnn": (617, 582, 582), "small_cnn": (392, 298, 64)}

NAIVE = "naive"
EXTRAPOLATED = "naive, extrapolated from a subset"
PAPER = "the paper's algorithm"
EXACT = "exact"
SAMPLED = "columns=2"


def label(network: str, samples: int) -> str:
    """The name of one cell of the figure.

    Args:
        network: The network.
        samples: n.

    Returns:
        Its name.
    """
    return f"{network}, n = {samples}"


CLAIMS = [
    claim
    for network, speedups in PAPER_SPEEDUP.items()
    for samples, speedup in zip(SAMPLES, speedups, strict=True)
    for name, base in [(label(network, samples), NAIVE if (network, samples) in FULLY else EXTRAPOLATED)]
    for claim in (
        Claim(name, f"exact trace, speed-up over naive (paper: {speedup})", base, EXACT, 3.0 * speedup, at_least=True),
        Claim(name, "`columns=2`, speed-up over naive", base, SAMPLED, at_least=True),
        Claim(name, "the paper's algorithm, speed-up over naive", base, PAPER, at_least=True),
        *([Claim(name, "naive, extrapolated over in full", EXTRAPOLATED, NAIVE)] if base == NAIVE else []),
    )
]


def naive_traces(
    model: nn.Module, x: Tensor, y: Tensor, entries: Mapping[str, Sequence[int]] | None = None
) -> dict[str, float]:
    """Σ_j ∂²L / ∂W_j², a second derivative for every entry, or for some.

    Args:
        model: The model.
        x: Images ``[n, 1, 28, 28]``.
        y: Labels ``[n]``.
        entries: Name → the entries to sum over; by default all of them.

    Returns:
        Parameter name → sum.
    """
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    traces = {}
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        flat, total = gradient.flatten(), 0.0
        for j in range(parameter.numel()) if entries is None else entries[name]:
            (second,) = torch.autograd.grad(flat[j], parameter, retain_graph=True, materialize_grads=True)
            total += float(second.flatten()[j])
        traces[name] = total
    return traces


def paper_algorithm(model: nn.Module, x: Tensor) -> dict[str, float]:
    """K + 1 backward passes for each sample, each through the graph of that sample alone.

    Args:
        model: The model.
        x: Images ``[n, 1, 28, 28]``.

    Returns:
        Parameter name → trace.
    """
    traces: dict[str, float] = {}
    for sample in x.split(1):
        for name, trace in paper_traces(model, sample).items():
            traces[name] = traces.get(name, 0.0) + trace / len(x)
    return traces


def spread(sizes: Mapping[str, int], count: int, seed: int) -> dict[str, list[int]]:
    """Random entries of every parameter, in proportion to its size and at least one.

    Args:
        sizes: Name → number of entries.
        count: About how many entries in all.
        seed: Of the choice.

    Returns:
        Name → positions, without repetition.
    """
    draw, total = random.Random(seed), sum(sizes.values())
    return {
        name: draw.sample(range(size), min(size, max(1, round(count * size / total)))) for name, size in sizes.items()
    }


def extrapolated(seconds_some: float, some: int, seconds_none: float, of: int) -> float:
    """Seconds for all entries, linear in their number.

    Args:
        seconds_some: Seconds of a call for some entries.
        some: Their number.
        seconds_none: Seconds of a call for none of them: forward pass and gradient.
        of: The number of all entries.

    Returns:
        Seconds.
    """
    return seconds_none + (seconds_some - seconds_none) * of / some


def deviation(traces: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """The largest relative deviation of any layer.

    Args:
        traces: Name → trace.
        truth: Name → what it should be; a layer with 0, where every unit is dead, is left out.

    Returns:
        max |c − c*| / c*.
    """
    return max((abs(float(traces[name]) - exact) / exact for name, exact in truth.items() if exact > 0), default=0.0)


def one_seed(network: str, samples: int, seed: int, data: tuple[Tensor, Tensor], full: bool, device: str) -> list[Run]:
    """All contenders at one initialisation, on one subset.

    Args:
        network: The network.
        samples: n; the stand-in always gets five.
        seed: Of both.
        data: All images and labels.
        full: The network itself, or its stand-in.
        device: Where they run.

    Returns:
        The lines.
    """
    torch.manual_seed(seed)
    kind = NETWORKS[network]
    model = (kind.build if full else kind.tiny)(10).to(device).eval()
    chosen = torch.randperm(len(data[0]))[: samples if full else 5]
    x, y = data[0][chosen].to(device), data[1][chosen].to(device)
    truth = paper_algorithm(copy.deepcopy(model).double(), x.double())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    subset = spread(sizes, SUBSET if full else 20, seed)
    shared = {"network": label(network, samples), "round": seed}
    runs: list[Run] = []

    def once(contender: str, call: functools.partial[Mapping[str, float]]) -> None:
        found: list[Mapping[str, float]] = []
        seconds = timed(lambda: found.append(call()), device)
        runs.append({**shared, "contender": contender, "seconds": seconds, "deviation": deviation(found[0], truth)})

    nothing: dict[str, Sequence[int]] = {name: () for name in sizes}
    naive_traces(model, x, y, {name: entries[:1] for name, entries in subset.items()})  # pays for allocation
    none = timed(lambda: naive_traces(model, x, y, nothing), device)
    some, measured = timed(lambda: naive_traces(model, x, y, subset), device), sum(map(len, subset.values()))
    seconds = extrapolated(some, measured, none, total)
    runs.append({**shared, "contender": EXTRAPOLATED, "seconds": seconds, "entries": measured, "of": total})
    if (network, samples) in FULLY:
        once(NAIVE, functools.partial(naive_traces, model, x, y))
    once(PAPER, functools.partial(paper_algorithm, model, x))
    for contender, columns in ((EXACT, None), (SAMPLED, 2)):
        call = functools.partial(hessian_trace, model, x, columns=columns)
        traces = [call() for _ in range(2)][0]
        middle = statistics.median(timed(call, device) for _ in range(5))
        runs.append({**shared, "contender": contender, "seconds": middle, "deviation": deviation(traces, truth)})
    return runs


def measure(scale: str, device: str) -> list[Run]:
    """All runs.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.
        device: Where they run.

    Returns:
        The lines.
    """
    full = scale == "cpu"
    data = mnist(full)
    return [
        run
        for network in PAPER_SPEEDUP
        for samples in SAMPLES
        for seed in range(SEEDS if full else 2)
        for run in one_seed(network, samples, seed, data, full, device)
    ]


def summary(runs: Sequence[Run]) -> list[Row]:
    """The paper's speed-ups beside ours.

    Args:
        runs: All lines of one run.

    Returns:
        A row for each network.
    """
    rows = []
    for network, speedups in PAPER_SPEEDUP.items():
        names = [label(network, samples) for samples in SAMPLES]
        mine = [claim for claim in CLAIMS if claim.network in names and claim.goal is not None]
        rows.append(
            Row(
                f"{network}, n = {', '.join(map(str, SAMPLES))}: exact trace, how much faster than brute force",
                "; ".join(measured(harness.evaluate(claim, runs), "×") for claim in mine),
                f"three times the paper's: {verdict_of(mine, runs)}",
                f"{'×, '.join(map(str, speedups))}× (Fig. 1 of arXiv 2106.12612)",
            )
        )
    return rows


def details(runs: Sequence[Run]) -> list[str]:
    """Seconds and deviations behind the speed-ups.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = [
        "| network | contender | seconds: median (seeds) | entries measured | largest deviation: median, worst seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for network, contender in dict.fromkeys((run["network"], run["contender"]) for run in runs):
        mine = [run for run in runs if (run["network"], run["contender"]) == (network, contender)]
        seconds = statistics.median(run["seconds"] for run in mine)
        off = [run["deviation"] for run in mine if "deviation" in run]
        cells = (
            f"{seconds:.3g} ({len(mine)})",
            f"{mine[0]['entries']} of {mine[0]['of']}" if "entries" in mine[0] else "all",
            f"{statistics.median(off):.1e}, {max(off):.1e}" if off else "—",
        )
        lines.append(f"| {network} | {contender} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "paper_efficiency", measure, arguments, DEVICES)


if __name__ == "__main__":
    main()
