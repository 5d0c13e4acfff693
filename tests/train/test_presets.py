"""Presets fill in what the user leaves open, and nothing else."""

import pytest
from train.command import command

from ms_optim.errors import CommandLineError
from ms_optim.train import preset
from ms_optim.train.preset import PRESETS


def filled(**given):
    options = command(**given)
    preset.fill(options)
    again = command(**vars(options))
    preset.fill(again)
    assert again == options  # saved as args.yaml and read again
    return options


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_all_that_a_model_and_a_loader_need(name):
    found = PRESETS[name]
    assert found.name == name
    assert len(found.mean) == len(found.std) == found.input_size[0]
    assert all(0 < value < 1 for value in (*found.mean, *found.std))
    options = filled(preset=name)
    assert options.input_size == list(found.input_size)
    assert (options.in_chans, options.num_classes) == (found.input_size[0], found.num_classes)
    assert (options.mean, options.std) == (list(found.mean), list(found.std))
    assert (options.hflip, options.color_jitter, options.crop_padding) == (found.hflip, 0.0, found.crop_padding)
    assert (options.train_crop_mode, options.scale, options.crop_pct) == ("pad", None, 1.0)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("torch/cifar10", "cifar10"),
        ("Torch/CIFAR100", "cifar100"),
        ("torch/fashion_mnist", "fashion_mnist"),
        ("digits", "digits"),
        ("torch/imagenet", None),
        ("hfds/someone/cifar10", None),
        ("hfds/cifar10", None),
        ("cifar10", None),
        ("", None),
    ],
)
def test_auto_goes_by_the_name_of_the_data_set(dataset, expected):
    found = preset.resolve(command(dataset=dataset))
    assert (found and found.name) == expected


def test_none_is_no_preset_and_an_unknown_one_is_refused_with_those_there_are():
    assert preset.resolve(command(dataset="digits", preset="none")) is None
    with pytest.raises(CommandLineError, match=r"cifar11 is neither auto, none nor one of cifar10, .*digits"):
        preset.resolve(command(preset="cifar11"))


def test_without_a_preset_timm_decides():
    options = filled(dataset="")
    assert (options.hflip, options.color_jitter, options.scale) == (0.5, 0.4, [0.08, 1.0])
    assert (options.train_crop_mode, options.crop_padding) == (None, 0)
    untouched = ("input_size", "mean", "std", "num_classes", "in_chans", "crop_pct")
    assert [getattr(options, name) for name in untouched] == [None] * len(untouched)


def test_what_the_user_gives_wins():
    given = {
        "input_size": [3, 40, 40], "mean": [0.5, 0.5, 0.5], "std": [0.1, 0.1, 0.1], "num_classes": 7, "in_chans": 3,
        "hflip": 0.1, "color_jitter": 0.2, "crop_padding": 3, "crop_pct": 0.9,
    }  # fmt: skip
    options = filled(preset="cifar10", **given)
    assert {name: getattr(options, name) for name in given} == given
    assert options.train_crop_mode == "pad"


def test_random_resized_crop_replaces_the_padded_one_where_it_is_asked_for():
    options = filled(preset="cifar10", scale=[0.5, 1.0])
    assert (options.train_crop_mode, options.scale, options.crop_padding) == ("rrc", [0.5, 1.0], 0)
    options = filled(preset="cifar10", train_crop_mode="rkrc")
    assert (options.train_crop_mode, options.scale, options.crop_padding) == ("rkrc", [0.08, 1.0], 0)


def test_a_padded_crop_needs_no_preset():
    options = filled(crop_padding=4)
    assert (options.train_crop_mode, options.crop_padding, options.scale) == ("pad", 4, None)


def test_an_image_of_one_channel_in_three_has_the_same_mean_in_each():
    options = filled(preset="mnist", in_chans=3, img_size=32)
    assert options.input_size == [3, 32, 32]
    assert options.mean == [0.1307] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"crop_padding": -1}, "at least 0, got -1"),
        ({"crop_padding": 4, "scale": [0.5, 1.0]}, "two ways to crop"),
        ({"crop_padding": 4, "train_crop_mode": "rrc"}, "two ways to crop"),
        ({"train_crop_mode": "pad", "scale": [0.5, 1.0]}, "leave one of them out"),
        ({"preset": "cifar10", "in_chans": 1}, "has 3 channels, and images of 1"),
        ({"preset": "cifar10", "in_chans": 1, "input_size": [3, 32, 32]}, "do not agree"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(CommandLineError, match=message):
        preset.fill(command(**given))
