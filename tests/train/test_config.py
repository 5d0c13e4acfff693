"""Recipes and command lines: what they say is what a run gets, and what they cannot mean is refused."""

import re

import pytest
import yaml

from ms_optim.errors import CommandLineError
from ms_optim.train.config import options_of, read_arguments, read_settings, write_args
from ms_optim.train.options import parser


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, and returns the arguments that name it."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return ["-c", str(path)]

    return write


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(recipe):
    options = read_arguments([*recipe("lr: 0.3\nbatch_size: 64\n"), "--lr", "0.2"])
    assert (options.lr, options.batch_size, options.momentum) == (0.2, 64, 0.9)


def test_numbers_that_yaml_takes_for_text_are_numbers(recipe):
    assert yaml.safe_load("lr: 1e-3")["lr"] == "1e-3"  # the trap
    options = read_arguments(recipe("lr: 1e-3\nopt_kwargs: {rho: 5e-2, rebalance: metric, columns: null}\n"))
    assert options.lr == 1e-3
    assert options.opt_kwargs == {"rho": 0.05, "rebalance": "metric", "columns": None}


def test_arguments_of_the_optimizer_on_the_command_line_are_added_to_the_recipes(recipe):
    options = read_arguments([*recipe("opt_kwargs: {rho: 0.1, columns: 2}\n"), "--opt-kwargs", "rho=0.2", "gauge=0.5"])
    assert options.opt_kwargs == {"rho": 0.2, "columns": 2, "gauge": 0.5}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lrr: 0.1", "'lrr' is no option: did you mean lr"),
        ("recovery_interval: 5", "resume from whole epochs"),
        ("entirely_unknown: 1", "--help lists them"),
        ("lr: fast", "lr must be float, got 'fast'"),
        ("lr: true", "lr must be float, got True"),
        ("epochs: 1.5", "epochs must be int, got 1.5"),
        ("epochs: [1]", "epochs must be one value"),
        ("epochs: 0", "--epochs must be at least 1, got 0"),
        ("amp: 1", "amp must be true or false, got 1"),
        ("input_size: [3, 32]", "input_size must have 3 values"),
        ("mean: 0.5", "mean must be a list"),
        ("clip_mode: none", "clip_mode must be one of 'norm'"),
        ("opt_kwargs: 0.1", "opt_kwargs must be keys and values"),
        ("epochs: null", "epochs must be int, got None"),
        ("label_noise: 1.5", "--label-noise is a share"),
        ("smoothing: 1.0", "--smoothing is between 0 and 1 (not 1), got 1.0"),
        ("model_ema_decay: 1.5", "--model-ema-decay is between 0 and 1"),
        ("clip_grad: -1.0", "--clip-grad must be more than 0, got -1.0"),
        ("clip_grad: 0", "--clip-grad must be more than 0, got 0"),
        ("remode: noise", "remode must be one of 'pixel', 'rand', 'const'"),
        ("train_crop_mode: padded", "train_crop_mode must be one of 'pad', 'rrc'"),
        ("interpolation: cubic", "interpolation must be one of '', 'nearest', 'bilinear'"),
        ("train_interpolation: cubic", "train_interpolation must be one of 'random', 'nearest'"),
        ("torchcompile_mode: default", "--torchcompile-mode has no effect without --torchcompile"),
        ("pretrained_path: weights.pth", "--pretrained-path has no effect without --pretrained"),
        ("bce_sum: true", "--bce-sum has no effect without --bce-loss"),
        ("model_ema_force_cpu: true", "--model-ema-force-cpu has no effect without --model-ema"),
        ("holdout: -1", "--holdout must be at least 0"),
        ("- lr", "must hold options and their values"),
        ("lr: [", "is not YAML"),
        ("{fsdp: true, model_ema: true}", "--model-ema copies the model"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused_with_the_reason(recipe, text, reason):
    with pytest.raises(CommandLineError, match=re.escape(reason)):
        read_arguments(recipe(text))


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CommandLineError, match=r"nowhere\.yaml cannot be read"):
        read_arguments(["-c", str(tmp_path / "nowhere.yaml")])


def test_unknown_flags_and_abbreviations_are_refused():
    for words in (["--learning-rate", "1"], ["--batch", "3"], ["stray"]):
        with pytest.raises(CommandLineError, match="unrecognized arguments"):
            read_arguments(words)


def test_args_yaml_is_a_recipe_with_the_same_options(recipe, tmp_path):
    words = ["--input-size", "3", "32", "32", "--opt-kwargs", "rho=0.1", "--amp", "--mean", "0.5", "0.5", "0.5"]
    options = read_arguments([*recipe("sched: step\nopt: mssam\n"), *words])
    write_args(options, tmp_path / "args.yaml")
    again = read_arguments(["-c", str(tmp_path / "args.yaml")])
    assert {**vars(again), "config": None} == {**vars(options), "config": None}


