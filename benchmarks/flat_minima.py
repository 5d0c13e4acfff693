r"""The flattest networks need not generalise, and SAM finds more than flatness: XOR data, two-layer networks.

Repeats the experiment of Wen, Li, Ma, arXiv 2307.11007: x uniform in {−1, 1}^30, y = x_1 x_2, 100 training samples,
width 500, loss (1/n) Σ (f − y)² without ½, error Pr(y f ≤ 0) on 10,000 fresh samples.  Four networks
(:mod:`benchmarks.two_layer`), full-batch gradient descent with weight decay against 1-SAM (batch 1), learning rates, ρ
and phases of the paper's Table 2 where it has a row.  A seed draws data, initial weights (PyTorch's default) and the
order of the samples, the same for all optimizers of a network; an epoch is 100 steps of batch 1 or one full-batch step.

The trace is that of the *Gauss-Newton* matrix, (2/n) Σ_i ‖∇f(x_i)‖², exact and in float64 at every point; where all
samples are fitted it is Tr H.  Training is in float32.  Beside the paper's optimizers:

* **MSSAM**: 1-SAM, moved to the α*-balanced representative every 100 steps from the exact traces of the training set:
  equal traces of (W1, b1) and W2, or of γ and W2; in front of a normaliser (W1, b1) goes to unit-norm rows.
* **MSRegularizedSGD**: SGD, batch 1, on (f − y)² + λ · 2‖∇f‖² with λ = ρ²/2 (what 1-SAM adds where it fits), moved
  likewise.  For the two networks without a normaliser.

"Yes" means a mean test accuracy of at least 99 %, "nearly" of at least 90 %, with every training sample on the right
side.  Where fewer epochs were run than the paper's the table says so, and "no" is not concluded.

    python -m benchmarks.flat_minima            half an hour of one core; needs a C compiler
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .figure import pyplot, save
from .harness import RESULTS, Run, environment, folder_name, record
from .rows import Row, compared, mean
from .two_layer import BIAS, KINDS, NO_BIAS, SIM_BN, SIM_LN, least_trace
from .xor_training import (
    CONSTRUCTED,
    DIMENSION,
    EASED,
    MS_SGD,
    MSSAM,
    OPTIMIZERS,
    PROJECTED,
    SAM,
    SAMPLES,
    SETTINGS,
    WIDTH,
    Setting,
    constructed,
    training,
)

SEEDS = 5
GENERALISES, NEARLY = 99.0, 90.0  # per cent
# The paper's two last columns: the flattest generalises, SAM generalises.
PAPER = {NO_BIAS: ("yes", "yes"), BIAS: ("no", "no"), SIM_BN: ("yes", "yes"), SIM_LN: ("no", "yes")}
_SOURCE = "arXiv 2307.11007"


def measure(scale: str, minutes: float, keep: Callable[[list[Run]], object]) -> list[Run]:
    """All runs, seed by seed, so that what is there after any time is a whole table of fewer seeds.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.
        minutes: After which no further training begins.
        keep: Is given all lines whenever there are more.

    Returns:
        The lines.
    """
    began, runs = time.monotonic(), constructed()
    for seed in range(SEEDS if scale == "cpu" else 1):
        for setting in SETTINGS:
            if time.monotonic() - began > 60 * minutes:
                return runs
            if scale == "smoke":
                phases = tuple(replace(phase, epochs=20) for phase in setting.phases)
                runs += training(replace(setting, phases=phases), seed, width=64)
            else:
                runs += training(setting, seed)
            keep(runs)
    return runs


def final(runs: Sequence[Run], kind: str, optimizer: str) -> list[Run]:
    """Where the training of every seed ended; one that diverged, where it was last seen to be finite.

    Args:
        runs: All lines.
        kind: The network.
        optimizer: The optimizer.

    Returns:
        Lines, with ``"diverged"``.
    """
    found: dict[int, Run] = {}
    for run in runs:
        if (run["network"], run["contender"]) == (kind, optimizer):
            finite = math.isfinite(run["loss"])
            found[run["round"]] = {**(run if finite else found[run["round"]]), "diverged": not finite}
    return list(found.values())


def sam_verdict(runs: Sequence[Run], setting: Setting) -> str:
    """Whether SAM generalises, as far as was run.

    Args:
        runs: All lines.
        setting: A 1-SAM.

    Returns:
        Words.
    """
    last = final(runs, setting.kind, setting.optimizer)
    if not last:
        return "not run"
    epochs = min(run["epochs"] for run in last)
    short = epochs < setting.paper
    length = f"{epochs:,} epochs, " + (f"the paper has {setting.paper:,}" if short else "as the paper")
    if any(run["diverged"] for run in last):
        length += "; then diverged"
    accuracy = [100 * run["test_accuracy"] for run in last]
    found = f"{mean(accuracy, 1)} % after {length}"
    if not all(run["train_accuracy"] == 1 for run in last):
        return f"does not fit all samples: {found}"
    if statistics.fmean(accuracy) >= GENERALISES:
        return f"yes: {found}"
    if short:
        return f"not reached: {found}"
    return f"{'nearly' if statistics.fmean(accuracy) >= NEARLY else 'no'}: {found}"


def flattest_verdict(runs: Sequence[Run], kind: str) -> str:
    """Whether the flattest generalises, as far as constructed minima decide it.

    Args:
        runs: All lines.
        kind: The network.

    Returns:
        Words.
    """
    found = {name: final(runs, kind, name) for name in CONSTRUCTED}
    if not all(found.values()):
        return "no experiment decides it"
    one, other = (found[name][0] for name in CONSTRUCTED)
    fits = max(one["loss"], other["loss"]) < 1e-12
    if fits and other["trace"] <= one["trace"] * (1 + 1e-9) and other["test_accuracy"] < 0.6:
        return f"no: memorising has the same trace, {other['trace']:.2f}, and {100 * other['test_accuracy']:.1f} %"
    return "not shown"


def body(runs: Sequence[Run]) -> list[str]:
    """Verdicts beside the paper's.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = [
        "| network | flattest generalises, paper | here | SAM generalises, paper | here |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        settings = [s for s in SETTINGS if s.kind == kind and s.optimizer in (SAM, PROJECTED, EASED)]
        found = "; ".join(f"{setting.optimizer}: {sam_verdict(runs, setting)}" for setting in settings)
        paper = PAPER[kind]
        lines.append(f"| {kind} | {paper[0]} | {flattest_verdict(runs, kind)} | {paper[1]} | {found} |")
    return lines


