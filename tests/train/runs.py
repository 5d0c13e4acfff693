"""Small real trainings on the handwritten digits, in this process or in one that can be killed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

import ms_optim
from ms_optim.train import checkpoint

ROOT = Path(ms_optim.__file__).parents[1]

#: A training of about a second; every option in it is real.
SMALL = {
    **{"dataset": "digits", "model": "ms_optim.models:digits_mlp", "device": "cpu", "threads": 1, "workers": 0},
    **{"epochs": 3, "warmup_epochs": 0, "batch_size": 64, "lr": 0.1, "smoothing": 0.0, "weight_decay": 5e-4},
    **{"train_num_samples": 512, "log_interval": 4},
}

#: Columns of ``summary.csv`` that are the time it took.
TIMES = ("images_per_second", "seconds")


def command(settings):
    """The command line of a training."""
    words = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, dict):
            words += [flag, *(f"{k}={v}" for k, v in value.items())]
        elif value is not False:
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return [sys.executable, "-m", "ms_optim.train", *words]


def environment():
    """For processes of their own: the package as it is here, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def started(settings):
    """A training in a process of its own."""
    return subprocess.Popen(
        command(settings), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def summary(folder):
    """The rows of ``summary.csv`` as text, without the times."""
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def last(folder):
    """The content of the last checkpoint."""
    return checkpoint.read(folder / f"last{checkpoint.ENDING}")


def differences(one, other, where=""):
    """Places at which two nested containers differ, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        missing = object()
        parts = [differences(one.get(k, missing), other.get(k, missing), f"{where}.{k}") for k in keys]
        return [each for part in parts for each in part]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        parts = [differences(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))]
        return [each for part in parts for each in part]
    return [] if one == other or (one != one and other != other) else [where]


def of_training(content):
    """What of a checkpoint has to be the same bit by bit: all but paths and times."""
    kept = {key: value for key, value in content.items() if key not in ("args", "run")}
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in content["run"]["summary"]]
    saver = content["run"]["saver"]
    return {**kept, "summary": rows, "sharpness": content["run"]["sharpness"], "saver": saver}
