"""Every benchmark runs, at a scale of seconds, and its table is made of its raw results alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Claim, Summary, evaluate, paired, verdict

ROOT = Path(__file__).parent.parent
SCRIPTS = ["trace_speed", "step_speed", "refresh_memory"]


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_runs_and_renders(script, tmp_path):
    done = run(f"benchmarks.{script}", "--scale", "smoke", "--threads", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / script).iterdir()
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    described = (folder / "environment.json").read_text()
    failed = [line for line in lines if line.get("failed", "not installed") != "not installed"]
    assert lines and not failed
    assert str(Path.home()) not in described and str(ROOT) not in described
    rendered = run("benchmarks.render", "--results", str(tmp_path))
    assert rendered.returncode == 0, rendered.stderr
    table = (tmp_path / script / "table.md").read_text()
    assert table == done.stdout.removesuffix("\n")
    assert "| not measured |" not in table


def test_ratios_are_taken_within_rounds():
    seconds = {"reference": [1.0, 10.0, 2.0], "step": [2.0, 20.0, 6.0], "refresh": [100.0, 1000.0, 200.0]}
    runs = [
        {"network": "net", "contender": name, "round": i, "seconds": s}
        for name, values in seconds.items()
        for i, s in enumerate(values)
    ]
    assert evaluate(Claim("net", "", "step", "reference"), runs) == Summary(2.0, 2.0, 2.5, 3)
    assert evaluate(Claim("net", "", {"step": 1.0, "refresh": 0.01}, "reference"), runs) == Summary(3.0, 3.0, 3.5, 3)
    assert evaluate(Claim("other", "", "step", "reference"), runs) == "not measured"


def test_every_contender_runs_once_a_round_and_a_slow_one_in_its_first_rounds():
    calls = {"a": 0, "b": 0, "c": 0}

    def contender(name):
        def count():
            calls[name] += 1
            if name == "c":
                raise ValueError("broken")

        return count

    runs = paired("net", {name: contender(name) for name in calls}, rounds=5, slow={"b": 2})
    assert calls == {"a": 2 + 5, "b": 2, "c": 1}
    assert [run["contender"] for run in runs].count("a") == 5
    assert evaluate(Claim("net", "", "c", "a"), runs) == "ValueError: broken"


@pytest.mark.parametrize(
    ("median", "low", "high", "word"),
    [
        (1.0, 0.9, 1.1, "reached"),
        (1.3, 1.25, 1.4, "**missed**"),
        (1.1, 1.0, 1.3, "reached, but the middle half has both"),
        (1.25, 1.1, 1.3, "**missed**, but the middle half has both"),
    ],
)
def test_verdict_has_no_tolerance(median, low, high, word):
    assert verdict(Summary(median, low, high, 9), 1.2) == word
