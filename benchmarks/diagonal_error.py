r"""The exact diagonal costs less than approximations of it whose relative errors are about one.

Reproduces Fig. 3 of arXiv 2106.12612: the error of approximations of DIAG[H] against their cost, beside the exact and
the sampled :func:`ms_optim.hessian_diagonal`.  The small fully connected and the small convolutional network, after 300
steps of SGD on MNIST, on 100 other images; float64, for finite differences of float32 gradients are mostly rounding.

* **Tsuzuku et al., 2019 and 2020** (:mod:`ms_optim.curvature.approximations`): differences of gradients at w ± a step,
  two forward and backward passes a probe, radius 1e-5.  The 2020 estimator once with the relative step that its
  divisor belongs to, and once with the uniform one of the code that drew the figure: its mean is not DIAG[H].
* **Hutchinson**: v ⊙ Hv by double backward, for comparison.
* **The paper's exact algorithm**: K + 1 backward passes for each sample (``ms_optim.reference.curvature``).
* **Ours**: all columns, and r columns and a signed one.

Error: ‖d̂_p − d_p‖ / ‖d_p‖ of each parameter's diagonal in the Euclidean norm, the median over the parameters, then
over three seeds (one seed from 300 probes on).  The truth d is the paper's algorithm in float64.  Cost: seconds, and
the same in units of one forward and backward pass on the same images.

There is no goal of the paper's to reach; the rows compare cost and error with those of ``columns=2``.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import ms_optim
from ms_optim.curvature.approximations import hutchinson_diagonal, tsuzuku2019_diagonal, tsuzuku2020_diagonal
from ms_optim.reference.curvature import paper_diagonals

from . import harness, networks
from .contenders import PASS, training_pass
from .figure import pyplot, save
from .harness import Claim, Run, Summary, evaluate, timed
from .rows import NOTHING, Row

DEVICES = ("cpu", "cuda")
NETWORKS = ("small_fcnn", "small_cnn")
SAMPLES = 100
PROBES = (1, 3, 10, 30, 100, 300, 1000)
COLUMNS = (0, 1, 2, 3, 4, 6)

Diagonal = Callable[..., Mapping[str, Tensor]]
T2019, T2020 = "Tsuzuku et al., 2019", "Tsuzuku et al., 2020"
UNIFORM, HUTCHINSON = "Tsuzuku et al., 2020, uniform step", "Hutchinson"
SAMPLED, EXACT, PAPER = "ours, sampled columns", "ours, exact", "the paper's exact algorithm"
APPROXIMATIONS: dict[str, Diagonal] = {
    T2019: tsuzuku2019_diagonal,
    T2020: functools.partial(tsuzuku2020_diagonal, step="relative"),
    UNIFORM: functools.partial(tsuzuku2020_diagonal, step="uniform"),
    HUTCHINSON: hutchinson_diagonal,
}


def named(kind: str, count: int | None) -> str:
    """The name of a point of the figure.

    Args:
        kind: Of estimator.
        count: Its probes or columns; ``None`` for the exact ones.

    Returns:
        Its name.
    """
    return kind if count is None else f"{kind}: {count}"


CLAIMS = [
    claim
    for network in NETWORKS
    for claim in (
        *(
            Claim(network, f"{text}, over `columns=2`", named(kind, 1000), named(SAMPLED, 2), None, quantity)
            for kind in (T2019, T2020, HUTCHINSON)
            for quantity, text in (
                ("seconds", f"{kind}, 1000 probes: time"),
                ("error", f"{kind}, 1000 probes: error"),
            )
        ),
        Claim(network, "ours, exact: time over `columns=2`", EXACT, named(SAMPLED, 2)),
        Claim(network, "the paper's exact algorithm: time over ours, exact", PAPER, EXACT),
    )
]


def summary(runs: Sequence[Run]) -> list[Row]:
    """What a thousand probes err by and take, in units of ours.

    Args:
        runs: All lines of one run.

    Returns:
        A row for each network.
    """
    rows = []
    for network in NETWORKS:
        found = {}
        for kind in (T2019, T2020, HUTCHINSON):
            pair = [claim for claim in CLAIMS if (claim.network, claim.contender) == (network, named(kind, 1000))]
            ratios = [what for claim in pair if isinstance(what := evaluate(claim, runs), Summary)]
            if len(ratios) == len(pair):
                found[kind] = [ratio.median for ratio in ratios]
        ours = "; ".join(f"{kind} {off:.1f}× in {time:.0f}× the time" for kind, (time, off) in found.items())
        better = all(min(ratios) > 1 for ratios in found.values())
        word = ("all err more, in more time" if better else "**missed**") if found else "not measured"
        claim = f"{network}: error of the diagonal after 1000 probes, over that of `columns=2`"
        rows.append(Row(claim, f"{ours} (n = 1)" if ours else NOTHING, word, "a figure without numbers (Fig. 3)"))
    return rows


def error(estimate: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The relative error of each diagonal in the Euclidean norm, in the middle of the parameters.

    Args:
        estimate: Name → diagonal.
        truth: Name → what it should be; a diagonal of zeros is left out.

    Returns:
        The median over the parameters of ‖d̂_p − d_p‖ / ‖d_p‖.
    """
    return statistics.median(
        float((estimate[name] - exact).norm() / exact.norm()) for name, exact in truth.items() if exact.any()
    )