def summary(runs: Sequence[Run]) -> list[Row]:
    """The paper's two last columns beside ours, and ours beside 1-SAM.

    Args:
        runs: All lines of one run.

    Returns:
        Rows.
    """
    rows = []
    for kind in KINDS:
        flattest, generalises = PAPER[kind]
        found = flattest_verdict(runs, kind)
        if found.startswith(("yes:", "no:")):
            word = "as the paper" if found.startswith(flattest) else "**not repeated**"
            rows.append(Row(f"XOR, {kind}: the flattest generalises", found, word, f"{flattest} ({_SOURCE})"))
        settings = [s for s in SETTINGS if s.kind == kind and s.optimizer in (SAM, PROJECTED, EASED)]
        words = {setting.optimizer: sam_verdict(runs, setting) for setting in settings}
        word = "as the paper" if any(w.startswith(f"{generalises}:") for w in words.values()) else "**not repeated**"
        ours = f"{'; '.join(f'{name}: {found}' for name, found in words.items())} (n = {len(final(runs, kind, SAM))})"
        rows.append(Row(f"XOR, {kind}: SAM generalises", ours, word, f"{generalises} ({_SOURCE})"))
    return rows + [row for kind in KINDS for optimizer in (MSSAM, MS_SGD) for row in beside_sam(runs, kind, optimizer)]


def beside_sam(runs: Sequence[Run], kind: str, optimizer: str) -> list[Row]:
    """Test accuracy beside that of 1-SAM, seed by seed.

    Args:
        runs: All lines of one run.
        kind: The network.
        optimizer: One of ours.

    Returns:
        A row; none if it was not run.
    """
    mine, reference = ({r["round"]: r for r in final(runs, kind, name)} for name in (optimizer, SAM))
    both = [seed for seed in mine if seed in reference]
    if not both:
        return []
    differences = [100 * (mine[seed]["test_accuracy"] - reference[seed]["test_accuracy"]) for seed in both]
    ours = f"{mean([100 * run['test_accuracy'] for run in mine.values()], 1)} (n = {len(mine)}), "
    text, word = compared(differences, 1)
    ours += f"over 1-SAM's {text}"
    lost = [name for name, last in ((optimizer, mine), (SAM, reference)) if any(r["diverged"] for r in last.values())]
    word = f"diverged: {' and '.join(lost)}" if lost else word
    return [Row(f"XOR, {kind}: {optimizer}'s test accuracy, per cent", ours, word, detail=kind not in (BIAS, SIM_LN))]


def numbers(setting: Setting) -> str:
    """lr, ρ or λ, batch, weight decay and epochs of every phase, as in the paper's Table 2."""
    parts = []
    for phase in setting.phases:
        rule = phase.rule
        batch = SAMPLES if rule.full else 1
        of = f" of {phase.paper:,}" if phase.paper and phase.paper != phase.epochs else ""
        parts.append(f"{rule.lr:g}/{rule.strength:g}/{batch}/{rule.decay:g}/{phase.epochs:,}{of}")
    return ", then ".join(parts)


