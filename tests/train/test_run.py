"""A whole run: what it leaves, what it says, what it refuses."""

import argparse
import csv
import json
import math
import subprocess

import pytest
import torch
import yaml
from train.runs import SMALL, command, environment, last, summary

import ms_optim
from ms_optim import models
from ms_optim.cli import main as ms_optim_command
from ms_optim.errors import CommandLineError, DivergedError
from ms_optim.train import run
from ms_optim.train.__main__ import main
from ms_optim.train.config import read_arguments


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the outcome of one training."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        **SMALL,
        **{"opt": "mssam", "opt_kwargs": {"rho": 0.2}, "sharpness_interval": 2, "sharpness_samples": 60, "epochs": 5},
        **{"output": str(folder), "experiment": "run", "checkpoint_hist": 2},
    }
    return folder / "run", run(settings)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_what_timms_does_and_more(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"args.yaml", "summary.csv", "last.pth.tar", "model_best.pth.tar"} <= names
    assert {"sharpness.csv", "curves.png", "sharpness.png", "result.json", "train.log"} <= names
    assert len([name for name in names if name.startswith("checkpoint-")]) == 2
    assert not [name for name in names if "tmp" in name or name.startswith(".") or name.endswith(".new")]
    columns = list(rows(folder / "summary.csv")[0])
    assert columns[:6] == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]


def test_the_outcome_is_that_of_the_tables_and_of_the_weights(finished):
    folder, outcome = finished
    table = rows(folder / "summary.csv")
    best = max(table, key=lambda row: float(row["eval_top1"]))
    assert outcome["validation_top1"] == float(best["eval_top1"])
    assert outcome["best_epoch"] == int(best["epoch"])
    assert outcome["train_loss"] == float(table[-1]["train_loss"])
    result = json.loads((folder / "result.json").read_text())
    assert {key: result[key] for key in outcome} == outcome
    assert result["opt"] == "mssam" and result["seed"] == 42 and result["environment"]["torch"] == torch.__version__


def test_the_test_set_is_scored_with_the_weights_that_were_best_on_held_out_images(finished):
    folder, outcome = finished
    from ms_optim.demo.training import digits

    data = digits(seed=0)
    model = models.digits_mlp().float()
    for name, key in (("model_best", "test_top1"), ("last", "test_top1_last")):
        content = torch.load(folder / f"{name}.pth.tar", weights_only=False)
        model.load_state_dict(content["state_dict"])
        images = _as_the_trainer_sees(data.x_test)
        accuracy = 100 * float((model(images).argmax(1) == data.y_test).double().mean())
        assert outcome[key] == pytest.approx(accuracy, abs=0.2)


def _as_the_trainer_sees(images):
    """The demo standardises by its own training images' mean; the preset's numbers are of those, rounded."""
    return images.float()


def test_the_sharpness_log_is_the_trace_and_the_minimum_sharpness(finished):
    folder, outcome = finished
    table = rows(folder / "sharpness.csv")
    assert [row["epoch"] for row in table if row["parameter"] == "(all)"] == ["1", "3", "4"]
    for epoch in ("1", "3", "4"):
        layers = [row for row in table if row["epoch"] == epoch and row["parameter"] != "(all)"]
        whole = next(row for row in table if row["epoch"] == epoch and row["parameter"] == "(all)")
        assert sum(float(row["trace"]) for row in layers) == pytest.approx(float(whole["trace"]), rel=1e-9)
        balanced = sum(float(row["balanced_trace"]) for row in layers)
        assert balanced == pytest.approx(float(whole["balanced_trace"]), rel=1e-9)
        assert float(whole["balanced_trace"]) <= float(whole["trace"])
    assert outcome["trace"] == float(whole["trace"])
    assert outcome["minimum_sharpness"] == float(whole["balanced_trace"])