def paper_algorithm(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """K + 1 backward passes for each sample, each through the graph of that sample alone.

    Args:
        model: The model.
        x: Images ``[n, 1, 28, 28]``.

    Returns:
        Parameter name → diagonal.
    """
    diagonals = [paper_diagonals(model, sample) for sample in x.split(1)]
    return {name: torch.stack([found[name] for found in diagonals]).mean(0) for name in diagonals[0]}


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
    for network in NETWORKS:
        model, x, y = networks.trained(network, full, device)
        model, x, y = model.double(), x[:SAMPLES].double(), y[:SAMPLES]
        truth = paper_algorithm(model, x)
        ordinary = functools.partial(training_pass(model, x, y), 1)
        ordinary()

        def once(name: str, call: Callable[[], Mapping[str, Tensor]], seed: int, **count: int) -> None:
            found: list[Mapping[str, Tensor]] = []
            unit = statistics.median(timed(ordinary, device) for _ in range(5))  # noqa: B023
            seconds = timed(lambda: found.append(call()), device)
            line = {"network": network, "contender": name, "round": seed, "seconds": seconds}  # noqa: B023
            off = error(found[0], truth)  # noqa: B023
            runs.append({**line, "passes": seconds / unit, "error": off, **count})

        for seed in range(3):
            for kind, estimate in APPROXIMATIONS.items():
                estimate(model, (x, y), probes=1)  # warms up
                for probes in PROBES if full else (1, 3, 1000):
                    if seed and probes > 100:
                        continue
                    drawn = min(probes, 1000 if full else 5)
                    signs = torch.Generator().manual_seed(1000 * seed + probes)
                    call = functools.partial(estimate, model, (x, y), probes=drawn, generator=signs)
                    once(named(kind, probes), call, seed, probes=probes)
            for columns in COLUMNS:
                signs = torch.Generator().manual_seed(1000 * seed + columns)
                call = functools.partial(ms_optim.hessian_diagonal, model, x, columns=columns, generator=signs)
                call()
                once(named(SAMPLED, columns), call, seed, columns=columns)
            once(EXACT, functools.partial(ms_optim.hessian_diagonal, model, x), seed)
            once(PAPER, functools.partial(paper_algorithm, model, x), seed)
    return runs


def points(runs: Sequence[Run], network: str) -> list[tuple[str, float, float, float]]:
    """What the figure shows.

    Args:
        runs: All lines of one run.
        network: The network.

    Returns:
        Estimator, passes, seconds and error, each the median over the seeds, in the order of the lines.
    """
    mine = [run for run in runs if run["network"] == network]
    found = []
    for name in dict.fromkeys(run["contender"] for run in mine):
        lines = [run for run in mine if run["contender"] == name]
        middle = [statistics.median(run[key] for run in lines) for key in ("passes", "seconds", "error")]
        found.append((name, *middle))
    return found  # type: ignore[return-value]


def details(runs: Sequence[Run]) -> list[str]:
    """Every point of the figure.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = [
        f"| network | estimator: probes or columns | in units of one {PASS} | seconds | relative error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for network in dict.fromkeys(run["network"] for run in runs):
        for name, passes, seconds, off in points(runs, network):
            lines.append(f"| {network} | {name} | {passes:.3g} | {seconds:.3g} | {off:.2g} |")
    return lines


def draw(runs: Sequence[Run], path: Path) -> None:
    """Error against cost, both on logarithmic axes, a panel for each network.

    Args:
        runs: All lines of one run.
        path: Where to write the figure.
    """
    figure, panels = pyplot().subplots(1, len(NETWORKS), figsize=(11, 4.2), sharey=True, squeeze=False)
    for panel, network in zip(panels[0], NETWORKS, strict=True):
        found = points(runs, network)
        for kind in dict.fromkeys(name.split(": ")[0] for name, *_ in found):
            mine = [point for point in found if point[0].split(": ")[0] == kind]
            # Below rounding every exact method is the same point.
            panel.loglog([p[1] for p in mine], [max(p[3], 1e-16) for p in mine], marker="o", markersize=4, label=kind)
        panel.set_title(network)
        panel.set_xlabel(f"cost in units of one {PASS}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("relative error of the diagonal")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "diagonal_error", measure, arguments, DEVICES)


if __name__ == "__main__":
    main()
