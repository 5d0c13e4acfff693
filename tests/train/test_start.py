"""The start of a training: what it begins with, and what is left of one that cannot begin."""

import random

import numpy as np
import pytest
import torch
from train.runs import SMALL, last

from ms_optim.errors import CommandLineError, MsOptimError
from ms_optim.train import run

RESNET = {**SMALL, "model": "resnet18", "epochs": 1, "train_num_samples": 64, "batch_size": 32}


def test_a_timm_network_with_a_small_stem_begins_with_the_weights_of_its_own_run(tmp_path):
    run({**RESNET, "output": str(tmp_path), "experiment": "first"})
    file = tmp_path / "first" / "last.pth.tar"
    run({**RESNET, "output": str(tmp_path), "experiment": "second", "initial_checkpoint": str(file), "lr": 0.0})
    first, second = (last(tmp_path / name)["state_dict"]["conv1.weight"] for name in ("first", "second"))
    assert first.shape == (64, 1, 3, 3)
    assert torch.equal(first, second)


def test_first_weights_that_are_not_there_or_do_not_fit_are_named(tmp_path):
    with pytest.raises(CommandLineError, match="--initial-checkpoint .*none.pth cannot be loaded: there is no such"):
        run({**RESNET, "output": str(tmp_path), "initial_checkpoint": str(tmp_path / "none.pth")})
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CommandLineError, match="--initial-checkpoint .*other.pth cannot be loaded: Error"):
        run({**RESNET, "output": str(tmp_path), "initial_checkpoint": str(tmp_path / "other.pth")})


@pytest.mark.parametrize(
    "wrong", [{"opt": "none-such"}, {"opt_kwargs": {"rho": 1}}, {"model": "none-such"}, {"batch_size": 5000}]
)
def test_nothing_is_left_of_a_training_that_cannot_begin(tmp_path, wrong):
    with pytest.raises(MsOptimError):
        run({**SMALL, "output": str(tmp_path), **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_learning_rate_of_zero_is_not_replaced(tmp_path):
    run({**SMALL, "epochs": 1, "output": str(tmp_path), "experiment": "run", "lr": 0.0})
    assert last(tmp_path / "run")["optimizer"]["param_groups"][0]["initial_lr"] == 0.0


def test_a_training_leaves_the_streams_and_the_figures_of_its_process_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    backend = dict.__getitem__(matplotlib.rcParams, "backend")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run({**SMALL, "epochs": 1, "output": str(tmp_path), "experiment": "run"})
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert dict.__getitem__(matplotlib.rcParams, "backend") == backend
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def test_first_weights_are_a_files_moving_average_if_it_has_one(tmp_path):
    settings = {**SMALL, "epochs": 1, "output": str(tmp_path)}
    run({**settings, "experiment": "first", "model_ema": True, "model_ema_decay": 0.5})
    saved = last(tmp_path / "first")
    file = str(tmp_path / "first" / "last.pth.tar")
    run({**settings, "experiment": "second", "initial_checkpoint": file, "lr": 0.0})
    found = last(tmp_path / "second")["state_dict"]
    assert all(torch.equal(found[name], saved["state_dict_ema"][name]) for name in found)
    assert not torch.equal(saved["state_dict_ema"]["1.weight"], saved["state_dict"]["1.weight"])


def test_joint_statistics_are_refused_where_there_is_nobody_to_join(tmp_path):
    with pytest.raises(CommandLineError, match="--sync-bn is for several processes with a GPU each"):
        run({**SMALL, "output": str(tmp_path), "sync_bn": True})


def test_halves_of_files_of_a_process_that_died_are_cleared_away(tmp_path):
    settings = {**SMALL, "epochs": 1, "output": str(tmp_path), "experiment": "run"}
    run(settings)
    for name in (".tmp.pth.abc123.tar", "model_best.pth.tar.new"):
        (tmp_path / "run" / name).write_bytes(b"half")
    run({**settings, "epochs": 2, "resume": "auto"})
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {name for name in names if name.startswith(".") or name.endswith(".new")}
    assert "model_best.pth.tar" in names
