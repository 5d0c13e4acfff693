"""Recipes are what their script writes, differ in what they say they differ in, and hold nothing that is no option."""

import functools
import json
import re
import shlex

import pytest
import timm
import torch
import yaml
from cases import convnet, known_group
from timm.optim import create_optimizer_v2

from ms_optim.cli.named_object import find, is_named_object
from ms_optim.integrations.timm import create_optimizer
from ms_optim.train.config import read_arguments
from recipes import write

FOLDER = write.FOLDER
NAMES = [name for name, _, _ in write.names()]
CONTENT = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) for name in NAMES}

every_recipe = pytest.mark.parametrize("name", NAMES)


def test_recipes_and_readme_are_what_the_script_writes():
    rendered = write.rendered()
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(rendered) - {"README.md"}
    for name, text in rendered.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"{name}: run python -m recipes.write"


def test_every_family_that_was_promised_has_every_optimizer():
    cifar = ("resnet18", "resnet56", "preact_resnet18", "wrn28_10", "resmlp", "mixer", "vit_tiny")
    families = {f"cifar{classes}_{model}" for classes in (10, 100) for model in cifar}
    families |= {"digits_mlp", "mnist_mlp", "mnist_lenet", "cifar10_small_resnet"}
    families |= {"imagenet_resnet50", "imagenet_vit_s"}
    optimizers = ("sgd", "sam", "asam", "mssam", "msreg")
    assert set(NAMES) == {f"{family}_{optimizer}" for family in families for optimizer in optimizers}


@every_recipe
def test_the_trainer_reads_every_recipe(name):
    options = read_arguments(["-c", str(FOLDER / f"{name}.yaml")])
    assert {key: getattr(options, key) for key in CONTENT[name]} == CONTENT[name]
    assert "device" not in CONTENT[name]  # files for the CPU and for GPUs


@every_recipe
def test_numbers_are_numbers_in_yaml(name):
    _, family, optimizer = next(entry for entry in write.names() if entry[0] == name)
    settings = write.FAMILIES[family].settings
    assert {key: CONTENT[name][key] for key in settings} == {key: said.value for key, said in settings.items()}
    assert CONTENT[name].get("opt_kwargs", {}) == write.FAMILIES[family].own[optimizer].value


@pytest.mark.parametrize("family", write.FAMILIES)
def test_the_recipes_of_a_family_differ_in_the_optimizer_only(family):
    contents = [dict(CONTENT[f"{family}_{optimizer}"]) for optimizer in write.OPTIMIZERS]
    optimizers = [(content.pop("opt"), str(content.pop("opt_kwargs", {}))) for content in contents]
    assert len(set(optimizers)) == 5 and all(content == contents[0] for content in contents)


