r"""How everything here is measured: paired rounds, ratios within a round, the median and the middle half.

*Time.*  A round runs every contender once, in random order, so that whatever else the machine does in these seconds
meets all of them.  The ratio of a contender to its reference is taken within each round and only then summarised:
median [first quartile, third quartile] (n rounds).  Contenders run twice before the first round, which pays for
allocation, discovery and a first refresh.  A slow contender may sit out the later rounds and the warming up; its n
says so.  Rounds end early when their time is spent, for one machine is slower than another, or busy.

On CUDA the device is waited for before and after.

*Memory.*  See :mod:`benchmarks.memory`.

*Verdict.*  There is no tolerance: a goal is reached if the median is at most the goal (at least, for a speed-up).
Where the middle half of the rounds lies on both sides of it, the verdict says so.

A run leaves ``environment.json`` and ``runs.jsonl``, one line per contender and round; tables are made of these alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ms_optim.machine import processor

RESULTS = Path(__file__).parent / "results"
Run = dict[str, Any]
Contender = Callable[[], object]


@dataclass(frozen=True)
class Claim:
    """One row of a table: what is measured, against what, and what was aimed at.

    Attributes:
        network: The network it is about.
        text: The claim, in words.
        contender: The contender, or several with weights that sum to what is claimed.
        reference: What it is divided by; of several, the one with the smallest median; ``None`` for a peak of memory,
            in GiB.
        goal: The largest value that fulfils the claim; ``None`` for a row that is there to compare with.
        quantity: What is divided: the lines' ``"seconds"``, ``"peak_bytes"``, or another number that they hold.
        at_least: Whether the goal is the smallest value that fulfils the claim instead, as for a speed-up.
        worst: Whether the worst ratio counts, not the median.
    """

    network: str
    text: str
    contender: str | Mapping[str, float]
    reference: str | tuple[str, ...] | None
    goal: float | None = None
    quantity: str = "seconds"
    at_least: bool = False
    worst: bool = False

    @property
    def terms(self) -> dict[str, float]:
        """Contender → weight."""
        return {self.contender: 1.0} if isinstance(self.contender, str) else dict(self.contender)


@dataclass(frozen=True)
class Summary:
    """The middle of a sample.

    Attributes:
        median: Its median.
        low: The first quartile.
        high: The third quartile.
        n: Its size.
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high, len(values))


def paired(
    network: str,
    contenders: Mapping[str, Contender],
    rounds: int,
    seed: int = 0,
    slow: Mapping[str, int] | None = None,
    budget: float = math.inf,
    device: str = "cpu",
    warm: int = 2,
) -> list[Run]:
    """Time contenders against each other.

    Args:
        network: Written into every line.
        contenders: Name → what to time.
        rounds: The number of rounds.
        seed: Of the order within the rounds.
        slow: Name → the number of rounds that a slow contender takes part in; it is not warmed up.
        budget: Seconds, warming up included, after which no further round begins; the first three always do.
        device: Where the contenders run.
        warm: The number of calls before the first round.

    Returns:
        One line per contender and round; one line with ``failed`` for a contender that raised.
    """
    order, slow = random.Random(seed), slow or {}
    runs: list[Run] = []
    alive = dict(contenders)
    began = time.perf_counter()
    for name, contender in contenders.items():
        try:
            for _ in range(0 if name in slow else warm):
                contender()
        except Exception as error:  # noqa: BLE001 - a peer that fails is a result, and says how
            runs.append(failure(network, name, error))
            del alive[name]
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - began > budget:
            break
        names = [name for name in alive if index < slow.get(name, rounds)]
        order.shuffle(names)
        for name in names:
            runs.append({"network": network, "contender": name, "round": index, "seconds": timed(alive[name], device)})
    return runs


def timed(contender: Contender, device: str = "cpu") -> float:
    """Seconds of one call, the device's work included.

    Args:
        contender: What to time.
        device: Where it runs.

    Returns:
        Seconds.
    """
    settle(device)
    start = time.perf_counter()
    contender()
    settle(device)
    return time.perf_counter() - start


