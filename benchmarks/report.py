"""The report: one page that says of every claim what the paper has, what was measured here, and what came of it.

It is rendered from the newest run of every claim, as the pages of the claims are (:mod:`benchmarks.render`); what is
written by hand here has no number that was measured.  A script is in the report because it is in the folder: with
``summary(runs)`` its rows are its own, with ``CLAIMS`` they are made of those with a goal, with neither the report
points at its page, and without results it says so, with the command.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import demonstration, scripts
from .harness import RESULTS, evaluate, verdict
from .render import Measured, devices_of, newest
from .rows import NOTHING, Row, did_not_work, of_claims

#: Chapter → claims, in the order of the page; a script that is in none comes last.
CHAPTERS: dict[str, tuple[str, ...]] = {
    "Curvature, exact and fast": (
        *("paper_efficiency", "trace_limit", "trace_speed", "peers", "equal_time", "diagonal_error", "trace_growth"),
        "refresh_memory",
    ),
    "What a step costs": ("overhead", "cost", "throughput"),
    "What sharpness says about generalization": ("random_labels", "flat_minima"),
    "Accuracy": (
        *("scale_robustness", "demo", "equal_budget", "weight_noise", "universal_class", "gauge", "choosing"),
    ),
    "Laws of an optimizer": ("conformance",),
}
OTHERS = "Others"
_CHECKOUTS = "--davda54 PATH --asam PATH --moskomule PATH"
OPTIONS = {"overhead": _CHECKOUTS, "conformance": _CHECKOUTS, "throughput": "--device cuda"}
#: Of runs that did not write down how long they took.
MINUTES = {
    "trace_speed": "3",
    "paper_efficiency": "15 to 25",
    "diagonal_error": "8",
    "peers": "15 to 25",
    "equal_time": "15",
    "trace_limit": "6",
    "trace_growth": "11",
    "overhead": "25 (1 core)",
    "flat_minima": "30 (1 core; needs a C compiler)",
    "universal_class": "10 to 15",
    "conformance": "1 (1 core)",
    "refresh_memory": "1",
    "choosing": "13 of one core, in all",
    "demo": "a few",
    "throughput": "needs a GPU",
}
UNKNOWN_MINUTES = "see its docstring"

TOP = """\
# Benchmarks

Every row is computed from raw results that are committed, by `python -m benchmarks.render`; a test renders this page
again and compares. Times and memory: median [quartiles] (n rounds). Trainings: mean ± standard error (n seeds), and
differences are paired by seed; "better" and "worse" are beyond two standard errors and, of fewer than five seeds,
beyond the 95 % interval by t; in `equal_budget` (but beside SGD) and `weight_noise` they are so after Holm's
correction; in `gauge` they are uncorrected, and many. A goal is reached or missed, without tolerance. "–": the papers
have no such number. The last column leads to all that was measured for the claim: machine, versions, every contender.
The method is the docstring of the script of that name.
"""

FINDINGS = (
    "In `universal_class` learning rate and momentum are the same for all, and too high for a SAM of a usual radius: "
    "SAM, ASAM and MSSAM choose the smallest or second smallest of their radii. RSAM's gain over SAM there is none "
    "over SGD.",
    "A step of SAM on an MLP whose weights are large beside its work cannot cost two passes and nothing else: norms "
    "are read, weights written, saved and restored, and torch's own SGD step is about at the goal already.",
    "BackPACK cannot do a vision transformer, and PyHessian and curvlinops have no exact trace: nothing to compare "
    "with.",
)

PROSE = """\
## How it is measured

`make benchmarks` (`python -m benchmarks`) runs every script at `--scale smoke`, each in a process of its own, renders
pages and figures of what came out, and throws it away: minutes on two cores, to see that everything runs.
`python -m benchmarks --scale cpu` measures all of it anew, one script at a time: hours. Run what is to be committed
from the root of a checkout, on a machine that does nothing else: every other process is in the way, and the quartiles
(and the load averages on the page) show it. `--threads` sets torch's threads.

