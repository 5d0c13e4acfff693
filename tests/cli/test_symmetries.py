"""``ms-optim symmetries``: the group that the function finds, in words and in numbers."""

import json

import pytest
import torch
from cli import project
from cli.conftest import QUICK

import ms_optim
from ms_optim.cli.symmetries import as_numbers, in_words
from ms_optim.symmetry import Opaque

CHAIN = ("symmetries", "--model", "cli.project:network", "--input-size", 1, 8, 8)


def test_a_chain_in_words(ms):
    run = ms(*CHAIN)
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert lines[2] == "1 rescaling leaves the function unchanged; it moves 3 of 4 parameters"
    assert [line.split() for line in lines[3:5]] == [["1.", "up:", "1.weight,", "1.bias"], ["down:", "3.weight"]]
    assert lines[5] == "  fixed: 3.bias"


def test_the_numbers_are_those_of_the_group(ms, timm_checkpoint):
    run = ms("symmetries", *QUICK, "--checkpoint", timm_checkpoint, "--json", "-")
    content = json.loads(run.out)
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=7).float()
    group = ms_optim.scale_symmetries(model, torch.randn(2, 3, 32, 32, dtype=torch.float32))
    assert len(content["generators"]) == len(group) > 10
    for row, powers in zip(group.generators.tolist(), content["generators"], strict=True):
        assert powers == {name: int(power) for name, power in zip(group.parameters, row, strict=True) if power}
    assert [s["mean"] for s in content["statistics"]] == [s.mean for s in group.statistics]
    assert content["fixed"] == ["fc.bias"] and content["model"]["name"] == "test_resnet" and content["check"] is None


def test_running_statistics_move_along(ms, timm_checkpoint):
    run = ms("symmetries", *QUICK, "--checkpoint", timm_checkpoint)
    assert "along: running statistics of bn1" in run.out and "down: fc.weight" in run.out


def test_the_check_passes_for_a_network_and_says_by_how_much(ms):
    run = ms(*CHAIN, "--check", "--dtype", "float64", "--json", "-")
    check = json.loads(run.out)["check"]
    assert run.code == 0 and check["passed"] and 0 <= check["eval_error"] < 1e-12


def test_a_check_that_fails_is_exit_code_1(ms, monkeypatch):
    def wrong(model, example_inputs):
        group = ms_optim.scale_symmetries(model, example_inputs)
        return type(group)(group.parameters, group.generators.abs())

    monkeypatch.setattr("ms_optim.cli.symmetries.scale_symmetries", wrong)
    run = ms(*CHAIN, "--check")
    assert run.code == 1 and "check failed: a random rescaling changed the logits" in run.out
    assert json.loads(ms(*CHAIN, "--check", "--json", "-").out)["check"]["passed"] is False


def test_what_is_opaque_is_said_with_its_reason(ms):
    run = ms("symmetries", "--model", "cli.project:smooth", "--input-size", 1, 8, 8)
    assert run.code == 0 and run.err == ""
    assert "0 independent rescalings" in run.out and "aten.tanh.default (" in run.out and "in 2" in run.out


def test_long_lists_are_shortened_unless_all_is_asked_for():
    names = tuple(f"layer{i}" for i in range(30))
    opaque = (Opaque("aten.gelu.default", "act", "no rule"), Opaque("aten.gelu.default", "", "no rule"))
    group = ms_optim.ScaleGroup(names, torch.ones(1, 30, dtype=torch.float64) * 2, opaque, inexact_normalizers=1)
    short, long = in_words(group), in_words(group, None)
    assert "layer11 (to the power 2) and 18 more" in short.replace("\n            ", " ") and "layer29" not in short
    assert "layer29" in long and "more" not in long
    assert "aten.gelu.default (no rule), 2 times, in act, the model itself" in short
    assert "1 LayerNorm-like normalisers" in short
    assert as_numbers(group)["generators"][0]["layer29"] == 2


def test_a_model_that_cannot_be_read_is_refused(refused):
    line = refused("symmetries", "--model", "cli.project:Undecided", "--input-size", 1, 8, 8)
    assert "Undecided cannot be read by torch.export" in line


def test_the_words_are_those_of_the_functions_group(ms):
    group = ms_optim.scale_symmetries(project.network(), project.inputs())
    assert in_words(group) in ms(*CHAIN).out
