"""Epochs: what is averaged over one, and when a training is given up."""

import argparse

import pytest
import torch
from train.runs import SMALL, summary

from ms_optim import models
from ms_optim.errors import DivergedError, SymmetryError
from ms_optim.sweep.trial import FINISHED, Result, Trial
from ms_optim.train import checkpoint, epoch, process, run, sharpness_log, steps


def settings_of(folder, **more):
    return {**SMALL, "epochs": 1, "output": str(folder.parent), "experiment": folder.name, **more}


def test_a_training_in_float16_whose_steps_are_all_skipped_has_diverged(tmp_path):
    with pytest.raises(DivergedError, match="the training loss is nan in epoch 0"):
        run(settings_of(tmp_path / "run", amp=True, lr=1e8))
    assert not (tmp_path / "run" / "last.pth.tar").exists()


def test_steps_that_overflow_in_float16_are_left_out_of_the_loss(tmp_path, monkeypatch):
    found = []
    take = steps.Steps.take

    def overflowing(self, window):
        loss = take(self, window)
        found.append(loss)
        return torch.full_like(loss, torch.inf) if len(found) == 2 else loss

    monkeypatch.setattr(steps.Steps, "take", overflowing)
    outcome = run(settings_of(tmp_path / "run", amp=True))
    kept = [float(loss) for place, loss in enumerate(found) if place != 1]
    assert outcome["train_loss"] == pytest.approx(sum(kept) / len(kept), rel=1e-6)
    assert float(summary(tmp_path / "run")[0]["train_loss"]) == pytest.approx(outcome["train_loss"], rel=1e-4)


def test_a_minimum_sharpness_that_cannot_be_known_is_missing_and_the_run_has_not_diverged(tmp_path, monkeypatch):
    def unreadable(*_):
        raise SymmetryError("this graph cannot be read")

    monkeypatch.setattr(sharpness_log, "scale_symmetries", unreadable)
    outcome = run(settings_of(tmp_path / "run", sharpness_interval=1, sharpness_samples=20))
    assert outcome["trace"] > 0
    assert "minimum_sharpness" not in outcome
    assert Result.returned(Trial({}), outcome).status == FINISHED


class Stream(list):
    """Batches that are fewer than was said."""

    mixes = False

    def __len__(self):
        return 10


def test_the_last_micro_batches_of_a_stream_that_ends_early_are_stepped_along():
    torch.manual_seed(0)
    model = models.digits_mlp()
    options = argparse.Namespace(
        **{"amp": False, "amp_dtype": "float16", "clip_grad": None, "clip_mode": "norm", "grad_accum_steps": 2},
        **{"mixup_off_epoch": 0, "channels_last": False, "synchronize_step": False, "log_interval": 100},
    )
    here = process.Process(torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = steps.Steps(model, optimizer, torch.nn.CrossEntropyLoss(), options, here)
    windows = []
    take = made.take
    made.take = lambda window: (windows.append(len(window)), take(window))[1]
    batches = Stream((torch.randn(4, 1, 8, 8), torch.randint(10, (4,))) for _ in range(5))
    found = epoch.Loop(made, model, batches, options, here).run(0, 1)
    assert windows == [2, 2, 1] and found["loss"] > 0


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path):
    saver = checkpoint.Saver(tmp_path, decreasing=True, max_history=2)
    for index, metric in enumerate((float("nan"), 0.5, float("nan"), 0.7)):
        saver.save({"run": {}, "state_dict": {}, "optimizer": {}}, index, metric)
    assert saver.best_epoch == 1 and checkpoint.read(saver.best)["epoch"] == 1