def details(runs: Sequence[Run]) -> list[str]:
    """Where every training ended.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = [
        f"Means ± standard errors over the seeds at the end of training; the least trace that a network with a bias "
        f'can have is 4√(d + 1) = {least_trace(DIMENSION):.2f}. "Best" is the largest mean test accuracy on the way. '
        "MS: minimum sharpness, the trace at the balanced representative.",
        "",
        "| network | optimizer | lr / ρ or λ / batch / decay / epochs (row of the paper's Table 2) | seeds "
        "| train loss | train accuracy | test accuracy | best | trace | MS |",
        f"| --- | --- | --- |{' --- |' * 7}",
    ]
    rows = [(setting.kind, setting.optimizer, f"{numbers(setting)} ({setting.source})") for setting in SETTINGS]
    rows += [(kind, name, "") for kind in KINDS for name in CONSTRUCTED]
    for kind, optimizer, text in sorted(rows, key=lambda row: KINDS.index(row[0])):
        last = final(runs, kind, optimizer)
        if not last:
            continue
        curve = curves(runs, kind, optimizer, "test_accuracy")
        gone = any(run["diverged"] for run in last)
        cells = [
            *(kind, optimizer, text, str(len(last))),
            f"{statistics.fmean(run['loss'] for run in last):.2g}{' (then diverged)' if gone else ''}",
            mean([100 * run["train_accuracy"] for run in last], 1),
            mean([100 * run["test_accuracy"] for run in last], 1),
            f"{100 * max(curve.values()):.1f} at {max(curve, key=curve.__getitem__):,}" if text else "",
            mean([run["trace"] for run in last]),
            mean([run["minimum_sharpness"] for run in last]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seconds = sum(run["seconds"] for run in runs if run.get("last") and "seconds" in run)
    curve = curves(runs, BIAS, SAM, "test_accuracy")
    if curve:
        peak = max(curve, key=curve.__getitem__)
        lines += ["", f"With a bias 1-SAM's test accuracy falls after epoch {peak:,}; the paper's after about 4,000."]
    lines += [
        "",
        "The bound is 4√(d + 1) |f|, so that a trace below it belongs to |f| < 1. Memorising has f = 0 on all others,"
        " which counts as an error. With the initial γ = 1 and W2 of PyTorch, ρ = 0.1 moves the output of Sim-BN by "
        "about 2 at the start, and 1-SAM and MSSAM collapse to f = 0; the paper does not say where it starts. MSSAM "
        f"sets (W1, b1) in front of a normaliser to the norm √(2 · {WIDTH}) = {math.sqrt(2 * WIDTH):.1f}, where the "
        "same ρ and learning rate are smaller steps than at the norms that 1-SAM has there.",
        "",
        f"All trainings took {seconds / 60:.0f} minutes of one core.",
    ]
    return lines


def curves(runs: Sequence[Run], kind: str, optimizer: str, quantity: str) -> dict[int, float]:
    """A quantity over time.

    Args:
        runs: All lines.
        kind: The network.
        optimizer: The optimizer.
        quantity: The name in the lines.

    Returns:
        Epochs → mean over the seeds.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        if (run["network"], run["contender"]) == (kind, optimizer) and math.isfinite(run["loss"]):
            found.setdefault(run["epochs"], []).append(run[quantity])
    return {epochs: statistics.fmean(values) for epochs, values in sorted(found.items())}


def draw(runs: Sequence[Run], path: Path) -> None:
    """Test accuracy and trace over the epochs, a column for each network.

    Args:
        runs: All lines of one run.
        path: Where to write the figure.
    """
    figure, panels = pyplot().subplots(2, len(KINDS), figsize=(14, 6), sharex="col", squeeze=False)
    for column, kind in enumerate(KINDS):
        upper, lower = panels[0][column], panels[1][column]
        for number, optimizer in enumerate(OPTIMIZERS):
            for panel, quantity in ((upper, "test_accuracy"), (lower, "trace")):
                curve = curves(runs, kind, optimizer, quantity)
                if curve:
                    epochs = [max(epoch, 0.5) for epoch in curve]  # the axis is logarithmic
                    panel.plot(epochs, list(curve.values()), color=f"C{number}", label=optimizer)
        upper.set_title(kind)
        upper.set_ylim(0.45, 1.02)
        lower.set_xscale("log")
        lower.set_yscale("log")
        lower.set_xlabel("epochs")
        if kind == BIAS:
            lower.axhline(least_trace(DIMENSION), color="grey", linewidth=0.8, linestyle=":")
        upper.legend(fontsize=7)
        upper.grid(alpha=0.3)
        lower.grid(alpha=0.3)
    panels[0][0].set_ylabel("test accuracy")
    panels[1][0].set_ylabel("Gauss-Newton trace")
    figure.tight_layout()
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["cpu", "smoke"], default="cpu", help="smoke: tiny, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch, which only measures (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of results/<claim>/ (default: here for cpu, none for smoke)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no further training begins")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    described = environment(options.threads)
    out = options.out or (RESULTS if options.scale == "cpu" else None)

    def keep(runs: list[Run]) -> None:
        described["load_average_after"] = round(os.getloadavg()[0], 2)
        if out is not None:
            record(out / "flat_minima" / folder_name(described), described, runs)

    runs = measure(options.scale, options.minutes, keep)
    keep(runs)

    from .render import table  # the renderer imports the scripts, whose tables it prints

    print(table("flat_minima", described, runs))


if __name__ == "__main__":
    main()
