"""Epochs: what is averaged over one, and when a training is given up."""

import pytest
import torch
from train.runs import SMALL, summary

from ms_optim.errors import DivergedError
from ms_optim.train import run, steps


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
