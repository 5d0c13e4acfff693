"""Models and checkpoints: every layout of weights gives the same network, every mistake one line."""

import argparse

import pytest
import torch
from cli import project

from ms_optim.cli.checkpoint import read_checkpoint
from ms_optim.cli.models import add_model_arguments, load_model
from ms_optim.errors import CommandLineError


def loaded(*arguments):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return load_model(parser.parse_args([str(argument) for argument in arguments]))


def other_weights():
    state = project.network().state_dict()
    return {name: value + 0.5 for name, value in state.items()}


def prefixed(prefix):
    return {prefix + name: value for name, value in other_weights().items()}


LAYOUTS = {
    "state_dict": other_weights,
    "data parallel": lambda: prefixed("module."),
    "compiled": lambda: prefixed("_orig_mod."),
    "both": lambda: prefixed("_orig_mod.module."),
    "averaged model": lambda: {**prefixed("module."), "n_averaged": torch.tensor(3)},
    "timm": lambda: {"state_dict": other_weights(), "args": argparse.Namespace(lr=1), "epoch": 1},
    "under model": lambda: {"model": other_weights(), "optimizer": {"state": {}, "param_groups": []}},
    "lightning": lambda: {"state_dict": prefixed("model."), "global_step": 3},
    "under another name": lambda: {"params": other_weights(), "step": torch.tensor(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_in_every_layout(layout, tmp_path):
    torch.save(LAYOUTS[layout](), tmp_path / "a.pth")
    model = loaded("--model", "cli.project:network", "--checkpoint", tmp_path / "a.pth", "--dtype", "float64")
    wanted = other_weights()
    assert all(torch.equal(value, wanted[name]) for name, value in model.module.state_dict().items())
    assert not model.module.training


def test_safetensors_are_read(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    torch_files.save_file(other_weights(), tmp_path / "a.safetensors", {"format": "pt"})
    model = loaded("--model", "cli.project:network", "--checkpoint", tmp_path / "a.safetensors", "--dtype", "float64")
    assert torch.equal(model.module.state_dict()["1.weight"], other_weights()["1.weight"])
    assert read_checkpoint(tmp_path / "a.safetensors").metadata == {"format": "pt"}


def test_the_average_is_taken_when_it_is_asked_for(tmp_path):
    average = {name: value - 7 for name, value in other_weights().items()}
    torch.save({"state_dict": other_weights(), "state_dict_ema": average}, tmp_path / "a.pth")
    given = ("--model", "cli.project:network", "--checkpoint", tmp_path / "a.pth", "--dtype", "float64")
    assert torch.equal(loaded(*given).module.state_dict()["1.bias"], other_weights()["1.bias"])
    assert torch.equal(loaded(*given, "--ema").module.state_dict()["1.bias"], average["1.bias"])


def test_the_model_of_an_installed_module_and_its_arguments():
    model = loaded("--model", "ms_optim.models:small_resnet", "--model-kwargs", "channels=4", "in_channels=2").module
    assert model.stem.weight.shape == (4, 2, 3, 3)


def test_types_devices_and_arguments():
    model = loaded("--model", "cli.project:network", "--model-kwargs", "width=3", "--num-classes", "4")
    assert [tuple(p.shape) for p in model.module.parameters()] == [(3, 64), (3,), (4, 3), (4,)]
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert model.weights == "weights as the model was made"


def test_an_instance_is_copied():
    before = {name: value.clone() for name, value in project.INSTANCE.state_dict().items()}
    model = loaded("--model", "cli.project:INSTANCE").module
    assert model is not project.INSTANCE and next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in project.INSTANCE.state_dict().items())


def test_a_model_in_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "widths_beside.py").write_text("WIDTH = 9\n")
    code = "import torch, widths_beside\ndef make():\n    return torch.nn.Linear(widths_beside.WIDTH, 2)\n"
    (tmp_path / "net_in_a_file.py").write_text(code)
    assert loaded("--model", f"{tmp_path}/net_in_a_file.py:make").module.in_features == 9


def test_a_timm_model_has_the_classes_that_it_is_told(timm_checkpoint):
    assert loaded("--model", "test_resnet", "--num-classes", 4).module.num_classes == 4
    with pytest.raises(CommandLineError, match=r"fc\.weight has shape \(7, 96\) there and \(4, 96\) in the model"):
        loaded("--model", "test_resnet", "--num-classes", 4, "--checkpoint", timm_checkpoint)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "resnet19"), "did you mean resnet"),
        (("--model", "resnet18", "--model-kwargs", "depth=3"), "timm cannot make resnet18 with depth=3: TypeError"),
        (("--model", "nowhere:make"), "cannot import nowhere: ModuleNotFoundError.*working directory"),
        (("--model", "nowhere.py:make"), "there is no file nowhere.py"),
        (("--model", "cli.project:missing"), "cli.project has no 'missing'; it has"),
        (("--model", "cli project:make"), "not of the form module:function"),
        (("--model", "cli.project:raising"), "raised ValueError: the weights are elsewhere"),
        (("--model", "cli.project:leaving"), "raised SystemExit: configuration is missing"),
        (("--model", "cli.project:other"), "returned a int, not a torch.nn.Module"),
        (("--model", "cli.project:NUMBER"), "is a int, and a function is needed"),
        (("--model", "cli.project:INSTANCE", "--num-classes", 3), "takes no --model-kwargs"),
        (("--model", "torch.nn:ReLU"), "has no parameters"),
        (("--model", "cli.project:network", "--device", "cuda:99"), "--device cuda:99 cannot be used"),
        (("--model", "cli.project:network", "--device", "abacus"), "--device abacus cannot be used"),
        (("--model", "cli.project:network", "--device", "meta"), "holds no numbers"),
        (("--model", "cli.project:network", "--ema"), "none is given"),
        (("--model", "cli.project:network", "--checkpoint", "nowhere.pth"), "nowhere.pth is not there"),
        (("--model", "cli.project:network", "--checkpoint", "."), "is a folder"),
    ],
)
def test_models_that_cannot_be_made_say_why(arguments, said):
    with pytest.raises(CommandLineError, match=said):
        loaded(*arguments)