def settle(device: str) -> None:
    """Wait until a CUDA device has done what it was given.

    Args:
        device: Its name; nothing waits for a CPU.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def failure(network: str, name: str, error: Exception) -> Run:
    """The line of a contender that raised.

    Args:
        network: The network.
        name: The contender.
        error: What it raised; a missing module is a peer that is not installed.

    Returns:
        The line.
    """
    if isinstance(error, ModuleNotFoundError):
        return missing(network, name)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return {"network": network, "contender": name, "failed": text[:200]}


def missing(network: str, name: str) -> Run:
    """The line of a peer that is not installed."""
    return {"network": network, "contender": name, "failed": "not installed"}


def evaluate(claim: Claim, runs: Sequence[Run]) -> Summary | str:
    """What the runs say about a claim.

    Args:
        claim: The claim.
        runs: All lines of one run of its script.

    Returns:
        The summary, or why there is none.
    """
    mine = [run for run in runs if run["network"] == claim.network]
    names = {*claim.terms, claim.reference}
    failures = [run["failed"] for run in mine if "failed" in run and run["contender"] in names]
    if failures:
        return str(failures[0])
    if claim.reference is None:
        peaks = [run["peak_bytes"] / 2**30 for run in mine if run["contender"] in claim.terms]
        return Summary.of(peaks) if peaks else "not measured"
    values = {(run["contender"], run.get("round", 0)): run[claim.quantity] for run in mine if claim.quantity in run}
    reference = fastest(claim.reference, values)
    ratios = []
    for (name, index), divisor in values.items():
        if name == reference and all((term, index) in values for term in claim.terms):
            total = sum(weight * values[term, index] for term, weight in claim.terms.items())
            ratios.append(total / divisor if divisor else math.inf)
    if not ratios:
        return "not measured"
    return Summary.of([min(ratios) if claim.at_least else max(ratios)] if claim.worst else ratios)


def fastest(names: str | tuple[str, ...], values: Mapping[tuple[str, Any], float]) -> str | None:
    """The name with the smallest median.

    Args:
        names: One, or several to choose from.
        values: (Name, round) → value.

    Returns:
        The name; ``None`` if there are no values for any.
    """
    medians = {}
    for name in (names,) if isinstance(names, str) else names:
        found = [value for (mine, _), value in values.items() if mine == name]
        if found:
            medians[name] = statistics.median(found)
    return min(medians, key=medians.__getitem__) if medians else None


def verdict(found: Summary | str, goal: float | None, at_least: bool = False) -> str:
    """Reached or missed, in words.

    Args:
        found: What was measured, or why nothing was.
        goal: The largest value that fulfils the claim.
        at_least: Whether it is the smallest one instead.

    Returns:
        A word or two.
    """
    if isinstance(found, str):
        if goal is None:
            return "—"
        return "not measured" if found in ("not measured", "not installed") else "nothing to compare with"
    if goal is None:
        return "for comparison"
    word = "reached" if (found.median >= goal if at_least else found.median <= goal) else "**missed**"
    both = found.low < goal <= found.high if at_least else found.low <= goal < found.high
    return f"{word}, but the middle half has both" if both else word


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine or its folders.

    Args:
        threads: The number of torch's threads.
        device: Where the contenders run.

    Returns:
        Plain values.
    """
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    versions = {}
    for package in (
        *("timm", "numpy", "scipy", "pillow", "backpack-for-pytorch", "curvlinops-for-pytorch", "PyHessian"),
        "pytorch_optimizer",
    ):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "..", ":(exclude)results")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor() or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        # Well above the number of threads: the machine had other work, and the spread shows it.
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def record(folder: Path, described: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Write ``environment.json`` and ``runs.jsonl``, of which all tables are made.

    Args:
        folder: Where; made if it is not there.
        described: The environment.
        runs: All lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"environment.json": json.dumps(described, indent=2) + "\n"}
    texts["runs.jsonl"] = "".join(json.dumps(run) + "\n" for run in runs)
    for name, text in texts.items():
        # All or nothing: who is interrupted here has the lines of before.
        (folder / f"{name}.new").write_text(text, encoding="utf-8")
        (folder / f"{name}.new").replace(folder / name)


def main(
    description: str,
    name: str,
    measure: Callable[[str], list[Run]] | Callable[[str, str], list[Run]],
    arguments: Sequence[str] | None,
    devices: Sequence[str] = ("cpu",),
) -> None:
    """The command line of a benchmark: measure, write, and print the table.

    Args:
        description: For ``--help``.
        name: The claim's name, that of its script and its folder of results.
        measure: Takes the scale, and the device if there is a choice; gives the lines.
        arguments: Of the command line; ``None``: the process's own.
        devices: Where the script can run.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["cpu", "smoke"], default="cpu", help="smoke: tiny, to see that it runs")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of results/<claim>/ (default: here for cpu, none for smoke)")
    parser.add_argument("--device", choices=devices, default="cpu", help="where the contenders run")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False here; leave it out to measure the CPU")
    torch.set_num_threads(options.threads)
    described = environment(options.threads, options.device)
    choice = () if len(devices) == 1 else (options.device,)
    began = time.monotonic()
    runs = measure(options.scale, *choice)
    described["minutes"] = round((time.monotonic() - began) / 60, 1)
    described["load_average_after"] = round(os.getloadavg()[0], 2)
    out = options.out or (RESULTS if options.scale == "cpu" else None)
    if out is not None:
        record(out / name / folder_name(described), described, runs)

    from .render import table  # the renderer imports the scripts, whose claims it prints

    print(table(name, described, runs))


def folder_name(described: Mapping[str, Any]) -> str:
    """The folder of one run.

    Args:
        described: The environment.

    Returns:
        ``<date>_cpu<threads>`` or ``<date>_cuda_<name of the device>``.
    """
    date = described["date"].split()[0]
    if described.get("device", "cpu") == "cpu":
        return f"{date}_cpu{described['threads']}"
    return f"{date}_cuda_{re.sub('[^a-z0-9]+', '-', described['device'].lower()).strip('-')}"
