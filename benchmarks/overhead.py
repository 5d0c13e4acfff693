r"""A step of MSSAM costs two forward and backward passes and little else, in time and in memory.

Method: see :mod:`benchmarks.harness` and :mod:`benchmarks.memory`.  A batch of 128 random images and ten classes, the
networks in training mode, cross-entropy, float32, torch's SGD with momentum as the base of everybody: the MLP
784-512-128-512-10 and, for 32×32 images, timm's ResNet-18 and ViT-tiny in patches of 4×4.  On the CPU with one thread.
A method's first step is taken on eight images before anything is timed, and makes the optimizer's state and the first
refresh; the discovery of the scale group is apart.  On the MLP a method then takes twenty steps at a time, enough for
its own weights, not another's, to be in the cache, and on the others one.

*A refresh.*  ``refresh_every=100``: of a hundred steps ninety-nine have no refresh and one has.  Both kinds are timed
apart, and a step of MSSAM or MSRegularizedSGD is 0.99 of the first in each round and 0.01 of the median of the second,
which takes part in fewer rounds.

*Memory* is how far a new process is lifted above its model and its inputs by a new optimizer that takes two steps: the
first on eight images, discovery included, the second on the batch, with a refresh where there are refreshes at all.  In
the second everything is there that a long training has at once: gradients, the base optimizer's state, saved weights,
activations.  Freed memory goes back to the system at once (:func:`benchmarks.memory.only_what_is_alive`).  The same for
everybody.

*Peers* are driven as their authors' examples do: davda54/sam in two steps with BatchNorm's statistics off in the second
pass, SamsungLabs/ASAM (ASAM and its SAM) by ascent and descent, moskomule/sam.pytorch and pytorch_optimizer by closure.
They come from checkouts (``--davda54 PATH --asam PATH --moskomule PATH``) and, the last, from the package.

Goals, on each network: MSSAM at most 1.05 times two passes without any optimizer; its peak of memory at most that of
SAM, ours and davda54's; MSRegularizedSGD with ``gradient="noise"``, one pass, at most 1.05 times SGD.  No tolerance.
Two passes and a step of torch's SGD are in the table, too: no SAM around SGD can do with less.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ms_optim

from . import harness, memory
from .harness import Claim, Contender, Run
from .methods import (
    ASAM,
    DAVDA54,
    FUSED,
    METRIC,
    MOMENTUM,
    MOSKOMULE,
    MOVE,
    NOISE,
    ONE,
    PACKAGE,
    REFRESHED,
    SAM,
    SAMSUNG,
    SAMSUNG_SAM,
    SGD,
    TRACE,
    TWO,
    TWO_SGD,
    WITH,
    WITHOUT,
    Paths,
    Step,
    made,
    methods,
)
from .networks import problem
from .render import side_by_side

DEVICES = ("cpu", "cuda")
_BATCH, _FEW = 128, 8


@dataclass(frozen=True)
class Effort:
    """How much of a network is measured on the CPU, where a pass through the larger ones takes seconds.

    Attributes:
        steps: That are taken at a time.
        rounds: Of those that have a goal and what they are divided by.
        others: Of everybody else.
        refreshes: Of steps with a refresh.
        budget: Seconds after which no further round begins.
        peaks: Processes for each peak of memory.
        warm: Calls before the first round, where they cost little.
    """

    steps: int
    rounds: int
    others: int
    refreshes: int
    budget: float
    peaks: int
    warm: int


EFFORT = {
    "mlp": Effort(20, 30, 30, 10, 120, 3, 1),
    "resnet18": Effort(1, 4, 2, 1, 400, 1, 0),
    "vit_tiny": Effort(1, 4, 2, 1, 240, 1, 0),
}
_CUDA = Effort(10, 30, 30, 10, 60, 1, 2)
_SMOKE = Effort(1, 2, 1, 1, 1, 1, 0)

PRINCIPAL = (ONE, TWO, SGD, TWO_SGD, SAM, MOVE, METRIC, NOISE)


def claims(network: str) -> list[Claim]:
    """The rows of a network.

    Args:
        network: Its name.

    Returns:
        The claims.
    """
    time = functools.partial(Claim, network)
    peak = functools.partial(Claim, network, quantity="peak_bytes")
    return [
        time("MSSAM[move], in two passes", MOVE, TWO, 1.05),
        time("MSSAM[metric], in two passes", METRIC, TWO, 1.05),
        time("two passes + torch's SGD step, in two passes", TWO_SGD, TWO),
        time("MSSAM[move], in two passes + torch's SGD step", MOVE, TWO_SGD),
        *([time("MSSAM[move] with `fused=True` for its SGD, in two passes", FUSED, TWO)] if network == "mlp" else []),
        time("MSSAM[move], a step with a refresh, in two passes", MOVE + WITH, TWO),
        time("MSSAM[move] with a refresh every 100 steps, in steps without", MOVE, MOVE + WITHOUT),
        time("ms_optim.SAM, in two passes", SAM, TWO),
        time("ms_optim.ASAM[elementwise], in two passes", ASAM, TWO),
        *(time(f"{peer}, in two passes", peer, TWO) for peer in (DAVDA54, SAMSUNG, SAMSUNG_SAM, MOSKOMULE, PACKAGE)),
        time("MSRegularizedSGD[trace], in two passes", TRACE, TWO),
        time("MSRegularizedSGD[noise], in steps of SGD", NOISE, SGD, 1.05),
        time("ms_optim.SAM with `ascent='momentum'`, in steps of SGD", MOMENTUM, SGD),
        time("torch's SGD, in one pass", SGD, ONE),
        peak("peak memory of MSSAM[move], over ms_optim.SAM's", MOVE, SAM, 1.0),
        peak(f"peak memory of MSSAM[move], over that of {DAVDA54}", MOVE, DAVDA54, 1.0),
        peak("peak memory of MSSAM[move] without a refresh, over ms_optim.SAM's", MOVE + WITHOUT, SAM),
        peak("peak memory of ms_optim.SAM, over that of two passes + SGD", SAM, TWO_SGD),
        peak("peak memory of MSRegularizedSGD[noise], over SGD's", NOISE, SGD),
    ]


CLAIMS = [claim for network in EFFORT for claim in claims(network)]


def timed(network: str, full: bool, device: str, paths: Paths, effort: Effort) -> list[Run]:
    """Seconds of a step of everybody.

    Args:
        network: The network.
        full: The network itself, or its stand-in.
        device: Where it runs.
        paths: Peer → checkout.
        effort: How much is measured.

    Returns:
        The lines, the mean of a hundred steps among them.
    """
    contenders: dict[str, Contender] = {}
    runs: list[Run] = []
    slow: dict[str, int] = {}
    group = discovered(network, full, device)
    for method in methods(network, paths):
        for name in (method + WITHOUT, method + WITH) if method in REFRESHED else (method,):
            model, x, y = problem(network, full, device, batch=_BATCH)
            try:
                step = made(name, model.train(), paths, group)
                step(x[:_FEW], y[:_FEW])
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result, and says how
                runs.append(harness.failure(network, method, error))
                break
            contenders[name] = functools.partial(repeated, step, x, y, effort.steps)
            if not effort.warm and method == ONE:
                step(x, y)  # for what is made once for each size of batch, whoever needs it first
            if name.endswith(WITH):
                slow[name] = effort.refreshes
            elif method not in PRINCIPAL:
                slow[name] = effort.others
    slow = {name: rounds for name, rounds in slow.items() if rounds < effort.rounds}
    found = harness.paired(
        *(network, contenders, effort.rounds), slow=slow, budget=effort.budget, device=device, warm=effort.warm
    )
    for run in found:
        if "seconds" in run:
            run["seconds"] /= effort.steps
    return runs + found + hundred(found)


def discovered(network: str, full: bool, device: str) -> ms_optim.ScaleGroup:
    """The scale group of a network, which all its copies share.

    Args:
        network: The network.
        full: The network itself, or its stand-in.
        device: Where it runs.

    Returns:
        The group.
    """
    model, x, _ = problem(network, full, device, batch=_FEW)
    return ms_optim.scale_symmetries(model.train(), x[:_FEW])


def repeated(step: Step, x: Tensor, y: Tensor, steps: int) -> None:
    """Some steps on the same batch.

    Args:
        step: The step.
        x: Images.
        y: Labels.
        steps: How many.
    """
    for _ in range(steps):
        step(x, y)


def hundred(runs: Sequence[Run]) -> list[Run]:
    """What a step costs on average where one in a hundred has a refresh.

    Args:
        runs: Lines of one network, of steps with and without.

    Returns:
        A line for each that has none.
    """
    found = []
    for method in REFRESHED:
        refreshes = [run["seconds"] for run in runs if run["contender"] == method + WITH and "seconds" in run]
        for run in runs:
            if refreshes and run["contender"] == method + WITHOUT and "seconds" in run:
                seconds = 0.99 * run["seconds"] + 0.01 * statistics.median(refreshes)
                found.append({**run, "contender": method, "seconds": seconds})
    return found


def prepared(
    name: str,
    network: str,
    full: bool,
    threads: int,
    device: str,
    paths: Paths,
    group: ms_optim.ScaleGroup | None = None,
) -> Contender:
    """Model and inputs of a process of its own, in which the stand-in has paid for what a method imports.

    Args:
        name: The method.
        network: The network.
        full: The network itself, or its stand-in.
        threads: The number of torch's threads.
        device: Where it runs.
        paths: Peer → checkout.
        group: The scale group; discovered in the first step if ``None``.

    Returns:
        A new optimizer and its first two steps.
    """
    torch.set_num_threads(threads)
    if full:
        memory.only_what_is_alive()
        prepared(name, network, False, threads, device, paths)()
    model, x, y = problem(network, full, device, batch=_BATCH)
    model.train()

    def two_steps() -> None:
        step = made(name, model, paths, group)
        step(x[:_FEW], y[:_FEW])
        step(x, y)

    return two_steps


def peaks(network: str, names: Sequence[str], full: bool, device: str, paths: Paths, effort: Effort) -> list[Run]:
    """Peaks of memory.

    Args:
        network: The network.
        names: The methods.
        full: The network itself, or its stand-in, whose peaks are taken in this process.
        device: Where it runs.
        paths: Peer → checkout.
        effort: How much is measured.

    Returns:
        The lines.
    """
    runs: list[Run] = []
    group = None if full else discovered(network, full, device)
    for name in names:
        for index in range(effort.peaks):
            arguments = (name, network, full, torch.get_num_threads(), device, dict(paths))
            if full:
                found = memory.peak_above(prepared, *arguments, device=device)
            else:
                lifted = memory.lift(prepared(*arguments, group), device)
                found = dict(zip(("peak_bytes", "method"), lifted, strict=True))
            runs.append({"network": network, "contender": name, "round": index, **found})
    return runs


def measure(scale: str, device: str, paths: Paths) -> list[Run]:
    """All runs.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.
        device: Where they run.
        paths: Peer → checkout.

    Returns:
        The lines.
    """
    full = scale == "cpu"
    runs: list[Run] = []
    for network, effort in EFFORT.items():
        effort = _SMOKE if not full else effort if device == "cpu" else _CUDA
        found = timed(network, full, device, paths, effort)
        failed = {run["contender"] for run in found if "failed" in run}
        names = [name for name in (*methods(network, paths), MOVE + WITHOUT) if name not in failed]
        runs += found + peaks(network, names, full, device, paths, effort)
    given = {path: peer for peer, path in reversed(paths.items()) if path is not None}
    return runs + [{"network": "", "contender": peer, "commit": revision(path)} for path, peer in given.items()]


def revision(path: str) -> str:
    """The commit of a checkout.

    Args:
        path: Its folder.

    Returns:
        The commit; "unknown" for a folder that is no checkout.
    """

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", path, *command], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    top = git("rev-parse", "--show-toplevel")
    return git("rev-parse", "HEAD") if top and Path(top).resolve() == Path(path).resolve() else "unknown"


def details(runs: Sequence[Run]) -> list[str]:
    """What every method took, and which commits of the peers were measured.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = side_by_side([run for run in runs if "commit" not in run], TWO, ORDER)
    commits = [f"{run['contender']} at {run['commit'][:10]}" for run in runs if "commit" in run]
    return [*lines, "", f"Peers: {', '.join(commits)}."] if commits else lines


ORDER = [
    *(ONE, TWO, SGD, TWO_SGD, SAM, ASAM, MOVE, MOVE + WITHOUT, MOVE + WITH, METRIC, METRIC + WITHOUT, METRIC + WITH),
    *(FUSED, FUSED + WITHOUT, FUSED + WITH, NOISE, NOISE + WITHOUT, NOISE + WITH, MOMENTUM),
    *(TRACE, TRACE + WITHOUT, TRACE + WITH, DAVDA54, SAMSUNG, SAMSUNG_SAM, MOSKOMULE, PACKAGE),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--threads", default="1")
    for option in ("--davda54", "--asam", "--moskomule"):
        parser.add_argument(option)
    peers, rest = parser.parse_known_args(arguments)
    paths = {DAVDA54: peers.davda54, SAMSUNG: peers.asam, SAMSUNG_SAM: peers.asam, MOSKOMULE: peers.moskomule}
    rest += ["--threads", peers.threads]
    harness.main(str(__doc__), "overhead", functools.partial(measure, paths=paths), rest, DEVICES)


if __name__ == "__main__":
    main()
