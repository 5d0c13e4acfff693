"""Data: every way to name the same samples gives the same batches, and what cannot be read says why."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import project
from torch import nn

from ms_optim.cli.data import add_data_arguments, load_data
from ms_optim.cli.models import LoadedModel
from ms_optim.errors import CommandLineError, DataError


def opened(*arguments, model=None, dtype=torch.float64):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(["--data", *(str(argument) for argument in arguments)])
    model = project.network() if model is None else model
    return load_data(options, LoadedModel(model.to(dtype).eval(), "a model", ""))


def flat(channels, size, classes=3):
    """A linear model of images, whatever their size."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))


def everything(data):
    """Inputs and labels of all batches."""
    pairs = list(data)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


@pytest.mark.parametrize("kind", ["batches", "loader", "dataset", "stream", "samples"])
def test_every_kind_of_the_users_data_is_the_same_samples(kind):
    data = opened(f"cli.project:{kind}", "--batch-size", 4)
    for _ in range(2):  # and as often as one likes
        x, y = everything(data)
        assert torch.equal(x, project.samples()[0]) and torch.equal(y, project.samples()[1])
    assert data.labelled()


@pytest.mark.parametrize("kind", ["batches", "loader", "stream", "samples"])
def test_no_more_samples_than_were_asked_for(kind):
    x, y = everything(opened(f"cli.project:{kind}", "--batch-size", 4, "--samples", 7))
    assert torch.equal(x, project.samples()[0][:7]) and torch.equal(y, project.samples()[1][:7])


def test_of_a_data_set_a_random_part_is_taken():
    x, y = project.samples()
    parts = [everything(opened("cli.project:dataset", "--samples", 5, "--seed", seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])
    chosen = [next(i for i in range(len(x)) if torch.equal(x[i], row)) for row in parts[0]]
    assert chosen == sorted(set(chosen)) and len(chosen) == 5 and chosen != list(range(5))


def test_inputs_without_labels():
    data = opened("cli.project:inputs", "--batch-size", 3)
    assert torch.equal(torch.cat(list(data)), project.inputs()) and not data.labelled()


def test_digits_are_those_of_the_demo():
    pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ms_optim[cli]'")
    from ms_optim.demo.training import digits

    both = digits(seed=0)
    for split, x, y in (("train", both.x, both.y), ("validation", both.x_test, both.y_test)):
        data = opened("digits", "--split", split)
        assert torch.equal(everything(data)[0], x) and torch.equal(everything(data)[1], y)
    assert len(everything(opened("digits", "--samples", 30))[1]) == 30
    with pytest.raises(CommandLineError, match="--split test is not one of the digits'"):
        opened("digits", "--split", "test")


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(CommandLineError, match=r"--data digits needs scikit-learn: pip install 'ms_optim\[cli\]'"):
        opened("digits")


def test_random_inputs_follow_the_seed_and_say_what_they_are():
    given = ("random", "--input-size", 1, 8, 8, "--samples", 5, "--batch-size", 2)
    data = [opened(*given, "--seed", seed) for seed in (0, 0, 1)]
    x, y = everything(data[0])
    assert x.shape == (5, 1, 8, 8) and len(data[0]) == 3 and 0 <= int(y.min()) <= int(y.max()) < 10
    assert torch.equal(x, everything(data[1])[0]) and not torch.equal(x, everything(data[2])[0])
    assert "random" in str(data[0]) and "not what was trained on" in str(data[0])


def test_random_inputs_of_an_unknown_size_ask_for_it():
    with pytest.raises(CommandLineError, match="pass --input-size C H W"):
        opened("random")


def test_numbers_come_in_the_type_of_the_model():
    x, y = everything(opened("cli.project:batches", dtype=torch.float32))
    assert x.dtype == torch.float32 and y.dtype == torch.int64


# timm opens images and leaves closing them to Python.
UNCLOSED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def folder(tmp_path):
    """Two classes of images in plain colours, in two splits."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 6), ("validation", 2)):
        for name, colour in (("cats", (255, 0, 0)), ("dogs", (0, 255, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                image.new("RGB", (12, 12), colour).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


@UNCLOSED
def test_a_folder_is_read_normalised_and_by_split(folder):
    given = (folder, "--input-size", 3, 8, 8, "--mean", 0.5, "--std", 0.25, "--crop-pct", 1)
    x, y = everything(opened(*given, model=flat(3, 8)))
    assert x.shape == (12, 3, 8, 8) and y.tolist() == [0] * 6 + [1] * 6
    # Red is (1 − 0.5) / 0.25 = 2, what is not there (0 − 0.5) / 0.25 = −2.
    assert torch.allclose(x[0, 0], torch.full((8, 8), 2.0)) and torch.allclose(x[0, 1:], torch.full((2, 8, 8), -2.0))
    assert len(everything(opened(*given, "--split", "validation", model=flat(3, 8)))[1]) == 4


@UNCLOSED
def test_a_part_of_a_folder_has_all_classes(folder):
    _, y = everything(opened(folder, "--input-size", 3, 8, 8, "--samples", 6, model=flat(3, 8)))
    assert set(y.tolist()) == {0, 1}


@UNCLOSED
def test_a_model_of_one_channel_gets_grey_images(folder):
    x, _ = everything(opened(folder, "--input-size", 1, 8, 8, "--mean", 0, "--std", 1, model=flat(1, 8)))
    assert x.shape == (12, 1, 8, 8)
    with pytest.raises(CommandLineError, match="images of 1 channels need a mean for each or one for all: pass --mean"):
        opened(folder, "--input-size", 1, 8, 8, model=flat(1, 8))


def write_mnist(root: Path):
    """Five images of MNIST's format: a header of big-endian integers, then bytes."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(5 * 28 * 28, dtype=np.uint8)
    for split in ("train", "t10k"):
        header = np.array([0x00000803, 5, 28, 28], dtype=">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x00000801, 5], dtype=">i4").tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes([3, 1, 4, 1, 5]))


def test_a_data_set_of_torchvision_through_timm(tmp_path):
    write_mnist(tmp_path)
    given = ("torch/mnist", "--data-dir", tmp_path, "--input-size", 1, 28, 28, "--mean", 0, "--std", 1, "--crop-pct", 1)
    x, y = everything(opened(*given, model=flat(1, 28, 10)))
    assert y.tolist() == [3, 1, 4, 1, 5]
    assert torch.allclose(x[0].flatten(), torch.arange(28 * 28).remainder(256).double() / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "--data nonsense is neither of: digits, random, a folder"),
        (("images/none",), "--data images/none is no folder; if it is a data set of timm, say where with --data-dir"),
        (("torch/cifar10", "--data-dir", "nowhere", "--input-size", 3, 8, 8), "timm cannot open --data torch/cifar10"),
        (("torch/none", "--data-dir", ".", "--input-size", 3, 8, 8), "timm cannot open --data torch/none"),
        (("cli.project:other",), "returned a int; return batches"),
        (("cli.project:raising",), "--data cli.project:raising raised ValueError"),
        (("cli.project:stream", "--data-kwargs", "size=3"), "raised TypeError"),
        (("random", "--input-size", 3, 8, 8), r"MLP cannot be called with a batch of \[1, 3, 8, 8\]"),
        (("cli.project:batches", "--batch-size", 0), "--batch-size must be at least 1, got 0"),
    ],
)
def test_data_that_cannot_be_read_say_why(arguments, said):
    with pytest.raises(CommandLineError, match=said):
        opened(*arguments)


def test_no_batch_at_all():
    with pytest.raises(DataError, match="holds no batch"):
        opened("cli.project:nothing")
