"""Tables in Markdown from raw results: claim, goal, what was measured, verdict; failures and misses included.

``python -m benchmarks.render`` writes ``results/<claim>/table.md`` from the newest run of every claim on the CPU and,
for scripts that take ``--device cuda``, from the newest one on a GPU; what was never measured there says so, and so do
the claims of a script that has a folder and no results.  Then it writes ``README.md``, the report on all of them
(:mod:`benchmarks.report`).  A test renders all of this again and compares it with what is committed.

A script has ``CLAIMS``, or ``body(runs)``, Markdown in the place of their table.  It may have ``details(runs)``, which
follows the claims; ``summary(runs)``, its rows in the report; and ``draw(runs, path)``, which makes the figure that its
page shows: the only thing here that needs matplotlib, and comes last.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .harness import RESULTS, Claim, Run, Summary, evaluate, verdict

CUDA_MISSING = "\n## CUDA: not measured\n"
INCOMPLETE = (
    "",
    "**Not complete.** The run was stopped, and goes on with `--resume`: what is not here is not measured yet.",
)


def table(name: str, environment: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The page of one claim, from one run.

    Args:
        name: The name of its script, which lists the claims and says how they are measured.
        environment: Where the runs were made.
        runs: All lines of one run.

    Returns:
        Markdown.
    """
    script = importlib.import_module(f"benchmarks.{name}")
    first = str(script.__doc__).split("\n", 1)[0]
    device = environment.get("device", "cpu")
    where = "" if device == "cpu" else f"{device}, "
    machine = f"{where}{environment['cpu']} ({environment['cpu_capability']}), {environment['threads']} threads"
    versions = f"torch {environment['torch']}, Python {environment['python']}"
    loads = f"load average {environment['load_average_before']} before"
    if "load_average_after" in environment:  # the oldest runs have it not
        loads += f", {environment['load_average_after']} after"
    # Trainings are made at the size of the papers on a GPU; everything else is the same there.
    on_gpu = " --scale paper" if "paper" in getattr(script, "SCALES", ()) else " --device cuda"
    option = "" if device == "cpu" else on_gpu
    lines = [
        f"# {first}",
        "",
        f"`python -m benchmarks.{name}{option}`: {environment['date']}, {machine}, {versions}, {loads}, commit "
        f"{str(environment['commit'])[:10]}{' with changes' if environment['uncommitted_changes'] else ''}.",
        *resumptions(environment),
        *([] if environment.get("complete", True) else INCOMPLETE),
        "",
        *(script.body(runs) if hasattr(script, "body") else claims_table(script.CLAIMS, runs)),
    ]
    if hasattr(script, "details"):
        lines += ["", *script.details(runs)]
    return "\n".join(lines) + "\n"


def resumptions(environment: Mapping[str, Any]) -> list[str]:
    """Where and with what a run that was stopped went on.

    Args:
        environment: Of the run.

    Returns:
        Lines of Markdown; none if it was not.
    """
    found = []
    for each in environment.get("resumed", []):
        processor = [each["cpu"]] if "cpu" in each else []  # the oldest runs have it not
        found.append(", ".join([each["date"], *processor, f"torch {each['torch']}", f"commit {each['commit'][:10]}"]))
    return ["", f"Gone on with: {'; '.join(found)}."] if found else []


