"""Resuming: a run that was killed at any moment ends with the bits of the run that was not."""

import os
import random
import signal
import time

import pytest
import torch
from train.runs import SMALL, TIMES, differences, last, of_training, started, summary

from ms_optim.errors import CommandLineError
from ms_optim.train import checkpoint, record, run, training

CASES = {
    "mssam, momentum, average, per step": {
        **{"opt": "mssam", "opt_kwargs": {"rho": 0.1, "refresh_every": 5}, "model_ema": True, "sched_on_updates": True},
        **{"model_ema_decay": 0.9, "sharpness_interval": 2, "sharpness_samples": 50},
    },
    "msreg, workers, augmentation, mixup": {
        **{"opt": "msreg", "opt_kwargs": {"strength": 0.001, "refresh_every": 7}, "workers": 2, "in_memory": "no"},
        **{"mixup": 0.2, "hflip": 0.5, "reprob": 0.3, "crop_padding": 1, "aa": "rand-m5-n1"},
    },
    "SAM around AdamW, bfloat16, accumulation, clipping": {
        **{"opt": "msoptimsamadamw", "opt_kwargs": {"rho": 0.05}, "lr": 0.002, "amp": True, "amp_dtype": "bfloat16"},
        **{"grad_accum_steps": 3, "clip_grad": 1.0, "cutout": 2, "crop_padding": 1},
    },
    "SGD, float16 and its scaler, plateau, dropout in a ResNet": {
        **{"model": "ms_optim.models:small_resnet", "amp": True, "train_num_samples": 256, "sched": "plateau"},
        **{"patience_epochs": 0, "eval_metric": "loss", "lr": 0.3, "drop": 0.0, "checkpoint_hist": 1},
    },
}


def settings_of(name, folder, **more):
    return {**SMALL, "epochs": 4, **CASES[name], "output": str(folder.parent), "experiment": folder.name, **more}


def same_end(folder, other):
    """What two runs left, in their checkpoints and tables."""
    assert differences(of_training(last(folder)), of_training(last(other))) == []
    assert summary(folder) == summary(other)
    for name in ("sharpness.csv",):
        texts = [(each / name).read_text() if (each / name).exists() else None for each in (folder, other)]
        assert texts[0] == texts[1]
    names = [sorted(path.name for path in each.glob("*.pth.tar")) for each in (folder, other)]
    assert names[0] == names[1]
    best = [checkpoint.read(each / "model_best.pth.tar") for each in (folder, other)]
    assert differences(of_training(best[0]), of_training(best[1])) == []


