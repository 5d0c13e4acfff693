"""Real processes, really killed: what has ended stays, what had begun goes on, and nobody works for a dead sweep."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ms_optim.errors import CommandLineError
from ms_optim.sweep.lock import held

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
PATIENCE = 120  # seconds in which a busy machine starts a process


def sweep(folder, *more, seconds=0.2):
    command = [sys.executable, "-m", "ms_optim.sweep", "--function", "sweep.trials:epochs", "--workers", "2"]
    command += ["--set", "epochs=12", f"seconds={seconds}", "--seeds", "0", "1", "2", "--output", str(folder), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"text": True, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen(command, cwd=ROOT / "tests", env=environment, **options)


def wait_for(condition, process=None):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def epochs(folder):
    """Trial → how far it has come."""
    return {file.parents[1].name: json.loads(file.read_text()) for file in folder.glob("trials/*/run/epoch.json")}


def processes(folder):
    return [int(line) for file in folder.glob("trials/*/run/processes.txt") for line in file.read_text().split()]


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def table(folder):
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_in_the_middle_goes_on_where_it_was(tmp_path, kill):
    first = sweep(tmp_path)
    wait_for(lambda: len(epochs(tmp_path)) == 2 and min(epochs(tmp_path).values()) >= 2, first)
    os.kill(first.pid, kill)
    _, said = first.communicate()
    assert first.returncode == (130 if kill == signal.SIGINT else -kill)
    assert ("the same command goes on" in said) == (kill == signal.SIGINT) and "Traceback" not in said
    wait_for(lambda: not any(map(alive, processes(tmp_path))))
    reached = epochs(tmp_path)
    assert all(2 <= epoch <= 12 for epoch in reached.values())

    second = sweep(tmp_path, seconds=0.2)
    _, said = second.communicate()
    assert second.returncode == 0, said
    rows = {row["key"]: row for row in table(tmp_path)}
    assert len(rows) == 3 and {row["status"] for row in rows.values()} == {"finished"}
    for key, epoch in reached.items():
        assert int(rows[key]["outcome.first"]) == epoch  # no epoch is trained twice, or left out


@pytest.mark.slow
def test_a_worker_that_is_killed_is_a_failure_of_its_trial_alone(tmp_path):
    running = sweep(tmp_path)
    wait_for(lambda: len(epochs(tmp_path)) == 2, running)
    victim = processes(tmp_path)[0]
    os.kill(victim, signal.SIGKILL)
    _, said = running.communicate()
    assert running.returncode == 1 and "killed by SIGKILL" in said
    statuses = [row["status"] for row in table(tmp_path)]
    assert sorted(statuses) == ["failed", "finished", "finished"]

    again = sweep(tmp_path, "--retry")
    out, said = again.communicate()
    assert again.returncode == 0, said
    assert said.count("seed") == 1  # only the one that had failed has run
    assert {row["status"] for row in table(tmp_path)} == {"finished"}


@pytest.mark.slow
def test_a_second_sweep_in_the_folder_is_refused_while_the_first_lives(tmp_path):
    first = sweep(tmp_path, seconds=60)
    try:
        wait_for(lambda: (tmp_path / "lock").exists() and (tmp_path / "lock").read_text(), first)
        second = sweep(tmp_path)
        _, said = second.communicate()
        assert second.returncode == 2 and f"is in use by process {first.pid} on " in said
    finally:
        first.kill()
        first.communicate()
    with held(tmp_path / "lock"):  # a dead process holds nothing, though its number still stands in the file
        pass


def test_a_lock_is_held_once_and_given_back(tmp_path):
    file = tmp_path / "lock"
    with held(file):
        with pytest.raises(CommandLineError, match=f"in use by process {os.getpid()}"), held(file):
            pass
        with pytest.raises(CommandLineError), held(file, wait=0.1):
            pass
    with held(file):
        pass
    with pytest.raises(ZeroDivisionError), held(file):
        raise ZeroDivisionError
    with held(file):
        pass