def claims_table(claims: Sequence[Claim], runs: Sequence[Run]) -> list[str]:
    """Claim, goal, what was measured, verdict.

    Args:
        claims: The rows.
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    lines = [
        "| network | claim | goal | measured: median [quartiles] (n) | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in claims:
        found = evaluate(claim, runs)
        words = verdict(found, claim.goal, claim.at_least)
        cells = (claim.network, claim.text, aim(claim), measured(found, unit_of(claim)), words)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def unit_of(claim: Claim) -> str:
    """What a claim is measured in."""
    return " GiB" if claim.reference is None else "×"


def aim(claim: Claim) -> str:
    """The goal of a claim in words; nothing if it has none."""
    return "" if claim.goal is None else f"{'≥' if claim.at_least else '≤'} {claim.goal:g}{unit_of(claim)}"


def measured(found: Summary | str, unit: str) -> str:
    """A summary in words.

    Args:
        found: What was measured, or why nothing was.
        unit: Behind the median.

    Returns:
        Median [quartiles] (n).
    """
    if isinstance(found, str):
        known = found in ("not measured", "not installed")
        return found if known else f"unsupported: {found.replace('|', '/')}"
    digits = 0 if found.median >= 100 else 1 if found.median >= 20 else 2 if found.median >= 0.1 else 4
    low, high = f"{found.low:.{digits}f}", f"{found.high:.{digits}f}"
    return f"{found.median:.{digits}f}{unit} [{low}, {high}] ({found.n})"


def matrix(
    cells: Mapping[tuple[str, str], str], rows: Sequence[str], columns: Sequence[str], corner: str = ""
) -> list[str]:
    """A table of words, such as who keeps which law.

    Args:
        cells: (Row, column) → word; an empty cell where there is none.
        rows: Their names, in order.
        columns: Their names, in order.
        corner: What the rows are.

    Returns:
        Lines of Markdown.
    """
    lines = [f"| {' | '.join((corner, *columns))} |", f"| --- |{' :-: |' * len(columns)}"]
    return lines + [f"| {' | '.join((row, *(cells.get((row, column), '') for column in columns)))} |" for row in rows]


def side_by_side(runs: Sequence[Run], unit: str, order: Sequence[str] = ()) -> list[str]:
    """What every contender took: seconds, the same in units of one of them, memory above model and inputs.

    Args:
        runs: All lines of one run.
        unit: The contender that is the unit of time.
        order: The contenders, in the order of the rows of a network; others come last.

    Returns:
        Lines of Markdown.
    """
    lines = [
        f"| network | contender | seconds (n) | in units of one {unit} | MiB above model and inputs (n) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for network in dict.fromkeys(run["network"] for run in runs):
        names = dict.fromkeys(run["contender"] for run in runs if run["network"] == network)
        for name in sorted(names, key=lambda name: order.index(name) if name in order else len(order)):
            mine = [run for run in runs if (run["network"], run["contender"]) == (network, name)]
            failed = [measured(run["failed"], "") for run in mine if "failed" in run]
            ratio = evaluate(Claim(network, "", name, unit), runs)
            cells = [
                _median([run["seconds"] for run in mine if "seconds" in run]) or "".join(failed),
                measured(ratio, "×") if isinstance(ratio, Summary) else "",
                _median([run["peak_bytes"] / 2**20 for run in mine if "peak_bytes" in run]),
            ]
            if any(cells):
                if cells[0] and failed and not cells[2] and cells[0] not in failed:
                    cells[2] = failed[0]  # fast enough, but its own process failed
                lines.append(f"| {network} | {name} | {' | '.join(cell or '—' for cell in cells)} |")
    methods = sorted({run["method"] for run in runs if "method" in run})
    return [*lines, "", f"Peak memory by {', '.join(methods)}."] if methods else lines


def _median(values: Sequence[float]) -> str:
    """The median and how many there are; nothing if there are none."""
    return f"{statistics.median(values):.3g} ({len(values)})" if values else ""


@dataclass(frozen=True)
class Measured:
    """A run that was recorded.

    Attributes:
        folder: Where.
        environment: Where it was made.
        runs: All its lines.
    """

    folder: Path
    environment: dict[str, Any]
    runs: list[Run]


def newest(folder: Path, device: str) -> Measured | None:
    """The newest run of a claim.

    Args:
        folder: The claim's folder of results.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        The run; ``None`` if there is none.
    """
    found = [path.parent for path in folder.glob("*/runs.jsonl")]
    mine = [path for path in found if ("_cuda_" in path.name) == (device == "cuda")]
    if not mine:
        return None
    last = max(mine, key=lambda path: path.name)
    runs = [json.loads(line) for line in (last / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    return Measured(last, json.loads((last / "environment.json").read_text(encoding="utf-8")), runs)


def devices_of(script: ModuleType) -> Sequence[str]:
    """Where a script can run."""
    return tuple(getattr(script, "DEVICES", ("cpu",)))


def pages(name: str, folder: Path) -> str:
    """The page of one claim from its newest runs, on the CPU first.

    Args:
        name: The name of its script.
        folder: Its folder of results.

    Returns:
        Markdown.
    """
    script = importlib.import_module(f"benchmarks.{name}")
    title = str(script.__doc__).splitlines()[0]
    found = {device: newest(folder, device) for device in devices_of(script)}
    parts = []
    if not any(found.values()):
        parts = ["\n".join([f"# {title}", "", *claims_table(getattr(script, "CLAIMS", ()), [])]) + "\n"]
    for device, run in found.items():
        if run is None:
            parts.append(CUDA_MISSING if device == "cuda" else "")
            continue
        text = table(name, run.environment, run.runs)
        if hasattr(script, "draw"):
            text += f"\n![{title}]({run.folder.name}/figure.svg)\n"
        parts.append(text if device == "cpu" else f"\n#{text}")
    return "".join(parts)


def figures(name: str, folder: Path) -> None:
    """Draw the figures of one claim beside the runs that they show.

    Args:
        name: The name of its script.
        folder: Its folder of results.
    """
    script = importlib.import_module(f"benchmarks.{name}")
    for device in devices_of(script) if hasattr(script, "draw") else ():
        run = newest(folder, device)
        if run is not None:
            script.draw(run.runs, run.folder / "figure.svg")


def rendered(results: Path) -> list[str]:
    """The claims whose pages are rendered: those with a folder, and a script that has claims or a table of its own.

    Args:
        results: The folder of all results.

    Returns:
        Names of scripts, in order; not the demo, whose table is its own.
    """
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if importlib.util.find_spec(f"benchmarks.{folder.name}") is not None:
            script = importlib.import_module(f"benchmarks.{folder.name}")
            if hasattr(script, "CLAIMS") or hasattr(script, "body"):
                found.append(folder.name)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Render every claim that has results, and the report.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="of another folder the report is written into it")
    parser.add_argument("--no-figures", action="store_true", help="pages and report alone, without matplotlib")
    options = parser.parse_args(arguments)
    results: Path = options.results
    from . import report  # it imports the scripts, and they import this

    names = rendered(results)
    for name in names:
        (results / name / "table.md").write_text(pages(name, results / name), encoding="utf-8")
    report.place(results).write_text(report.page(results), encoding="utf-8")
    for name in () if options.no_figures else names:
        figures(name, results / name)


if __name__ == "__main__":
    main()