**Method** ([harness.py](harness.py), [memory.py](memory.py), [trials.py](trials.py)). A round runs every contender once
in random order; the ratio to the reference is taken within the round. Memory is the peak of a process of its own: its
whole resident set, or how far one call lifts it above model and inputs (Linux's VmHWM, set back before the call). Of
trainings a seed draws data, weights and order, the same for all; the docstring says how settings were chosen, and on
which seeds. Misses stay.

What is committed of curvature (`cpu1`) ran with one thread on a core of its own, while the other core ran tests: ratios
hold within a few per cent, seconds do not.

**Peers.** Packages to compare with are optional; a row says "not installed" where one is missing. They are best kept
out of the working environment:

    python -m pip install --target /tmp/peers --no-deps backpack-for-pytorch einops unfoldNd pytorch_optimizer \\
        curvlinops-for-pytorch einconv linear_operator opt-einsum jaxtyping wadler-lindig mpmath typeguard pyhessian
    PYTHONPATH=/tmp/peers python -m benchmarks.peers

The SAMs of other authors that are no packages are given to `overhead` and `conformance` as checkouts of `davda54/sam`,
`SamsungLabs/ASAM` and `moskomule/sam.pytorch`; without them the tables say "not measured". Their commits are in the
results. What a peer cannot do is in the table as "unsupported", with the peer's error.

**Data.** What measures on MNIST or CIFAR-10 reads them from the folder that `MS_OPTIM_DATA` names:
`MNIST/raw/train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the `t10k-*` pair; `cifar10/{train,test}.tar`.
Nothing is downloaded. Other scripts use random images: time and memory do not depend on them.

**CUDA.** A script with `--device cuda`, or `--scale paper`, has a part of its page for it, which says "CUDA: not
measured" until such a run is in its folder. `throughput` is about nothing else.

**Results** are committed raw: `results/<claim>/<date>_cpu<threads>/`, or `<date>_cuda_<device>/`, holds
`environment.json` (versions, processor, threads, load, commit) and `runs.jsonl` (a line per contender and round, or per
training). Every `table.md`, figure and this page are made of the newest of them, and of nothing else.
"""


def claims_of(results: Path) -> dict[str, list[str]]:
    """All claims, by chapter.

    Args:
        results: The folder of all results.

    Returns:
        Chapter → scripts that are in the folder, and the demo if it has results.
    """
    there = {*scripts.names(), *(["demo"] if demonstration.newest(results) else [])}
    chapters = {chapter: [name for name in listed if name in there] for chapter, listed in CHAPTERS.items()}
    listed = {name for found in chapters.values() for name in found}
    chapters[OTHERS] = sorted(there - listed)
    return {chapter: found for chapter, found in chapters.items() if found}


def measured_on(name: str, results: Path) -> dict[str, Measured]:
    """The newest runs of a claim.

    Args:
        name: Its script.
        results: The folder of all results.

    Returns:
        Device → run, for those devices that have one; none for the demo, whose results are of its own kind.
    """
    if name == "demo":  # which is no script of the folder
        return {}
    script = importlib.import_module(f"benchmarks.{name}")
    found = {device: newest(results / name, device) for device in devices_of(script)}
    return {device: run for device, run in found.items() if run is not None}


def rows_of(name: str, results: Path) -> list[Row]:
    """What the report says about a claim.

    Args:
        name: Its script, or the demo.
        results: The folder of all results.

    Returns:
        At least one row.
    """
    demo = demonstration.newest(results) if name == "demo" else None
    if demo is not None:
        return demonstration.summary(demo)
    script, rows = importlib.import_module(f"benchmarks.{name}"), []
    for device, run in measured_on(name, results).items():
        if hasattr(script, "summary"):
            found = script.summary(run.runs)
        elif hasattr(script, "CLAIMS"):
            found = of_claims(script.CLAIMS, run.runs)
        else:
            found = [Row(claim_of(name), "see its page", NOTHING)]
        rows += [row if device == "cpu" else row.on(run.environment["device"]) for row in found]
    return rows or [Row(claim_of(name), f"not measured: `{command(name)}`", "not measured")]


def claim_of(name: str) -> str:
    """What a script claims: the first line of its docstring."""
    if name == "demo":
        return "Two starts that are one function: the demo."
    return " ".join(str(importlib.import_module(f"benchmarks.{name}").__doc__).splitlines()[0].split())


def command(name: str) -> str:
    """How a claim is measured."""
    if name == "demo":
        return demonstration.COMMAND
    return f"python -m benchmarks.{name}{f' {OPTIONS[name]}' if name in OPTIONS else ''}"


def minutes(name: str, results: Path) -> str:
    """How long a claim took, from its newest run if that says so.

    Args:
        name: Its script, or the demo.
        results: The folder of all results.

    Returns:
        Minutes, in words.
    """
    run = next(iter(measured_on(name, results).values()), None)
    if run is not None and "minutes" in run.environment:
        threads = run.environment["threads"]
        return f"{max(1.0, run.environment['minutes']):.0f} ({threads} thread{'s' if threads > 1 else ''})"
    if run is not None and all("seconds" in line and "stage" in line for line in run.runs):
        so_far = "in all" if run.environment.get("complete", True) else "so far, and not complete"
        return f"{sum(line['seconds'] for line in run.runs) / 60:.0f} of one core, {so_far}"
    return MINUTES.get(name, UNKNOWN_MINUTES)


def place(results: Path) -> Path:
    """Where the report of a folder of results is: for what is committed, beside the scripts.

    Args:
        results: The folder of all results.

    Returns:
        The file.
    """
    return (results.parent if results.resolve() == RESULTS.resolve() else results) / "README.md"


def page(results: Path) -> str:
    """The report.

    Args:
        results: The folder of all results.

    Returns:
        Markdown.
    """
    claims = claims_of(results)
    rows = {name: rows_of(name, results) for found in claims.values() for name in found}
    links = {name: _link(name, results) for name in rows}
    where = {name: f"[{name}]({link})" if link else name for name, link in links.items()}
    lines = [TOP, "## In short", "", *in_short(claims, results), *overviews(list(rows), results)]
    lines += ["", "## Every claim", ""]
    for chapter, names in claims.items():
        lines += [f"### {chapter}", "", *_table("claim", "the paper's", "ours", "verdict", "page")]
        for name in names:
            shown = [row for row in rows[name] if not row.detail]
            lines += [_line(row.claim, row.paper, row.ours, row.verdict, where[name]) for row in shown]
        lines.append("")
    lines += ["## What did not work", ""]
    lines += ["All that missed a goal, is worse, or shows no difference; rows of variants are here alone.", ""]
    lines += _table("claim", "ours", "verdict", "page")
    for name, found in rows.items():
        lines += [_line(row.claim, row.ours, row.verdict, where[name]) for row in found if did_not_work(row)]
    missing = [name for name, found in rows.items() if all(row.verdict == "not measured" for row in found)]
    lines += ["", *(f"* {finding}" for finding in FINDINGS)]
    lines += ["", f"Not measured yet: {', '.join(missing)}."] if missing else []
    halves = [name for name in rows if _is_stopped(measured_on(name, results))]
    lines += ["", f"Not complete yet, and what is missing is not measured: {', '.join(halves)}."] if halves else []
    without = [name for name in rows if _takes_cuda(name) and "cuda" not in measured_on(name, results)]
    lines += ["", f"Not measured on a GPU yet: {', '.join(without)}."] if without else []
    lines += ["", "## Figures", "", *_figures(list(rows), results)]
    lines += ["", "## Commands", "", *_table("claim", "command", "minutes on 2 cores")]
    for name in rows:
        title = f"[{claim_of(name)}]({links[name]})" if links[name] else claim_of(name)
        lines.append(_line(title, f"`{command(name)}`", minutes(name, results)))
    return "\n".join([*lines, "", PROSE])


def in_short(claims: Mapping[str, Sequence[str]], results: Path) -> list[str]:
    """What a reader of five minutes takes along: goals that were reached, and what the scripts say of themselves.

    Args:
        claims: Chapter → scripts.
        results: The folder of all results.

    Returns:
        Lines of Markdown.
    """
    lines = []
    for chapter, names in claims.items():
        words = [word for name in names for word in _verdicts(name, results)]
        if words:
            reached, missed = (sum(what in word for word in words) for what in ("reached", "missed"))
            lines.append(f"* {chapter}: {reached} of {len(words)} goals reached, {missed} missed.")
        for name in names:
            for run in measured_on(name, results).values():
                script = importlib.import_module(f"benchmarks.{name}")
                if hasattr(script, "in_short"):
                    lines.append(f"* {script.in_short(run.runs)} ([{name}]({_link(name, results)}))")
    return lines


def overviews(names: Sequence[str], results: Path) -> list[str]:
    """Tables for a reader of five minutes.

    Args:
        names: Scripts; those with ``overview(runs)`` have one.
        results: The folder of all results.

    Returns:
        Lines of Markdown.
    """
    lines = []
    for name in names:
        for run in measured_on(name, results).values():
            script = importlib.import_module(f"benchmarks.{name}")
            table = script.overview(run.runs) if hasattr(script, "overview") else []
            lines += ["", *table] if table else []
    return lines


def _verdicts(name: str, results: Path) -> list[str]:
    """The verdict of every goal of a script that was measured."""
    found = []
    for run in measured_on(name, results).values():
        claims = getattr(importlib.import_module(f"benchmarks.{name}"), "CLAIMS", ())
        goals = [claim for claim in claims if claim.goal is not None]
        found += [verdict(evaluate(claim, run.runs), claim.goal, claim.at_least) for claim in goals]
    return [word for word in found if "reached" in word or "missed" in word]


def _table(*head: str) -> list[str]:
    """The head of a table."""
    return [_line(*head), f"|{' --- |' * len(head)}"]


def _line(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _is_stopped(runs: dict[str, Measured]) -> bool:
    """Whether one of the newest runs of a claim was stopped before its end."""
    return any(not run.environment.get("complete", True) for run in runs.values())


def _takes_cuda(name: str) -> bool:
    """Whether a claim can be measured on a GPU."""
    return name != "demo" and "cuda" in devices_of(importlib.import_module(f"benchmarks.{name}"))


def _link(name: str, results: Path) -> str:
    """The page of a claim, as seen from the report; nothing if there is none."""
    demo = demonstration.newest(results) if name == "demo" else None
    path = (demo or results / name) / "table.md"
    return path.relative_to(place(results).parent).as_posix() if path.exists() else ""


def _figures(names: list[str], results: Path) -> list[str]:
    """Links to the figures; a figure is drawn wherever there is a run of a script that draws."""
    lines = []
    for name in names:
        if name == "demo":
            demo = demonstration.newest(results)
            found = [demo / "figure.png"] if demo else []
        else:
            draws = hasattr(importlib.import_module(f"benchmarks.{name}"), "draw")
            found = [run.folder / "figure.svg" for run in measured_on(name, results).values() if draws]
        for path in found:
            lines.append(f"* [{name}]({path.relative_to(place(results).parent).as_posix()})")
    return lines
