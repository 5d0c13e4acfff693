"""Optimizer, loss, learning rate: what the options say, made by timm and by this package's entries in its registry."""

from __future__ import annotations

import argparse
import inspect
import warnings
from typing import Any

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn
from torch.optim import Optimizer

from ..errors import CommandLineError, MsOptimError
from ..integrations.timm import OPTIMIZERS, create_optimizer
from ..optim import SharpnessAware
from ..symmetry import ScaleGroup
from .progress import logger


def ours(optimizer: Optimizer) -> SharpnessAware | None:
    """The optimizer of this package that an optimizer is, or is wrapped around.

    Args:
        optimizer: Any; timm's Lookahead has one inside.

    Returns:
        It, or nothing.
    """
    inner = getattr(optimizer, "_base_optimizer", optimizer)
    return inner if isinstance(inner, SharpnessAware) else None


def is_ours(options: argparse.Namespace) -> bool:
    """Whether the optimizer's name is one of this package's.

    Args:
        options: ``opt``.

    Returns:
        Whether it is.
    """
    return str(options.opt).lower() in OPTIMIZERS


def decide_learning_rate(options: argparse.Namespace, world: int) -> None:
    """Fill in ``lr`` from ``lr_base`` where it is not given: in proportion to the batch size or its square root.

    Args:
        options: ``lr_base``, ``lr_base_size``, ``lr_base_scale``, ``opt`` ….
        world: The number of processes.
    """
    if options.lr is not None:
        return
    batch = options.batch_size * world * options.grad_accum_steps
    adaptive = any(word in options.opt.lower() for word in ("ada", "lamb"))
    scale = options.lr_base_scale or ("sqrt" if adaptive else "linear")
    ratio = batch / options.lr_base_size
    options.lr = options.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)
    text = "learning rate %.4g: %s-scaled from --lr-base %g for %d images a step"
    logger.info(text, options.lr, scale, options.lr_base, batch)


def make_optimizer(model: nn.Module, options: argparse.Namespace, group: ScaleGroup | None = None) -> Optimizer:
    """Make the optimizer.

    Args:
        model: The plain module.
        options: ``opt``, ``lr``, ``weight_decay``, ``opt_kwargs`` ….
        group: The scale group, where it had to be found before (sharded weights); only for optimizers of this package.

    Returns:
        The optimizer.

    Raises:
        CommandLineError: If there is no such optimizer, or it does not take what it is given.
    """
    settings = {**optimizer_kwargs(options), **options.opt_kwargs}
    settings.pop("opt")
    if options.layer_decay_no_opt_scale is not None:
        settings["layer_decay_no_opt_scale"] = options.layer_decay_no_opt_scale
    if group is not None:
        settings["group"] = group
    make = create_optimizer if is_ours(options) else create_optimizer_v2
    try:
        return make(model, options.opt, **settings)
    except MsOptimError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        text = " ".join(str(error).split())
        raise CommandLineError(f"--opt {options.opt} with {options.opt_kwargs or 'no --opt-kwargs'}: {text}") from error


def needs_group(options: argparse.Namespace) -> bool:
    """Whether the optimizer goes to a representative, so that it needs the scale group.

    Args:
        options: ``opt``, ``opt_kwargs``.

    Returns:
        Whether it does.
    """
    if not is_ours(options):
        return False
    kind, defaults, _ = OPTIMIZERS[options.opt.lower()]
    default = inspect.signature(kind).parameters.get("rebalance")
    settings = {"rebalance": None if default is None else default.default, **defaults, **options.opt_kwargs}
    return settings["rebalance"] is not None and settings.get("group") is None


def make_criterion(options: argparse.Namespace, mixes: bool) -> nn.Module:
    """The training loss.

    Args:
        options: ``smoothing``, ``bce_loss`` ….
        mixes: Whether targets are soft (mixup, cutmix), with the smoothing in them already.

    Returns:
        Logits, targets → loss.
    """
    if options.bce_loss:
        arguments = {
            "smoothing": 0.0 if mixes else options.smoothing,
            "target_threshold": options.bce_target_thresh,
            "sum_classes": options.bce_sum,
            "pos_weight": options.bce_pos_weight,
        }
        loss: nn.Module = BinaryCrossEntropy(**arguments)
    elif mixes:
        loss = SoftTargetCrossEntropy()
    elif options.smoothing:
        loss = LabelSmoothingCrossEntropy(smoothing=options.smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    return loss


def make_scheduler(
    optimizer: Optimizer, options: argparse.Namespace, updates: int, decreasing: bool
) -> tuple[Any, int]:
    """timm's scheduler.

    Args:
        optimizer: Whose learning rate it sets.
        options: ``sched``, ``epochs`` ….
        updates: Steps of an epoch.
        decreasing: Whether less of the validation metric is better.

    Returns:
        The scheduler, or ``None`` for none, and the number of epochs with those before and after.

    Raises:
        CommandLineError: If timm has no such scheduler.
    """
    settings = scheduler_kwargs(options, decreasing_metric=decreasing)
    try:
        with warnings.catch_warnings():  # plateau's state, which timm warns that nobody keeps, is in our checkpoints
            warnings.filterwarnings("ignore", "PlateauLRScheduler is deprecated", FutureWarning)
            scheduler, epochs = create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates)
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
        text = " ".join(str(error).split())
        raise CommandLineError(f"--sched {options.sched} with --epochs {options.epochs}: {text}") from error
    if scheduler is None and options.sched not in ("", "none"):
        raise CommandLineError(f"--sched {options.sched} is no scheduler of timm's; cosine, step, none, … are")
    return scheduler, int(epochs)