@every_recipe
def test_the_trainer_reads_the_commands_in_the_heading_and_they_are_of_this_recipe(name, monkeypatch):
    head = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    text = "\n".join(line.removeprefix("#").strip() for line in head.splitlines())
    commands = re.findall(r"^(?:python|torchrun).*(?<!\\)$", re.sub(r"\\\n", "", text), flags=re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[(start := words.index("-m")) + 1] == "ms_optim.train"
        assert words[words.index("-c") + 1] == f"recipes/{name}.yaml"
        monkeypatch.chdir(FOLDER.parent)
        assert read_arguments(words[start + 2 :]).opt == CONTENT[name]["opt"]
    assert all(f"{field}:" in text for field in ("device", "time", "result"))


@every_recipe
def test_the_optimizer_takes_what_the_recipe_gives_it(name):
    content, model = CONTENT[name], convnet()
    settings = {"lr": 0.1, "momentum": content["momentum"], "weight_decay": content["weight_decay"]}
    settings |= content.get("opt_kwargs", {})
    if content["opt"] == "sgd":
        optimizer = create_optimizer_v2(model, "sgd", **settings)
    else:
        group = {"group": known_group(model)} if content["opt"] in ("mssam", "msreg") else {}
        optimizer = create_optimizer(model, content["opt"], **settings, **group)
    for key, value in content.get("opt_kwargs", {}).items():
        for entry in optimizer.param_groups:
            assert entry.get(key, value) == value
    assert {entry["nesterov"] for entry in optimizer.param_groups} == {not name.startswith("digits")}


@pytest.mark.parametrize("family", write.FAMILIES)
def test_the_model_is_made_for_the_images_of_the_data(family):
    content = CONTENT[f"{family}_sgd"]
    classes, shape = {
        "digits": (10, (1, 8, 8)),
        "torch/mnist": (10, (1, 28, 28)),
        "torch/cifar10": (10, (3, 32, 32)),
        "torch/cifar100": (100, (3, 32, 32)),
        "torch/imagenet": (1000, (3, 224, 224)),
    }[content["dataset"]]
    model = content["model"]
    make = find(model, "--model") if is_named_object(model) else functools.partial(timm.create_model, model)
    with torch.device("meta"):
        model = make(num_classes=classes, **content.get("model_kwargs", {}))
        assert model(torch.empty(2, *shape)).shape == (2, classes)


# What has been measured.


@pytest.fixture
def measured(tmp_path):
    """A folder with one recipe's results of three seeds."""

    def add(seed, name="", **more):
        folder = tmp_path / "results" / "digits_mlp_sam" / f"seed{seed}{name}"
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            "recipe": "digits_mlp_sam",
            "command": "python -m ms_optim.train",
            "device": "1 × a processor",
            "seconds": 10.0 + seed,
            "epochs": 20,
            "validation_top1": 90.0,
            "test_top1": 95.0 + seed,
            "seed": seed,
            "environment": {},
        }
        (folder / "result.json").write_text(json.dumps({**result, **more}))

    (tmp_path / "README.md").write_text((FOLDER / "README.md").read_text(encoding="utf-8"))
    for seed in (1, 2, 3):
        add(seed)
    return tmp_path, add


def test_a_heading_and_the_table_say_what_was_measured(measured):
    folder, _ = measured
    files = write.rendered(folder)
    head = files["digits_mlp_sam.yaml"].partition("\n\n")[0]
    # 96, 97, 98: mean 97, s = 1, n = 3.
    assert "# result: test top-1 in per cent, mean ± standard error (seeds): 97.00 ± 0.58 (3)" in head
    assert "# device: 1 × a processor\n# time:   12 seconds a run" in head
    assert head.endswith("# log:    recipes/results/digits_mlp_sam/")
    row = next(line for line in files["README.md"].splitlines() if line.startswith("| `digits_mlp`"))
    assert row.split(" | ")[2:5] == ["not measured", "97.00 ± 0.58 (3)", "not measured"]
    assert "not measured" in files["digits_mlp_mssam.yaml"]
    assert yaml.safe_load(files["digits_mlp_sam.yaml"]) == CONTENT["digits_mlp_sam"]


def test_one_seed_has_no_error_and_data_without_a_test_set_says_what_it_was_measured_on():
    assert write.measured([{"test_top1": 95.0, "validation_top1": 90.0}]) == "95.00 (1)"
    assert write.measured([{"test_top1": None, "validation_top1": 90.0}]) == "held out: 90.00 (1)"
    assert write.measured([]) == "not measured"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"recipe": "digits_mlp_sgd"}, "recipe 'digits_mlp_sgd', and stands where 'digits_mlp_sam' belongs"),
        ({"epochs": 2}, "epochs 2, and stands where 20 belongs"),
        ({"seed": 1}, "second run with seed 1"),
    ],
)
def test_a_result_that_is_not_the_recipes_is_refused(measured, wrong, said):
    folder, add = measured
    add(**{"seed": 4, "name": "another", **wrong})
    with pytest.raises(ValueError, match=said):
        write.rendered(folder)


@pytest.mark.parametrize(("seconds", "said"), [(12.4, "12 seconds"), (600, "10 minutes"), (9000, "2.5 hours")])
def test_durations_in_words(seconds, said):
    assert write.duration(seconds) == said
