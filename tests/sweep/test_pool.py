"""Trials in real processes: what each finds, what becomes of those that misbehave, and what is left after each."""

import csv
import json
import os
from pathlib import Path

import pytest

from ms_optim.errors import CommandLineError
from ms_optim.sweep import Resources, Trial, run_trials
from ms_optim.sweep.pool import visible_gpus
from ms_optim.sweep.trial import DIVERGED, FAILED, FINISHED

HERE = Resources(0)
PROCESSES = Resources(2, trials_per_process=100)
WHATS = ("ok", "kill", "raise", "exit", "vanish", "diverge", "diverge early", "nothing", "odd", "ok again")


def of(results):
    return {result.trial.settings["what"]: result for result in results}


def table(folder):
    with (Path(folder) / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def misbehaviour(tmp_path_factory):
    """Results, folder, and what the table held after each trial."""
    folder = tmp_path_factory.mktemp("misbehaviour")
    tables = []

    def listener(result, count, total):
        tables.append((count, total, result, table(folder)))

    trials = [Trial({"what": what}, method=what) for what in WHATS]
    return run_trials(trials, "sweep.trials:misbehaving", folder, PROCESSES, listener=listener), folder, tables


def test_whatever_a_trial_does_the_others_go_on_and_its_record_says_why(misbehaviour):
    results, folder, _ = misbehaviour
    assert [result.trial.settings["what"] for result in results] == list(WHATS)
    found = of(results)
    assert found["ok"].status == found["ok again"].status == FINISHED
    assert found["ok"].outcome["process"] not in (os.getpid(), found["kill"].outcome)
    said = {
        "kill": "killed by SIGKILL",
        "raise": "ValueError: rho must be at least 0",
        "exit": "sys.exit(3)",
        "vanish": "exit code 5",
        "diverge": "train_loss is nan",
        "diverge early": "the loss is nan in epoch 3",
        "nothing": "returned a NoneType",
        "odd": "JSON has no word for",
    }
    for what, words in said.items():
        assert found[what].status == (DIVERGED if what.startswith("diverge") else FAILED)
        assert words in found[what].error, what
    assert (folder / found["ok"].log).read_text() == "what is ok: ε\nfrom below Python\n"
    log = (folder / found["raise"].log).read_text()
    assert "Traceback" in log and "ValueError: rho must be" in log
    assert found["ok"].host["threads"] == 1 and found["ok"].seconds >= 0


def test_the_table_is_right_after_every_trial(misbehaviour):
    results, folder, tables = misbehaviour
    assert [(count, total) for count, total, *_ in tables] == [(i + 1, len(WHATS)) for i in range(len(WHATS))]
    ended = set()
    for count, _, result, rows in tables:
        ended.add(result.trial.settings["what"])
        assert {row["settings.what"] for row in rows} == ended and len(rows) == count
        for row in rows:
            assert row["status"] == of(results)[row["settings.what"]].status
    last = {row["settings.what"]: row for row in table(folder)}
    assert last["ok"]["outcome.validation_top1"] == "50.0" and last["kill"]["outcome.validation_top1"] == ""
    assert last["diverge"]["outcome.train_loss"] == "" and "nan" in last["diverge"]["error"]
    assert not list(folder.glob(".*")) and not list(folder.glob("trials/*/.*"))  # no half-written file


def test_what_has_a_record_does_not_run_again_and_failures_do_on_request(tmp_path):
    settings = {"what": "ok"}
    (first,) = run_trials([Trial(settings, method="a")], "sweep.trials:misbehaving", tmp_path, HERE)
    (second,) = run_trials([Trial(settings, method="b")], "sweep.trials:misbehaving", tmp_path, Resources(4))
    assert second.outcome == first.outcome and second.trial.method == "b"
    assert [row["method"] for row in table(tmp_path)] == ["b"]  # called what it is called now

    calls = []
    trials = [Trial({"what": what}) for what in ("raise", "diverge", "ok", "ok")]
    for retry, again in ((False, ["raise", "diverge"]), (False, []), (True, ["raise"])):
        run_trials(
            trials,
            "sweep.trials:misbehaving",
            tmp_path,
            HERE,
            retry=retry,
            listener=lambda result, *_: calls.append(result.trial.settings["what"]),
        )
        assert calls == again
        calls.clear()
    assert len(table(tmp_path)) == 3


def test_a_process_has_threads_and_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = dict(os.environ)
    trials = [Trial({"x": x}) for x in range(3)]
    # Names that are no GPUs: only what the process finds is looked at.
    results = run_trials(trials, "sweep.trials:surroundings", tmp_path, Resources(2, ("8", "9"), threads=1))
    assert dict(os.environ) == before
    assert {result.outcome["CUDA_VISIBLE_DEVICES"] for result in results} == {"8", "9"}
    assert {result.outcome["OMP_NUM_THREADS"] for result in results} == {"1"}
    assert {result.outcome["threads"] for result in results} == {1}
    assert {result.outcome["resume"] for result in results} == {"auto"}
    assert len({result.outcome["process"] for result in results}) == 3  # a new one for each


def test_workers_are_one_per_gpu_or_per_core(monkeypatch):
    monkeypatch.setattr("ms_optim.sweep.pool.cores", lambda: 8)
    assert Resources.here(gpus=["0", "1"]) == Resources(2, ("0", "1"), 4)
    assert Resources.here(gpus=[]) == Resources(8, (), 1)
    assert Resources.here(3, []) == Resources(3, (), 2)
    assert Resources.here(3, ["0", "1"]).environment(2)["CUDA_VISIBLE_DEVICES"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in Resources(2).environment(0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert visible_gpus() == ("5", "GPU-ab")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ("0", "1")
    for wrong in ({"workers": -1}, {"workers": 1, "threads": 0}, {"workers": 1, "trials_per_process": 0}):
        with pytest.raises(CommandLineError, match="must be at least"):
            Resources(**wrong)


def test_a_function_that_is_none_is_refused_before_anything_runs(tmp_path):
    for function, said in (
        ("sweep.trials:absent", "has no 'absent'"),
        ("nowhere:f", "cannot import"),
        ("sweep.trials:FINISHED_", "has no"),
        ("json:decoder", "not a function"),
    ):
        with pytest.raises(CommandLineError, match=said):
            run_trials([Trial({})], function, tmp_path, HERE)
    assert not list((tmp_path / "trials").iterdir())


def test_a_record_is_whole_json(misbehaviour):
    _, folder, _ = misbehaviour
    records = [json.loads(file.read_text()) for file in folder.glob("trials/*/record.json")]
    assert len(records) == len(WHATS)
    assert all(set(record) >= {"settings", "outcome", "seconds", "host", "error", "function"} for record in records)