def test_measuring_changes_nothing_of_a_training(finished, tmp_path):
    folder, _ = finished
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    run({**settings, "sharpness_interval": 0, "output": str(tmp_path)})
    one, other = last(folder)["state_dict"], last(tmp_path / "run")["state_dict"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_args_yaml_trains_the_same_again(finished, tmp_path):
    folder, _ = finished
    options = read_arguments(["-c", str(folder / "args.yaml"), "--output", str(tmp_path)])
    assert isinstance(options, argparse.Namespace)
    run({"config": folder / "args.yaml", "output": str(tmp_path)})
    drop = ("trace", "minimum_sharpness")
    mine, theirs = summary(folder), summary(tmp_path / "run")
    assert [{k: v for k, v in row.items() if k not in drop} for row in mine] == [
        {k: v for k, v in row.items() if k not in drop} for row in theirs
    ]


def test_timm_loads_the_checkpoint(finished):
    from timm.models import load_checkpoint

    folder, _ = finished
    model = models.digits_mlp()
    load_checkpoint(model, str(folder / "last.pth.tar"))
    state = last(folder)["state_dict"]
    assert all(torch.equal(tensor.float(), state[name]) for name, tensor in model.state_dict().items())


def test_the_command_line_measures_the_checkpoint(finished, capsys):
    folder, _ = finished
    words = ["measure", "--model", "ms_optim.models:digits_mlp", "--checkpoint", str(folder / "last.pth.tar")]
    assert ms_optim_command([*words, "--data", "digits", "--samples", "50"]) == 0
    assert "minimum" in capsys.readouterr().out


def test_nothing_is_left_behind_in_the_process(finished, tmp_path):
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    benchmark = torch.backends.cudnn.benchmark
    run({**SMALL, "epochs": 1, "threads": 2, "deterministic": True, "output": str(tmp_path)})
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark == benchmark
    import logging

    assert logging.getLogger("ms_optim.train").handlers == []


def test_two_trainings_of_one_seed_are_equal_and_of_two_are_not(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run({**SMALL, "epochs": 1, "seed": seed, "output": str(tmp_path), "experiment": name})
        weights.append(last(tmp_path / name)["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_without_held_out_images_the_last_weights_are_tested(tmp_path):
    outcome = run({**SMALL, "epochs": 2, "holdout": 0, "output": str(tmp_path), "experiment": "run"})
    assert "validation_top1" not in outcome and "best_epoch" not in outcome
    assert outcome["test_top1"] == outcome["test_top1_last"]
    assert "eval_top1" not in summary(tmp_path / "run")[0]


def test_between_validations_nothing_is_written(tmp_path):
    run({**SMALL, "epochs": 5, "val_interval": 2, "output": str(tmp_path), "experiment": "run"})
    assert [row["epoch"] for row in summary(tmp_path / "run")] == ["1", "3", "4"]


def test_measuring_is_not_left_out_where_no_validation_is_due(tmp_path):
    settings = {**SMALL, "epochs": 5, "val_interval": 2, "sharpness_interval": 3, "sharpness_samples": 20}
    run({**settings, "output": str(tmp_path), "experiment": "run"})
    assert [row["epoch"] for row in summary(tmp_path / "run")] == ["1", "2", "3", "4"]
    table = rows(tmp_path / "run" / "sharpness.csv")
    assert sorted({row["epoch"] for row in table}) == ["2", "4"]


def test_starting_at_an_earlier_epoch_than_the_checkpoints_leaves_one_row_for_each(tmp_path):
    settings = {**SMALL, "epochs": 3, "output": str(tmp_path), "experiment": "run"}
    run(settings)
    run({**settings, "start_epoch": 1, "resume": "auto"})
    assert [row["epoch"] for row in summary(tmp_path / "run")] == ["0", "1", "2"]


def test_a_training_that_diverges_says_so(tmp_path):
    with pytest.raises(DivergedError, match="training has diverged; lower --lr"):
        run({**SMALL, "lr": 1e20, "output": str(tmp_path)})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"opt": "nosuch"}, "--opt nosuch"),
        ({"opt": "mssam", "opt_kwargs": {"radius": 1}}, "--opt mssam with {'radius': 1}"),
        ({"opt": "mssam", "opt_kwargs": {"rho": -1.0}}, "rho must be >= 0"),
        ({"sched": "nosuch"}, "--sched nosuch"),
        ({"model": "resnet19"}, "did you mean"),
        ({"model": "ms_optim.models:nosuch"}, "has no 'nosuch'"),
        ({"model": "ms_optim.models:mlp"}, "cannot be called with images of [1, 8, 8]"),
        ({"model": "ms_optim.models:digits_mlp", "drop": 0.5}, "takes no drop_rate"),
        ({"model": "ms_optim.models:digits_mlp", "pretrained": True}, "--pretrained is for timm's models"),
        ({"stem": "small"}, "--stem small"),
        ({"num_classes": 7}, "7"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
        ({"batch_size": 5000}, "less than one batch"),
        ({"mixup": 0.1, "batch_size": 33}, "odd"),
        ({"grad_checkpointing": True}, "set_grad_checkpointing"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, more, reason):
    with pytest.raises((CommandLineError, ValueError)) as caught:
        run({**SMALL, **more, "output": str(tmp_path), "experiment": "run"})
    assert reason in str(caught.value)
    assert [path.name for path in tmp_path.glob("run/*") if path.suffix != ".log"] == []


def test_the_command_prints_the_result_as_timm_does(tmp_path, capsys):
    words = command({**SMALL, "epochs": 1, "output": str(tmp_path)})[3:]
    assert main(words) == 0
    text = capsys.readouterr().out.split("--result\n")[1]
    assert 0 <= json.loads(text)[0]["test_top1"] <= 100


def test_a_wrong_command_line_is_one_line_and_exit_code_2():
    words = command({**SMALL, "opt": "nosuch"})
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("ms_optim.train: error: --opt nosuch")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")  # torch's, of AdaHessian
@pytest.mark.parametrize("name", ["adamw", "lookahead_sgd", "lookahead_mssam", "adahessian", "msoptimgsam", "msreg"])
def test_optimizers_of_timm_and_of_this_package_train(tmp_path, name):
    lr = {"adamw": 0.002, "adahessian": 0.1}.get(name, 0.05)
    outcome = run({**SMALL, "opt": name, "lr": lr, "epochs": 2, "output": str(tmp_path)})
    assert outcome["train_loss"] < 2.2 and math.isfinite(outcome["test_loss"])


def test_the_moving_average_is_validated_and_moves_with_the_weights(tmp_path):
    """MSSAM rescales the weights; an average that stayed behind would be of two networks."""
    settings = {**SMALL, "opt": "mssam", "opt_kwargs": {"rho": 0.1, "refresh_every": 1}, "epochs": 3, "lr": 0.01}
    settings |= {"model_ema": True, "model_ema_decay": 0.5}
    outcome = run({**settings, "output": str(tmp_path), "experiment": "run"})
    row = summary(tmp_path / "run")[-1]
    assert float(row["eval_loss"]) == pytest.approx(float(row["eval_loss_plain"]), rel=0.05)
    assert outcome["validation_top1"] > 30


def test_float_weights_are_trained_whatever_the_callers_default_is(tmp_path):
    assert torch.get_default_dtype() == torch.float64  # of these tests
    run({**SMALL, "epochs": 1, "output": str(tmp_path), "experiment": "run"})
    assert {tensor.dtype for tensor in last(tmp_path / "run")["state_dict"].values()} == {torch.float32}


def test_an_optimizer_that_is_given_by_its_class_trains_alike(tmp_path):
    """The registry's names build what the package's classes are."""
    settings = {**SMALL, "opt": "msoptimsam", "opt_kwargs": {"rho": 0.1, "nesterov": False}, "epochs": 1}
    run({**settings, "output": str(tmp_path)})
    saved = torch.load(next(tmp_path.glob("*/last.pth.tar")), weights_only=False)["optimizer"]
    assert saved["ms_optim"]["optimizer"] == ms_optim.SAM.__name__
    assert saved["param_groups"][0]["rho"] == 0.1 and saved["param_groups"][0]["nesterov"] is False