class Foreign:
    """Something that only code could restore."""


def without(name):
    return {key: value for key, value in other_weights().items() if key != name}


WRONG_FILES = {
    "lacks": (lambda: without("1.bias"), "it lacks 1.bias; name the --model"),
    "has more": (lambda: {**other_weights(), "head": torch.ones(1)}, "it has head, which the model has not"),
    "another": (lambda: {"a": torch.ones(1)}, "it lacks 1.weight, 1.bias, 3.weight and 1 more; it has a, which"),
    "other shape": (lambda: {**other_weights(), "1.bias": torch.ones(3)}, r"1.bias has shape \(3,\) there and \(12,\)"),
    "a module": (project.network, r"only running code could restore \(ms_optim.models.chains.MLP, torch.nn"),
    "an object": (lambda: {"state_dict": other_weights(), "extra": Foreign()}, "only running code could restore"),
    "a tensor": (lambda: torch.ones(3), "holds a Tensor; save the model's state_dict"),
    "no weights": (lambda: {"epoch": 3, "args": {}}, "has no weights .*; it holds epoch, args"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_checkpoints_that_do_not_fit_say_why(case, tmp_path):
    make, said = WRONG_FILES[case]
    torch.save(make(), tmp_path / "a.pth")
    with pytest.raises(CommandLineError, match=said):
        loaded("--model", "cli.project:network", "--checkpoint", tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_file_that_is_no_checkpoint_says_so(name, tmp_path):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(CommandLineError, match="is not a file of torch.save|cannot be read"):
        read_checkpoint(tmp_path / name)


def test_a_truncated_file_says_so(tmp_path):
    torch.save(other_weights(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CommandLineError, match="cannot be read .*is it complete"):
        read_checkpoint(tmp_path / "a.pth")


def test_no_average_says_where_it_was_looked_for(tmp_path):
    torch.save({"state_dict": other_weights()}, tmp_path / "a.pth")
    with pytest.raises(CommandLineError, match="has no average of the weights .*state_dict_ema.*it holds state_dict"):
        read_checkpoint(tmp_path / "a.pth", averaged=True)
