r"""Given the same time, two exact columns and a signed one err ten times less than any stochastic peer.

Every estimator of the traces is given the seconds that ``hessian_trace(columns=2)`` takes: a peer draws as many probes
as fit, at least the fewest it accepts.  The number is ⌊(T − a) / b⌋, with a + b·probes the time of a call, read off the
medians of calls with the fewest probes and with four times as many.  A peer whose smallest call takes longer than T
gets that call; the table says what it took.

The error is the relative root mean squared error of each layer's trace,

    RMSE_p = √(mean (ĉ_p − c_p)²) / c_p ,

over 100 repeats with fresh probes on one batch (fewer where those of one peer take more than 40 s; the table has
the number), against c_p by the exact trace in float64.  MLP, LeNet and the small CNN, 256 images of MNIST, after 300
steps of SGD, float32, evaluation mode.  Layers whose trace is 0 are left out.  The ratio peer / ``columns=2`` is taken
layer by layer.  Where curvlinops gives one number for the whole network, Hutch++ and XTrace are measured twice: on an
operator for each layer, and on the whole, where the error of the total is compared.

Goal: at least 10 for every peer, per layer: both the median over the layers and the worst of them.  No tolerance.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence

import ms_optim

from . import harness, networks
from .contenders import BACKPACK_MC, BY_LAYER, CONTENDERS, HUTCHINSON, HUTCHPP, PYHESSIAN, SAMPLED, XTRACE, Estimator
from .harness import Claim, Run, Summary, failure, paired, timed
from .rows import NOTHING, Row, verdict_of

DEVICES = ("cpu", "cuda")
NETWORKS = ("mlp", "lenet", "small_cnn")
PEERS = (BACKPACK_MC, HUTCHINSON + BY_LAYER, HUTCHPP + BY_LAYER, XTRACE + BY_LAYER, PYHESSIAN + BY_LAYER)
WHOLE = (HUTCHPP, XTRACE)
REPEATS, PATIENCE = 100, 40.0

CLAIMS = [
    *(
        Claim(network, f"{peer}: its RMSE over ours, {text}", peer, SAMPLED, 10.0, "rmse", at_least=True, worst=worst)
        for network in NETWORKS
        for peer in PEERS
        for text, worst in (("median layer", False), ("worst layer for us", True))
    ),
    *(
        Claim(network, f"{peer}: RMSE of the total over that of ours", peer, SAMPLED, None, "rmse_total", at_least=True)
        for network in NETWORKS
        for peer in WHOLE
    ),
]


def summary(runs: Sequence[Run]) -> list[Row]:
    """The smallest and the largest ratio over peers and networks.

    Args:
        runs: All lines of one run.

    Returns:
        A row for the median layer, one for the worst.
    """
    rows = []
    for text, worst in (("in the median layer", False), ("in the layer that is worst for us", True)):
        mine = [claim for claim in CLAIMS if claim.goal is not None and claim.worst == worst]
        found = [(what, claim) for claim in mine if isinstance(what := harness.evaluate(claim, runs), Summary)]
        ratios = {claim: what.median for what, claim in found}
        least, most = (choose(ratios, key=ratios.__getitem__, default=None) for choose in (min, max))
        if least is None or most is None:
            ours = NOTHING
        else:
            ours = f"{ratios[least]:.1f}× ({least.contender}, {least.network}) to {ratios[most]:.0f}× "
            ours += f"({most.contender}, {most.network})"
        claim = f"given the same time, RMSE of {len(PEERS)} stochastic peers over that of `columns=2`, {text}: ≥ 10×"
        rows.append(Row(claim, ours, verdict_of(mine, runs)))
    return rows


def affordable(budget: float, few: tuple[int, float], many: tuple[int, float], step: int) -> int:
    """How many probes fit into a time, if a call takes a + b·probes.

    Args:
        budget: Seconds.
        few: The smallest number of probes, and the seconds of a call with it.
        many: A larger number, and its seconds.
        step: The number must be a multiple of this.

    Returns:
        The number, at least the smallest.
    """
    (least, short), (more, long) = few, many
    slope = (long - short) / (more - least)
    if short >= budget:
        return least
    # Probes that seem to cost nothing are noise; then what was measured to fit is what is known to fit.
    fits = more if slope <= 0 else least + (budget - short) / slope
    return max(least, step * math.floor(fits / step))


def errors(estimates: Sequence[Mapping[str, float]], truth: Mapping[str, float]) -> dict[str, float]:
    """The relative root mean squared error of each trace, and of the total.

    Args:
        estimates: One for each repeat: name → trace, or ``"total"`` → trace.
        truth: Name → trace; what is 0 is left out.

    Returns:
        Name → error, ``"total"`` included.
    """
    whole = sum(truth.values())
    found = {}
    for name, exact in {**truth, "total": whole}.items():
        if name == "total":
            values = [float(e["total"]) if "total" in e else sum(map(float, e.values())) for e in estimates]
        elif exact > 0 and name in estimates[0]:
            values = [float(estimate[name]) for estimate in estimates]
        else:
            continue
        found[name] = math.sqrt(statistics.fmean((value - exact) ** 2 for value in values)) / exact
    return found


def repeated(estimate: Estimator, probes: int, repeats: int, patience: float) -> list[Mapping[str, float]]:
    """The same estimate again and again, with fresh probes.

    Args:
        estimate: What to repeat.
        probes: Its number of probes.
        repeats: How often.
        patience: Seconds after which no further repeat begins; the first five always do.

    Returns:
        The estimates.
    """
    began, found = time.perf_counter(), []
    while len(found) < repeats and (len(found) < 5 or time.perf_counter() - began < patience):
        found.append({name: float(value) for name, value in estimate(probes).items()})
    return found


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
        truth = ms_optim.hessian_trace(copy.deepcopy(model).double(), x.double())
        estimators: dict[str, Estimator] = {}
        for name in (SAMPLED, *PEERS, *WHOLE):
            try:
                estimators[name] = CONTENDERS[name].make(model, x, y)
                estimators[name](CONTENDERS[name].step)
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result, and says how
                runs.append(failure(network, name, error))
                estimators.pop(name, None)
        smallest = {
            name: (lambda estimate=estimate, name=name: estimate(CONTENDERS[name].step))
            for name, estimate in estimators.items()
        }
        timings = paired(network, smallest, 5 if full else 1, device=device, warm=1, budget=60)
        seconds = {
            name: statistics.median(run["seconds"] for run in timings if run["contender"] == name) for name in smallest
        }
        runs += timings
        for name, estimate in estimators.items():
            least, probes = CONTENDERS[name].step, CONTENDERS[name].step
            if name != SAMPLED and seconds[name] < seconds[SAMPLED]:
                many = statistics.median(timed(lambda: estimate(4 * least), device) for _ in range(5))  # noqa: B023
                probes = affordable(seconds[SAMPLED], (least, seconds[name]), (4 * least, many), least)
            began = time.perf_counter()
            try:
                found = repeated(estimate, probes, REPEATS if full else 5, PATIENCE)
            except Exception as error:  # noqa: BLE001 - as above: some estimators fail for some of their probes only
                if name == SAMPLED:
                    raise
                runs.append(failure(network, name, error))
                continue
            spent = (time.perf_counter() - began) / len(found)
            shared = {"network": network, "contender": name, "probes": probes, "repeats": len(found), "call": spent}
            for layer, error in errors(found, truth).items():
                runs.append({**shared, "round": layer, "rmse_total" if layer == "total" else "rmse": error})
    return runs


def details(runs: Sequence[Run]) -> list[str]:
    """The errors behind the ratios.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = [
        "| network | estimator | probes | seconds | repeats | relative RMSE: median layer | worst layer | total |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for network, name in dict.fromkeys((run["network"], run["contender"]) for run in runs if "call" in run):
        mine = [run for run in runs if (run["network"], run["contender"]) == (network, name) and "call" in run]
        layers = [run["rmse"] for run in mine if "rmse" in run]
        (total,) = [run["rmse_total"] for run in mine if "rmse_total" in run]
        middle, worst = (f"{statistics.median(layers):.1%}", f"{max(layers):.1%}") if layers else ("—", "—")
        probes, call, repeats = (mine[0][key] for key in ("probes", "call", "repeats"))
        cells = (network, name, probes, f"{call:.3g}", repeats, middle, worst, f"{total:.1%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    harness.main(str(__doc__), "equal_time", measure, arguments, DEVICES)


if __name__ == "__main__":
    main()
