"""Network: the model of a training, from timm or from anywhere, for the images it is to be trained on.

A name of timm's is made by timm; ``module:function`` (``ms_optim.models:resnet18``, ``mine.py:network``) is called with
what it accepts of ``num_classes``, ``in_chans`` and the ``--model-kwargs``.  Whatever it is, it has to give as many
logits as there are classes for one image, before a single image is read.
"""

from __future__ import annotations

import argparse
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..cli.checkpoint import load_into, read_checkpoint
from ..cli.models import timm_model
from ..cli.named_object import call, find
from ..curvature.evaluation import evaluation
from ..errors import CommandLineError

#: Up to this many pixels a side, a stem that shrinks images fourfold leaves too little of them.
_SMALL = 64


def make_network(options: argparse.Namespace) -> nn.Module:
    """Make the model, on the CPU.

    Args:
        options: The options, after what the images are has been filled in (``num_classes``, ``input_size``).

    Returns:
        The module, in training mode.

    Raises:
        CommandLineError: If it cannot be made.
    """
    named = ":" in options.model and not options.model.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    model = _named(options) if named else _of_timm(options)
    if _wants_small_stem(options, named):
        try:
            models.small_stem(model)
        except ValueError as error:
            if options.stem == "small":
                raise CommandLineError(f"--stem small: {error}") from error
    if options.initial_checkpoint:  # after the stem: a run on small images has saved that of small images
        _initialise(model, Path(options.initial_checkpoint), named)
    _initialise_head(model, options)
    if options.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise CommandLineError(f"--grad-checkpointing: {options.model} has no set_grad_checkpointing; leave it out")
        checkpointing: Any = model.set_grad_checkpointing
        checkpointing(enable=True)
    return model.train()


def data_configuration(options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """What timm prepares images to: the options', else the model's own.

    Args:
        options: The options.
        model: The model.

    Returns:
        ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``.

    Raises:
        CommandLineError: If neither says how large the images are, or mean or std do not have a number per channel.
    """
    if options.input_size is None and options.img_size is None and not getattr(model, "pretrained_cfg", None):
        raise CommandLineError(
            f"neither --dataset {options.dataset!r} nor --model {options.model} says how large its images are; pass "
            "--input-size C H W, or --preset"
        )
    timm_data: Any = import_module("timm.data")
    found: dict[str, Any] = timm_data.resolve_data_config(vars(options), model=model)
    channels = found["input_size"][0]
    for key in ("mean", "std"):
        values = tuple(found[key])
        if len(values) not in (1, channels):
            raise CommandLineError(f"--{key} must have 1 or {channels} numbers (the images' channels), got {values}")
        found[key] = values * channels if len(values) == 1 else values
    return found


def require_logits(model: nn.Module, options: argparse.Namespace, input_size: tuple[int, ...]) -> int:
    """Call the model once.

    Args:
        model: The model.
        options: The options.
        input_size: [C, H, W].

    Returns:
        The number of classes.

    Raises:
        CommandLineError: If it cannot be called with such images, or gives another number of logits.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise CommandLineError(f"--model {options.model} has no parameters to train")
    try:
        with evaluation(model), torch.no_grad():
            logits = model(torch.zeros(2, *input_size, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CommandLineError(
            f"--model {options.model} cannot be called with images of {list(input_size)}: {text}; check --input-size, "
            "--in-chans and --model-kwargs"
        ) from error
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2 or (options.num_classes is not None and shape[1] != options.num_classes):
        wanted = "K" if options.num_classes is None else options.num_classes
        raise CommandLineError(
            f"--model {options.model} returned {list(shape) or type(logits).__name__} for 2 images, and logits "
            f"[2, {wanted}] are needed; check --num-classes and --model-kwargs"
        )
    return int(shape[1])


def _named(options: argparse.Namespace) -> nn.Module:
    """The user's own function, or one of the package."""
    function = find(options.model, "--model")
    accepted = inspect.signature(function).parameters if callable(function) else {}
    offered = {"num_classes": options.num_classes, "in_chans": options.in_chans, "drop_rate": options.drop or None}
    arguments = {key: value for key, value in offered.items() if key in accepted and value is not None}
    for key in ("pretrained", "pretrained_path", "gp", "drop_path", "drop_block", "bn_momentum", "bn_eps"):
        if getattr(options, key):
            raise CommandLineError(
                f"--{key.replace('_', '-')} is for timm's models, and {options.model} is none; use --model-kwargs"
            )
    if options.drop and "drop_rate" not in accepted:
        raise CommandLineError(f"--drop: {options.model} takes no drop_rate; use --model-kwargs")
    made = call(options.model, "--model", **{**arguments, **options.model_kwargs})
    if not isinstance(made, nn.Module):
        raise CommandLineError(f"--model {options.model} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _of_timm(options: argparse.Namespace) -> nn.Module:
    """A model of timm's."""
    arguments: dict[str, Any] = {
        "pretrained": options.pretrained,
        "num_classes": options.num_classes,
        "in_chans": options.in_chans or (options.input_size[0] if options.input_size else 3),
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        "drop_block_rate": options.drop_block,
        "global_pool": options.gp,
        "bn_momentum": options.bn_momentum,
        "bn_eps": options.bn_eps,
    }
    if options.pretrained_path:  # num_classes=-1: the file's head is adapted, whatever it has
        arguments["pretrained_cfg_overlay"] = {"file": options.pretrained_path, "num_classes": -1}
    return timm_model(options.model, {**arguments, **options.model_kwargs})


def _initialise(model: nn.Module, path: Path, named: bool) -> None:
    """Load first weights, a file's moving average of them if there is one, as timm does it."""
    if named:
        try:
            checkpoint = read_checkpoint(path, averaged=True)
        except CommandLineError:  # there is none, or no file, which is said in the next line
            checkpoint = read_checkpoint(path)
        load_into(model, checkpoint.state, str(checkpoint))
        return
    from timm.models import load_checkpoint

    try:
        load_checkpoint(model, str(path))
    except Exception as error:
        text = " ".join(str(error).split())[:200] or "there is no such file"
        raise CommandLineError(
            f"--initial-checkpoint {path} cannot be loaded: {text}; check --model, --stem"
        ) from error


def _wants_small_stem(options: argparse.Namespace, named: bool) -> bool:
    """Whether the first layers are to be those for small images."""
    if options.stem == "auto":  # a model of the user's own is as it is
        small = options.input_size is not None and max(options.input_size[1:]) <= _SMALL
        return small and not named and not options.pretrained
    return bool(options.stem == "small")


def _initialise_head(model: nn.Module, options: argparse.Namespace) -> None:
    """Scale and shift the initial classifier."""
    if options.head_init_scale is None and options.head_init_bias is None:
        return
    find_classifier: Any = getattr(model, "get_classifier", lambda: None)
    classifier = find_classifier()
    if not isinstance(classifier, nn.Linear):
        raise CommandLineError(f"--head-init-*: {options.model} does not name a linear classifier, as timm's models do")
    with torch.no_grad():
        if options.head_init_scale is not None:
            classifier.weight.mul_(options.head_init_scale)
            classifier.bias.mul_(options.head_init_scale)
        if options.head_init_bias is not None:
            classifier.bias.fill_(options.head_init_bias)
