"""A command line as ms_optim.train parses it, without the parser: every option that data read, at its default."""

from __future__ import annotations

import argparse

import torch

from ms_optim.train import preset
from ms_optim.train.loaders import load
from ms_optim.train.order import Ranks

DEFAULTS = {
    "dataset": "", "data_dir": None, "train_split": "train", "val_split": None, "test_split": None,
    "train_num_samples": None, "val_num_samples": None, "dataset_download": False, "class_map": "",
    "input_img_mode": None, "input_key": None, "target_key": None, "dataset_trust_remote_code": False,
    "num_classes": None, "img_size": None, "in_chans": None, "input_size": None, "crop_pct": None, "mean": None,
    "std": None, "interpolation": "", "batch_size": 128, "validation_batch_size": None, "epoch_repeats": 0.0,
    "no_aug": False, "train_crop_mode": None, "scale": None, "ratio": [3 / 4, 4 / 3], "hflip": None, "vflip": 0.0,
    "color_jitter": None, "color_jitter_prob": None, "grayscale_prob": None, "gaussian_blur_prob": None, "aa": None,
    "aug_repeats": 0.0, "reprob": 0.0, "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0.0, "cutmix": 0.0,
    "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": 0,
    "smoothing": 0.1, "train_interpolation": "random", "seed": 42, "worker_seeding": "all", "workers": 0,
    "pin_mem": False, "no_prefetcher": False, "preset": "auto", "holdout": None, "split_seed": 0, "label_noise": 0.0,
    "crop_padding": None, "cutout": 0, "in_memory": "auto",
}  # fmt: skip


def command(**given):
    unknown = set(given) - set(DEFAULTS)
    assert not unknown, unknown
    return argparse.Namespace(**{**DEFAULTS, **given})


def loaded(ranks=None, device="cpu", **given):
    """The data of a command line, as the loop loads them."""
    options = command(**given)
    preset.fill(options)
    size = options.input_size or [3, 16, 16]
    mean, std = options.mean or [0.5] * size[0], options.std or [0.25] * size[0]
    return load(
        options,
        input_size=size,
        mean=mean,
        std=std,
        interpolation=options.interpolation or "bilinear",
        crop_pct=options.crop_pct,
        num_classes=options.num_classes or 10,
        device=torch.device(device),
        ranks=ranks or Ranks(),
    )


def batches(loader, epoch=None):
    """All of a loader's batches, of an epoch."""
    if epoch is not None:
        loader.set_epoch(epoch)
    return list(loader)
