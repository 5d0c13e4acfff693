"""The command line in this process: exit code and what was printed where."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ms_optim.cli import main


@pytest.fixture
def ms(capsys):
    """Run a command: ``ms("measure", "--model", …)`` has ``code``, ``out`` and ``err``."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def refused(ms):
    """Run a command that has to be refused in one line; the line."""

    def run(*arguments):
        run = ms(*arguments)
        assert run.code == 2
        assert run.err.count("\n") == 1 and run.err.startswith("ms-optim: error: "), run.err
        assert "Traceback" not in run.out + run.err
        return run.err

    return run


def lived_in(model, seed):
    """Weights and running statistics of a network that has been trained, in float32 as files have them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_var, 0.5, 2.0), (module.weight.data, 0.5, 1.5)):
                tensor.uniform_(low, high, generator=generator)
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.2, generator=generator)
    return model.float()


@pytest.fixture(scope="session")
def timm_checkpoint(tmp_path_factory):
    """A checkpoint as timm's training script saves it, but for the optimizer: 7 classes, an average, arguments."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, average = (lived_in(timm.create_model("test_resnet", num_classes=7), seed) for seed in (1, 2))
    path = tmp_path_factory.mktemp("timm") / "model_best.pth.tar"
    content = {
        **{"epoch": 3, "arch": "test_resnet", "state_dict": model.state_dict(), "state_dict_ema": average.state_dict()},
        **{"args": argparse.Namespace(lr=0.1, opt="sgd"), "version": 2, "metric": 71.5},
    }
    torch.save(content, path)
    return path


#: A small timm model on images that are quick.
QUICK = ("--model", "test_resnet", "--data", "random", "--input-size", 3, 32, 32, "--samples", 3)
