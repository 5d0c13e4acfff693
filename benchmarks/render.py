"""Tables in Markdown from raw results: claim, goal, what was measured, verdict; failures and misses included.

``python -m benchmarks.render`` writes ``results/<claim>/table.md`` from the newest run of every claim.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import RESULTS, Claim, Run, Summary, evaluate, verdict


def table(name: str, environment: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The table of one claim.

    Args:
        name: The name of its script, which lists the claims and says how they are measured.
        environment: Where the runs were made.
        runs: All lines of one run.

    Returns:
        Markdown.
    """
    script = importlib.import_module(f"benchmarks.{name}")
    claims: list[Claim] = script.CLAIMS
    first = str(script.__doc__).split("\n", 1)[0]
    machine = f"{environment['cpu']} ({environment['cpu_capability']}), {environment['threads']} threads"
    versions = f"torch {environment['torch']}, Python {environment['python']}"
    loads = f"load average {environment['load_average_before']} before, {environment['load_average_after']} after"
    lines = [
        f"# {first}",
        "",
        f"`python -m benchmarks.{name}`: {environment['date']}, {machine}, {versions}, {loads}, commit "
        f"{str(environment['commit'])[:10]}{' with changes' if environment['uncommitted_changes'] else ''}.",
        "",
        "| network | claim | goal | measured: median [quartiles] (n) | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in claims:
        found = evaluate(claim, runs)
        unit = " GiB" if claim.reference is None else "×"
        goal = "" if claim.goal is None else f"≤ {claim.goal:g}{unit}"
        cells = (claim.network, claim.text, goal, _measured(found, unit), verdict(found, claim.goal))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _measured(found: Summary | str, unit: str) -> str:
    """A summary in words."""
    if isinstance(found, str):
        return found
    digits = 0 if found.median >= 100 else 1 if found.median >= 20 else 2
    low, high = f"{found.low:.{digits}f}", f"{found.high:.{digits}f}"
    return f"{found.median:.{digits}f}{unit} [{low}, {high}] ({found.n})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Render every claim that has results.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args(arguments).results
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        script = importlib.util.find_spec(f"benchmarks.{folder.name}")
        if script is None or not hasattr(importlib.import_module(script.name), "CLAIMS"):
            continue  # the demo or a sweep, which has no goal and draws a table of its own
        newest = max(folder.glob("*/runs.jsonl"), key=lambda path: path.parent.name).parent
        runs = [json.loads(line) for line in (newest / "runs.jsonl").read_text().splitlines()]
        environment = json.loads((newest / "environment.json").read_text())
        (folder / "table.md").write_text(table(folder.name, environment, runs))


if __name__ == "__main__":
    main()
