"""Every recipe takes two steps: its model, its optimizer, its augmentation, on a few images of its data set's shape.

The images lie in folders, as a user's may; presets say what the data set's are like.  Where the real data are,
MNIST, and CIFAR-10 for one of the recipes that were measured on it, take the place of the folders.
"""

import os
from pathlib import Path

import pytest
import torch
import yaml
from train.pictures import splits

from ms_optim.train import run
from recipes import write

REAL = os.environ.get("MS_OPTIM_DATA")
NAMES = [name for name, _, _ in write.names()]

#: On a CPU the others take many seconds each: large networks, and reading the graph of deep ones.
FAST_FAMILIES = ("digits", "mnist", "cifar10_small_resnet")
FAST = ("cifar10_resnet18_mssam", "cifar10_resnet56_sgd", "cifar10_preact_resnet18_sgd", "cifar10_mixer_sgd")


def is_slow(name):
    """Whether a recipe is left to the slow tests."""
    return not name.startswith((*FAST_FAMILIES, *FAST))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of images in the data sets' sizes, made when they are asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            size, channels = {"mnist": ((28, 28), 1), "cifar": ((32, 32), 3), "imagenet": ((260, 300), 3)}[kind]
            made[kind] = splits(tmp_path_factory.mktemp(kind), each=4, size=size, channels=channels)
        return made[kind]

    return of


def data_for(name, images):
    """What takes the place of a recipe's data: the real data where it is, else a folder."""
    data = yaml.safe_load((write.FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["dataset"]
    if data == "digits":
        return {}
    if data == "torch/mnist" and REAL:
        return {"data_dir": REAL, "holdout": 4}
    if name == "cifar10_small_resnet_mssam" and REAL:
        return {"dataset": "", "preset": "cifar10", "data_dir": str(Path(REAL) / "cifar10"), "holdout": 10}
    if data == "torch/imagenet":
        own = {"dataset": "", "data_dir": str(images("imagenet")), "num_classes": 1000, "holdout": 3, "test_split": ""}
        return {**own, "input_size": [3, 64, 64]} if "resnet50" in name else own
    kind = data.removeprefix("torch/")
    folder = str(images("mnist" if kind == "mnist" else "cifar"))
    return {"dataset": "", "preset": kind, "data_dir": folder, "holdout": 3,}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if is_slow(name) else name for name in NAMES]
)
def test_it_takes_two_steps(name, images, tmp_path):
    settings = {
        **{"config": write.FOLDER / f"{name}.yaml", "device": "cpu", "workers": 0, "threads": 1, "epochs": 1},
        **{"batch_size": 2, "grad_accum_steps": 1, "train_num_samples": 4, "warmup_epochs": 0, "test_split": ""},
        **{"lr": 0.01, "amp": False, "model_ema": False, "output": str(tmp_path)},
        **data_for(name, images),
    }
    outcome = run(settings)
    assert outcome["epochs"] == 1 and 0 < outcome["train_loss"] < 50
    saved = torch.load(next(tmp_path.glob("*/last.pth.tar")), weights_only=False)["optimizer"]
    own = saved.get("ms_optim")
    assert name.endswith("_sgd") == (own is None)
    if own is not None:
        assert own["steps"] == 2