def test_settings_are_laid_over_a_recipe_and_their_arguments_are_merged(recipe):
    _, path = recipe("lr: 0.3\nopt_kwargs: {rho: 0.1, columns: 2}\n")
    options = read_settings({"config": path, "epochs": 3, "opt_kwargs": {"rho": 0.4}})
    assert (options.lr, options.epochs, options.opt_kwargs) == (0.3, 3, {"rho": 0.4, "columns": 2})
    with pytest.raises(CommandLineError, match="the settings: 'epoch' is no option: did you mean epochs"):
        read_settings({"epoch": 3})


def test_no_option_is_shared_between_two_readings():
    read_settings({"opt_kwargs": {"rho": 0.1}})
    assert read_settings({}).opt_kwargs == {}
    assert read_arguments([]).opt_kwargs == {}


def test_every_option_explains_itself():
    assert [key for key, option in options_of(parser()).items() if not option.help] == []


def test_defaults_are_timms_but_for_those_that_the_data_decides():
    ours, theirs = read_arguments([]), _timms_defaults()
    decided = {"hflip", "color_jitter", "scale", "val_split", "device", "dataset"}
    shared = [key for key in vars(theirs) if hasattr(ours, key) and key not in decided]
    assert len(shared) > 60
    assert {key: getattr(ours, key) for key in shared} == {key: getattr(theirs, key) for key in shared}


def _timms_defaults():
    """The defaults of timm 1.0.31's train.py (it is not in the wheel): those that users know by heart."""
    import argparse

    return argparse.Namespace(
        **{"dataset": "", "train_split": "train", "val_split": "validation", "class_map": "", "model": "resnet50"},
        **{"train_num_samples": None, "val_num_samples": None, "dataset_download": False, "input_img_mode": None},
        **{"pretrained": False, "pretrained_path": None, "initial_checkpoint": "", "resume": "", "num_classes": None},
        **{"no_resume_opt": False, "gp": None, "img_size": None, "in_chans": None, "input_size": None, "mean": None},
        **{"crop_pct": None, "std": None, "interpolation": "", "batch_size": 128, "validation_batch_size": None},
        **{"channels_last": False, "grad_accum_steps": 1, "grad_checkpointing": False, "model_kwargs": {}},
        **{"head_init_scale": None, "head_init_bias": None, "torchcompile": None, "torchcompile_mode": None},
        **{"device": "cuda", "amp": False, "amp_dtype": "float16", "no_ddp_bb": False, "device_modules": None},
        **{"opt": "sgd", "opt_eps": None, "opt_betas": None, "momentum": 0.9, "weight_decay": 2e-5},
        **{"clip_grad": None, "clip_mode": "norm", "layer_decay": None, "layer_decay_min_scale": 0, "opt_kwargs": {}},
        **{"layer_decay_no_opt_scale": None, "sched": "cosine", "sched_on_updates": False, "lr": None, "lr_base": 0.1},
        **{"lr_base_size": 256, "lr_base_scale": "", "lr_noise": None, "lr_noise_pct": 0.67, "lr_noise_std": 1.0},
        **{"lr_cycle_mul": 1.0, "lr_cycle_decay": 0.5, "lr_cycle_limit": 1, "lr_k_decay": 1.0, "warmup_lr": 1e-5},
        **{"min_lr": 0, "epochs": 300, "epoch_repeats": 0.0, "start_epoch": None, "decay_milestones": [90, 180, 270]},
        **{"decay_epochs": 90, "warmup_epochs": 5, "warmup_prefix": False, "cooldown_epochs": 0, "patience_epochs": 10},
        **{"decay_rate": 0.1, "no_aug": False, "train_crop_mode": None, "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3]},
        **{"hflip": 0.5, "vflip": 0.0, "color_jitter": 0.4, "color_jitter_prob": None, "grayscale_prob": None},
        **{"gaussian_blur_prob": None, "aa": None, "aug_repeats": 0, "bce_loss": False, "bce_sum": False},
        **{"bce_target_thresh": None, "bce_pos_weight": None, "reprob": 0.0, "remode": "pixel", "recount": 1},
        **{"resplit": False, "mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "mixup_prob": 1.0},
        **{"mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": 0, "smoothing": 0.1},
        **{"train_interpolation": "random", "drop": 0.0, "drop_path": None, "drop_block": None, "bn_momentum": None},
        **{"bn_eps": None, "sync_bn": False, "dist_bn": "reduce", "model_ema": False, "model_ema_force_cpu": False},
        **{"model_ema_decay": 0.9998, "model_ema_warmup": False, "seed": 42, "worker_seeding": "all"},
        **{"log_interval": 50, "val_interval": 1, "checkpoint_hist": 10, "workers": 4, "pin_mem": False},
        **{"no_prefetcher": False, "output": "", "experiment": "", "eval_metric": "top1", "log_wandb": False},
        **{"wandb_project": None, "wandb_tags": [], "wandb_resume_id": "", "synchronize_step": False},
        **{"target_key": None, "input_key": None},
    )
