"""Every script runs, at a scale of seconds, and its page is made of its raw results alone.

``make benchmarks`` runs them all; of the fast tests only those two are part that have the two command lines.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scripts
from benchmarks.render import CUDA_MISSING

ROOT = Path(__file__).parent.parent.parent
QUICK = ("trace_speed", "gauge")
OTHERS = ("curvlinops", "PyHessian", "davda54", "SamsungLabs", "moskomule")


def marked(name):
    marks = [] if name in QUICK else [pytest.mark.slow]
    if name == "flat_minima":
        marks.append(pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"))
    return pytest.param(name, marks=marks)


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def absent_or_unable(line):
    """Peers are optional, and BackPACK cannot do a vision transformer."""
    return line["failed"] == "not installed" or "BackPACK" in line["contender"]


@pytest.mark.parametrize("script", [marked(name) for name in scripts.names()])
def test_benchmark_runs_and_renders(script, tmp_path):
    done = run(f"benchmarks.{script}", "--scale", "smoke", "--threads", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / script).iterdir()
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    described = (folder / "environment.json").read_text()
    failed = [line for line in lines if "failed" in line and not absent_or_unable(line)]
    assert lines and not failed
    assert str(Path.home()) not in described and str(ROOT) not in described
    rendered = run("benchmarks.render", "--results", str(tmp_path))
    assert rendered.returncode == 0, rendered.stderr
    page = (tmp_path / script / "table.md").read_text()
    table = done.stdout[done.stdout.index("# ") :].removesuffix("\n")  # behind the lines that trainings print
    assert page.startswith(table)
    module = importlib.import_module(f"benchmarks.{script}")
    assert page.endswith(CUDA_MISSING) == ("cuda" in getattr(module, "DEVICES", ()))
    assert (folder / "figure.svg").exists() == hasattr(module, "draw")
    ours = [row for row in table.splitlines() if "BackPACK" not in row and not any(peer in row for peer in OTHERS)]
    assert not any("| not measured |" in row for row in ours)
    report = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"[{script}]({script}/table.md)" in report
