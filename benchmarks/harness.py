r"""How everything here is measured: paired rounds, ratios within a round, the median and the middle half.

*Time.*  A round runs every contender once, in random order, so that whatever else the machine does in these seconds
meets all of them.  The ratio of a contender to its reference is taken within each round and only then summarised:
median [first quartile, third quartile] (n rounds).  Contenders run twice before the first round, which pays for
allocation, discovery and a first refresh.  A slow contender may sit out the later rounds and the warming up; its n
says so.  Rounds end early when their time is spent, for one machine is slower than another, or busy.

*Memory.*  The peak resident set of a process of its own (``getrusage``, ``ru_maxrss``), which contains the interpreter,
torch and everything the process did.

*Verdict.*  There is no tolerance: a goal is reached if the median is at most the goal.  Where the middle half of the
rounds lies on both sides of it, the verdict says so.

A run leaves ``environment.json`` and ``runs.jsonl``, one line per contender and round; tables are made of these alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

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
        reference: What it is divided by; ``None`` for a peak of memory, in GiB.
        goal: The largest value that fulfils the claim; ``None`` for a row that is there to compare with.
    """

    network: str
    text: str
    contender: str | Mapping[str, float]
    reference: str | None
    goal: float | None = None

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
) -> list[Run]:
    """Time contenders against each other.

    Args:
        network: Written into every line.
        contenders: Name → what to time.
        rounds: The number of rounds.
        seed: Of the order within the rounds.
        slow: Name → the number of rounds that a slow contender takes part in; it is not warmed up.
        budget: Seconds, warming up included, after which no further round begins; the first three always do.

    Returns:
        One line per contender and round; one line with ``failed`` for a contender that raised.
    """
    order, slow = random.Random(seed), slow or {}
    runs: list[Run] = []
    alive = dict(contenders)
    began = time.perf_counter()
    for name, contender in contenders.items():
        try:
            for _ in range(0 if name in slow else 2):
                contender()
        except Exception as error:  # noqa: BLE001 - a peer that fails is a result, and says how
            runs.append({"network": network, "contender": name, "failed": f"{type(error).__name__}: {error}"[:200]})
            del alive[name]
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - began > budget:
            break
        names = [name for name in alive if index < slow.get(name, rounds)]
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            alive[name]()
            seconds = time.perf_counter() - start
            runs.append({"network": network, "contender": name, "round": index, "seconds": seconds})
    return runs


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
    failures = [run["failed"] for run in mine if "failed" in run and run["contender"] in claim.terms]
    if failures:
        return str(failures[0])
    if claim.reference is None:
        peaks = [run["peak_bytes"] / 2**30 for run in mine if run["contender"] in claim.terms]
        return Summary.of(peaks) if peaks else "not measured"
    seconds = {(run["contender"], run["round"]): run["seconds"] for run in mine if "seconds" in run}
    ratios = []
    for (name, index), reference in seconds.items():
        if name == claim.reference and all((term, index) in seconds for term in claim.terms):
            ratios.append(sum(weight * seconds[term, index] for term, weight in claim.terms.items()) / reference)
    return Summary.of(ratios) if ratios else "not measured"


def verdict(found: Summary | str, goal: float | None) -> str:
    """Reached or missed, in words."""
    if isinstance(found, str):
        return "not measured" if goal is not None else "—"
    if goal is None:
        return "for comparison"
    word = "reached" if found.median <= goal else "**missed**"
    return f"{word}, but the middle half has both" if found.low <= goal < found.high else word


def peak_bytes(function: Callable[..., None], *args: Any) -> int:
    """The peak resident set of a new process that runs ``function(*args)`` and ends.

    Args:
        function: Importable, since the process is spawned.
        *args: Its arguments.

    Returns:
        Bytes.

    Raises:
        RuntimeError: If the process failed.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(child, function, args))
    process.start()
    child.close()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the measured process ended with {process.exitcode}; run {function.__name__} by itself")
    return int(parent.recv())


def _measured(channel: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run and report; in the new process."""
    function(*args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    channel.send(peak if sys.platform == "darwin" else 1024 * peak)


def environment(threads: int) -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine or its folders.

    Args:
        threads: The number of torch's threads.

    Returns:
        Plain values.
    """
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    versions = {}
    for package in ("timm", "numpy", "scipy", "backpack-for-pytorch", "pytorch_optimizer"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "..")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        # Well above the number of threads: the machine had other work, and the spread shows it.
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def record(folder: Path, described: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Write ``environment.json`` and ``runs.jsonl``, of which all tables are made.

    Args:
        folder: Where; made if it is not there.
        described: The environment.
        runs: All lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))


def main(description: str, name: str, measure: Callable[[str], list[Run]], arguments: Sequence[str] | None) -> None:
    """The command line of a benchmark: measure, write, and print the table.

    Args:
        description: For ``--help``.
        name: The claim's name, that of its script and its folder of results.
        measure: Takes the scale, gives the lines.
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["cpu", "smoke"], default="cpu", help="smoke: tiny, to see that it runs")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of results/<claim>/ (default: here for cpu, none for smoke)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    described = environment(options.threads)
    runs = measure(options.scale)
    described["load_average_after"] = round(os.getloadavg()[0], 2)
    out = options.out or (RESULTS if options.scale == "cpu" else None)
    if out is not None:
        record(out / name / f"{described['date'].split()[0]}_cpu{options.threads}", described, runs)

    from .render import table  # the renderer imports the scripts, whose claims it prints

    print(table(name, described, runs))