@pytest.mark.parametrize(
    "name", [name if name.startswith("mssam") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path, name):
    run(settings_of(name, tmp_path / "whole"))
    folder = tmp_path / "killed"
    chance, kills, seen = random.Random(name), 0, -1.0
    while True:
        process = started(settings_of(name, folder, resume="auto"))
        newest = folder / "last.pth.tar"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            written = newest.stat().st_mtime if newest.exists() else -1.0
            if kills < 2 and written > seen:  # at once, between two files, or in the next epoch
                time.sleep(chance.choice([0.0, 0.0, 0.05, 0.2]))
                os.kill(process.pid, signal.SIGKILL)
                seen = written
                break
            time.sleep(0.001)
        output, _ = process.communicate(timeout=60)
        if process.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.returncode == 0, output[-4000:]
        break
    assert kills == 2
    same_end(tmp_path / "whole", folder)


class Death(BaseException):
    """Stands for a process that ends here and now."""


def test_it_does_not_matter_between_which_two_files_a_process_dies(tmp_path, monkeypatch):
    # Few images and one checkpoint kept, so that each epoch removes and replaces files; figures are drawn after all.
    settings = {**SMALL, "epochs": 2, "train_num_samples": 128, "model_ema": True, "checkpoint_hist": 1}
    settings |= {"output": str(tmp_path)}
    monkeypatch.setattr(record, "draw_curves", lambda rows, path: None)
    run({**settings, "experiment": "whole"})
    moments = _moments(monkeypatch)
    run({**settings, "experiment": "counted"})
    total = moments["seen"]
    assert total > 20
    for fatal in range(1, total + 1):
        folder = tmp_path / f"died {fatal}"
        moments.update(seen=0, fatal=fatal)
        with pytest.raises(Death):
            run({**settings, "experiment": folder.name})
        moments.update(seen=0, fatal=0)
        run({**settings, "experiment": folder.name, "resume": "auto"})
        same_end(tmp_path / "whole", folder)


def _moments(monkeypatch):
    """Count the moments at which a run touches its folder, before and after each, and die at one of them."""
    moments = {"seen": 0, "fatal": 0}

    def moment():
        moments["seen"] += 1
        if moments["seen"] == moments["fatal"]:
            raise Death

    def watched(module, attribute):
        original = getattr(module, attribute)

        def call(*arguments, **named):
            moment()
            found = original(*arguments, **named)
            moment()
            return found

        monkeypatch.setattr(module, attribute, call)

    watched(os, "replace")
    watched(os, "link")
    watched(torch, "save")
    watched(record, "write_csv")
    watched(record, "write_json")
    return moments


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    name = "msreg, workers, augmentation, mixup"
    settings = settings_of(name, tmp_path / "run", workers=0, in_memory="yes")
    first = run(settings)
    before = of_training(last(tmp_path / "run"))
    again = run({**settings, "resume": "auto"})
    assert {k: v for k, v in first.items() if k not in TIMES} == {k: v for k, v in again.items() if k not in TIMES}
    assert differences(of_training(last(tmp_path / "run")), before) == []


def test_the_number_of_workers_does_not_change_a_run(tmp_path):
    name = "msreg, workers, augmentation, mixup"
    for folder, workers in (("none", 0), ("two", 2)):
        run(settings_of(name, tmp_path / folder, workers=workers, epochs=2))
    same_end(tmp_path / "none", tmp_path / "two")


def test_a_run_is_not_begun_where_another_one_is(tmp_path):
    settings = {**SMALL, "epochs": 1, "output": str(tmp_path), "experiment": "run"}
    run(settings)
    with pytest.raises(CommandLineError, match="holds a run already; --resume auto"):
        run(settings)


def test_resume_auto_needs_to_know_where(tmp_path):
    with pytest.raises(CommandLineError, match="needs an --experiment"):
        run({**SMALL, "output": str(tmp_path), "resume": "auto"})


def test_a_checkpoint_that_is_not_there_or_no_runs_is_refused(tmp_path):
    with pytest.raises(CommandLineError, match="there is no such checkpoint"):
        run({**SMALL, "output": str(tmp_path), "resume": str(tmp_path / "x.pth.tar")})
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    with pytest.raises(CommandLineError, match="lacks optimizer, epoch; weights alone are loaded by"):
        run({**SMALL, "output": str(tmp_path), "resume": str(tmp_path / "weights.pth")})
    (tmp_path / "half.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:100])
    with pytest.raises(CommandLineError, match="cannot be read"):
        run({**SMALL, "output": str(tmp_path), "resume": str(tmp_path / "half.pth")})


def test_resuming_into_another_folder_takes_the_best_along(tmp_path):
    settings = {**SMALL, "output": str(tmp_path), "experiment": "first", "epochs": 2}
    run(settings)
    outcome = run({**settings, "experiment": "second", "epochs": 4, "resume": str(tmp_path / "first")})
    assert [row["epoch"] for row in summary(tmp_path / "second")] == ["0", "1", "2", "3"]
    assert (tmp_path / "second" / "model_best.pth.tar").exists()
    best = max(float(row["eval_top1"]) for row in summary(tmp_path / "second"))
    assert outcome["validation_top1"] == best


def test_nothing_random_is_drawn_from_a_stream_that_an_epoch_does_not_seed(tmp_path, monkeypatch):
    """What is left behind in the global streams by an epoch does not reach the next."""
    network = tmp_path / "forgetful.py"
    network.write_text(
        "from torch import nn\n"
        "def forgetful():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Dropout(0.3), nn.Linear(50, 10))\n"
    )
    settings = {**SMALL, "output": str(tmp_path), "model": f"{network}:forgetful", "aa": "rand-m5-n1"}
    run({**settings, "experiment": "plain"})
    original = training.seed_everything

    def disturbed(seed, epoch, rank):
        torch.rand(epoch + 7)
        random.random()
        original(seed, epoch, rank)

    monkeypatch.setattr(training, "seed_everything", disturbed)
    run({**settings, "experiment": "disturbed"})
    same_end(tmp_path / "plain", tmp_path / "disturbed")


def _stopped(settings, monkeypatch, epochs):
    """Train, and die when so many epochs have been validated; then go on to the end."""
    validate, seen = training.Training._validate, []

    def fatal(self, *arguments):
        validate(self, *arguments)
        seen.append(0)
        if len(seen) == epochs:
            raise Death

    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "_validate", fatal)
        with pytest.raises(Death):
            run(settings)
    return run({**settings, "resume": "auto"})


def test_noise_on_a_plateaus_learning_rate_resumes_with_the_same_bits(tmp_path, monkeypatch):
    settings = {**SMALL, "epochs": 4, "sched": "plateau", "patience_epochs": 0, "lr_noise": [0.0, 1.0], "lr": 0.5}
    settings |= {"lr_noise_pct": 0.5, "output": str(tmp_path)}
    run({**settings, "experiment": "whole"})
    _stopped({**settings, "experiment": "killed"}, monkeypatch, 2)
    same_end(tmp_path / "whole", tmp_path / "killed")


def test_beginning_again_with_an_earlier_epoch_forgets_the_later_ones(tmp_path):
    settings = {**SMALL, "epochs": 4, "output": str(tmp_path), "experiment": "run", "sharpness_interval": 2}
    settings |= {"sharpness_samples": 20}
    run(settings)
    outcome = run({**settings, "resume": str(tmp_path / "run"), "start_epoch": 2})
    rows = summary(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert outcome["best_epoch"] in (2, 3)
    assert outcome["validation_top1"] == max(float(row["eval_top1"]) for row in rows[2:])
    assert [row[0] for row in last(tmp_path / "run")["run"]["sharpness"] if row[1] == "(all)"] == [1, 3]


def test_the_best_of_a_run_that_goes_on_from_an_earlier_checkpoint_is_not_of_a_later_one(tmp_path):
    settings = {**SMALL, "epochs": 4, "output": str(tmp_path), "experiment": "run", "lr": 0.02}
    run(settings)
    folder = tmp_path / "run"
    book = checkpoint.read(folder / "checkpoint-2.pth.tar")
    assert checkpoint.read(folder / "model_best.pth.tar")["epoch"] == 3  # it gets better in each epoch
    book["metric"], book["run"]["saver"]["best_metric"] = 0.0, 99.0  # one that is worse than those before
    torch.save(book, folder / "checkpoint-2.pth.tar")
    saver = checkpoint.Saver(folder, False, 10)
    saver.resume(book, folder / "checkpoint-2.pth.tar")
    assert saver.best_epoch == 1
    assert checkpoint.read(folder / "model_best.pth.tar")["epoch"] == 1
    (folder / "checkpoint-1.pth.tar").unlink()
    (folder / "model_best.pth.tar").unlink()
    saver = checkpoint.Saver(folder, False, 10)
    saver.resume(book, folder / "checkpoint-2.pth.tar")
    assert saver.best_epoch == 2
    assert checkpoint.read(folder / "model_best.pth.tar")["epoch"] == 2


def test_an_average_that_begins_after_the_best_epoch_does_not_hide_it(tmp_path):
    settings = {**SMALL, "epochs": 2, "output": str(tmp_path), "experiment": "run"}
    first = run(settings)
    more = {"model_ema": True, "model_ema_decay": 0.0, "epochs": 3, "lr": 3.0, "resume": "auto", "no_resume_opt": True}
    outcome = run({**settings, **more})
    assert outcome["best_epoch"] == first["best_epoch"] == 1
    assert outcome["test_top1"] == first["test_top1"]
    assert outcome["test_top1_last"] != first["test_top1"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_decay": 0.1}, r"--weight-decay 0\.1 \(was 0\.0005\)"),
        ({"lr": 0.2}, r"--lr 0\.2 \(was 0\.1\)"),
        ({"opt": "adamw"}, r"--opt adamw \(was sgd\)"),
        ({"opt_kwargs": {"nesterov": False}}, r"--opt-kwargs"),
    ],
)
def test_settings_that_a_resumed_optimizer_would_not_take_are_refused(tmp_path, changed, message):
    settings = {**SMALL, "epochs": 1, "output": str(tmp_path), "experiment": "run"}
    run(settings)
    before = last(tmp_path / "run")
    again = {**settings, "epochs": 2, "resume": "auto", **changed}
    with pytest.raises(CommandLineError, match=message):
        run(again)
    assert differences(last(tmp_path / "run"), before) == []
    run({**again, "no_resume_opt": True})


def test_a_learning_rate_that_is_not_given_is_the_checkpoints_whatever_the_batch(tmp_path):
    settings = {key: value for key, value in SMALL.items() if key != "lr"} | {"epochs": 1, "lr_base": 0.2}
    run({**settings, "output": str(tmp_path), "experiment": "run"})
    run({**settings, "output": str(tmp_path), "experiment": "run", "resume": "auto", "epochs": 2, "batch_size": 32})
    group = last(tmp_path / "run")["optimizer"]["param_groups"][0]
    assert group["initial_lr"] == last(tmp_path / "run")["args"].lr == 0.05
