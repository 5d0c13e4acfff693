"""Claims that are made of trainings: their command line, and what is kept of each training.

Such a script has a function that trains once, and a plan that says which trainings are wanted, in stages if later ones
depend on earlier ones.  They run in processes of one thread each (:mod:`ms_optim.sweep`).  After every training
``runs.jsonl`` is written anew, one line per training with all that it was called with and all that came of it, so that
what was stopped goes on, in the same folder, with ``--resume``; tables are made of these lines alone.  A run never
overwrites another one, ``environment.json`` says when and at which commit it went on, and lines that the plan does not
ask for any more, since settings have changed, are put aside into ``not_asked_for.jsonl``.

Scales: ``smoke``, a minute at most, to see that it runs; ``cpu``, what is committed; ``paper``, the size of the
published experiments, for a GPU, where the script has one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ms_optim import sweep
from ms_optim.sweep import Result, Trial
from ms_optim.sweep.trial import FAILED, canonical

from .harness import RESULTS, Run, environment, folder_name, record

SCALES = ("smoke", "cpu", "paper")
#: What a line is called by; everything else in it is the outcome.
_KEYS = ("network", "contender", "stage", "round", "settings", "status", "failed", "seconds")


def line_of(result: Result) -> Run:
    """What is kept of a training.

    Args:
        result: Of the sweep.

    Returns:
        One line: what it is called, its settings, how it ended, and its outcome.
    """
    trial = result.trial
    line: Run = {"network": trial.problem, "contender": trial.method, "stage": trial.stage, "round": trial.seed}
    line |= {"settings": dict(trial.settings), "status": result.status, "seconds": round(result.seconds, 2)}
    return line | ({"failed": result.error} if result.error else {}) | dict(result.outcome)


def result_of(line: Run) -> Result:
    """Read a line again.

    Args:
        line: As :func:`line_of` made it.

    Returns:
        The result.
    """
    trial = Trial(line["settings"], line["contender"], line["network"], line["stage"])
    outcome = {name: value for name, value in line.items() if name not in _KEYS}
    return Result(trial, line["status"], outcome, line.get("failed", ""), line["seconds"])


def search_log(results: Sequence[Result], words: Callable[[sweep.Setting], tuple[str, str]]) -> list[str]:
    """What every setting of a search gave, a line for each problem and method.

    Args:
        results: Of the search.
        words: Takes a setting; says what it is, and what it gave if no seed of it was lost.

    Returns:
        Lines of a table of three columns.
    """
    cells: dict[tuple[str, str], list[str]] = {}
    for setting in sweep.settings_of(results):
        name, gave = words(setting)
        lost = setting.count("finished") < len(setting.results)
        cells.setdefault((setting.problem, setting.method), []).append(f"{name}: {'×' if lost else gave}")
    return [f"| {problem} | {method} | {'; '.join(found)} |" for (problem, method), found in cells.items()]


class Trainings:
    """Runs trainings and keeps their lines.

    Args:
        function: ``module:function``, which trains once.
        resources: Processes.
        keep: Is given all lines whenever there is a new one.
        known: Lines of trainings that need not run again; one that failed does.

    Attributes:
        scale: The one that was asked for.
        results: All so far, in the order in which they ended; what several stages ask for is there once.
        hosts: The machines they ran on, each once.
        taken_from: Of a plan that takes over another claim's trainings: where from, and how its run is described there;
            they are no more complete than it is.
    """

    def __init__(
        self,
        scale: str,
        function: str,
        resources: sweep.Resources,
        keep: Callable[[Trainings], object],
        known: Iterable[Run] = (),
    ) -> None:
        self.scale, self._function, self._resources, self._keep = scale, function, resources, keep
        self._known: dict[str, Result] = {}
        self.results: list[Result] = []
        self._shown: set[tuple[str, ...]] = set()
        self.hosts: list[dict[str, Any]] = []
        self.taken_from: dict[str, Any] = {}
        self.remember(known)

    def remember(self, lines: Iterable[Run]) -> None:
        """Take trainings as known.

        Args:
            lines: Theirs; one that failed is none.
        """
        self._known |= {canonical(line["settings"]): result_of(line) for line in lines if line["status"] != FAILED}

    def __call__(self, trials: Sequence[Trial]) -> list[Result]:
        """Run those that are not known.

        Args:
            trials: Their settings hold everything that the outcome depends on.

        Returns:
            Results, in the order of the trials.
        """
        wanted = {canonical(trial.settings): trial for trial in trials}
        for key, trial in wanted.items():
            if key in self._known:
                self._add(replace(self._known[key], trial=trial))
        missing = [trial for key, trial in wanted.items() if key not in self._known]

        def listener(result: Result, count: int, total: int) -> None:
            host = dict(result.host)
            if host and host not in self.hosts:
                self.hosts.append(host)
            self._known[canonical(result.trial.settings)] = result
            self._add(result)
            value = next((f"{k} {v:.4f}" for k, v in result.outcome.items() if isinstance(v, float)), result.error)
            name = f"{result.trial.problem}, {result.trial.method}, {result.trial.stage}"
            print(f"{count}/{total} {name}: {value} ({result.seconds:.1f} s)", flush=True)

        if missing:
            with tempfile.TemporaryDirectory() as nowhere:
                sweep.run_trials(missing, self._function, nowhere, self._resources, listener=listener)
        return [replace(self._known[canonical(t.settings)], trial=t) for t in trials]

    def _add(self, result: Result) -> None:
        """Take a result into the lines."""
        trial = result.trial
        name = (trial.problem, trial.method, trial.stage, canonical(trial.settings))
        if name not in self._shown:
            self._shown.add(name)
            self.results.append(result)
            self._keep(self)

    @property
    def lines(self) -> list[Run]:
        """A line per training."""
        return [line_of(result) for result in self.results]


def _read(folder: Path, name: str, scale: str) -> tuple[list[Run], dict[str, Any]]:
    """Read a run that is to go on.

    Args:
        folder: Its folder.
        name: The claim whose run it has to be.
        scale: The scale that it has to have.

    Returns:
        Its lines, its environment.

    Raises:
        OSError: If there is no run.
        ValueError: If it is another claim's, or of another scale.
    """
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    described = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    if folder.resolve().parent.name != name:
        raise ValueError(f"a run of {folder.resolve().parent.name}, and {name} was called")
    scales = {line["settings"].get("scale", scale) for line in lines}
    if scales - {scale}:
        raise ValueError(f"a run with --scale {', '.join(sorted(scales))}, and --scale {scale} was asked for")
    return lines, described


def main(
    description: str | None,
    name: str,
    function: str,
    plan: Callable[[Trainings], object],
    arguments: Sequence[str] | None = None,
    scales: Sequence[str] = SCALES,
) -> None:
    """The command line: train, write, and print the page.

    Args:
        description: For ``--help``.
        name: The claim's name, that of its script and its folder of results.
        function: ``module:function``, which trains once.
        plan: Is given the trainings, and asks them to run.
        arguments: Of the command line; ``None``: the process's own.
        scales: Those that the script has.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=scales, default="cpu", help="smoke: tiny, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch in this process; workers have one each")
    parser.add_argument("--workers", type=int, help="processes (default: one per core or GPU, none for smoke)")
    parser.add_argument("--out", type=Path, help="folder of results/<claim>/ (default: here, none for smoke)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="a run of results/<claim>/ to go on with")
    options = parser.parse_args(arguments)
    if options.scale == "paper" and not torch.cuda.is_available():
        parser.error("--scale paper is for a GPU, and torch.cuda.is_available() is False here; use --scale cpu")
    torch.set_num_threads(options.threads)
    described = environment(options.threads, "cuda" if options.scale == "paper" else "cpu")
    out = options.out or (None if options.scale == "smoke" else RESULTS)
    folder = None if out is None else out / name / folder_name(described)
    known: list[Run] = []
    if options.resume is not None:
        folder = options.resume
        try:
            known, before = _read(folder, name, options.scale)
        except (OSError, ValueError) as error:
            parser.error(f"--resume {folder}: {error}")
        now = {key: described[key] for key in ("date", "commit", "uncommitted_changes", "torch", "cpu")}
        described = before | {"resumed": [*before.get("resumed", []), now]}
    elif folder is not None and (folder / "runs.jsonl").exists():
        parser.error(f"{folder} holds a run of today: go on with it by --resume {folder}, or move it away")

    def keep(trainings: Trainings, complete: bool = False) -> None:
        described["load_average_after"] = round(os.getloadavg()[0], 2)
        described["hosts"] = described.get("hosts", []) + [h for h in trainings.hosts if h not in described["hosts"]]
        if folder is not None:
            # What is known and was not asked for yet stays in the file: a second interruption loses nothing.
            asked = {canonical(result.trial.settings) for result in trainings.results}
            rest = [line for line in known if canonical(line["settings"]) not in asked]
            if complete and rest:
                with (folder / "not_asked_for.jsonl").open("a", encoding="utf-8") as aside:
                    aside.writelines(json.dumps(line) + "\n" for line in rest)
                print(f"{len(rest)} lines of other settings were put aside into {folder / 'not_asked_for.jsonl'}")
            record(folder, described, trainings.lines + ([] if complete else rest))

    described.setdefault("hosts", [])
    described["complete"] = False
    workers = 0 if options.scale == "smoke" and options.workers is None else options.workers
    resources = sweep.Resources.here(workers, threads=1, trials_per_process=float("inf"))
    trainings = Trainings(options.scale, function, resources, keep, known)
    plan(trainings)
    described |= {"taken_from": trainings.taken_from} if trainings.taken_from else {}
    described["complete"] = trainings.taken_from.get("complete", True)
    keep(trainings, complete=True)

    from .render import table  # the renderer imports the scripts, whose pages it prints

    print(table(name, described, trainings.lines))
