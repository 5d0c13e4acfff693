"""Config: a recipe (YAML) under the command line, with nothing unknown and nothing of a wrong type in either.

A recipe's keys are the options' names with underscores, and its values are read as the command line would read them:
YAML takes ``1e-3`` for text, and it is a number here.  What the command line says wins.  ``args.yaml``, which every run
leaves, holds all options as they were in the end, and is a recipe itself.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..cli.models import pair
from ..cli.output import whole_file
from ..errors import CommandLineError
from .options import Pairs, parser

#: Of timm's ``train.py``, and deliberately not here: why, and what to do instead.
_ELSEWHERE = {
    "recovery_interval": "runs resume from whole epochs, and end with the same bits; see resume",
    "torchscript": "torch.compile takes its place: torchcompile",
    "fuser": "torch.compile takes its place: torchcompile",
    "model_dtype": "weights stay in float32 here; use amp and amp_dtype",
    "aug_splits": "one loss of several views is not supported",
    "jsd_loss": "one loss of several views is not supported",
    "split_bn": "one loss of several views is not supported",
    "drop_connect": "timm's old name of drop_path",
    "local_rank": "torchrun sets it",
}

_POSITIVE = ("batch_size", "epochs", "grad_accum_steps", "log_interval", "val_interval", "checkpoint_hist", "threads")
_SHARES_BELOW_ONE = ("smoothing", "model_ema_decay")
_NOT_NEGATIVE = (
    *("workers", "warmup_epochs", "cooldown_epochs", "label_noise", "holdout", "crop_padding", "cutout", "smoothing"),
    *("weight_decay", "mixup", "cutmix", "sharpness_interval", "drop", "seed", "split_seed", "start_epoch", "lr"),
)


#: Options that say something of another one.
_NEEDS = {
    "torchcompile_mode": "torchcompile",
    "pretrained_path": "pretrained",
    "model_ema_force_cpu": "model_ema",
    "model_ema_warmup": "model_ema",
    "bce_sum": "bce_loss",
    "bce_target_thresh": "bce_loss",
    "bce_pos_weight": "bce_loss",
    "layer_decay_no_opt_scale": "layer_decay",
}


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line, and the recipe that it names.

    Args:
        argv: The command line.

    Returns:
        The options.

    Raises:
        CommandLineError: If something in it, or in the recipe, is unknown or of a wrong type.
    """
    made = parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("-c", "--config")
    try:
        config = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].config
    except argparse.ArgumentError:
        config = None  # the whole parser says what is wrong
    if config:
        made.set_defaults(**settings_of(Path(config), made))
    return checked(made.parse_args(list(argv)))


def read_settings(settings: Mapping[str, Any]) -> argparse.Namespace:
    """Options from a mapping, as a sweep has them.

    Args:
        settings: Keys and values of a recipe; ``config`` may name one that they are laid over (``opt_kwargs`` and
            ``model_kwargs`` are merged with its).

    Returns:
        The options.

    Raises:
        CommandLineError: If something is unknown or of a wrong type.
    """
    made, settings = parser(), dict(settings)
    config = settings.pop("config", None)
    below = settings_of(Path(config), made) if config else {}
    above = _read(settings, made, "the settings")
    for key in ("opt_kwargs", "model_kwargs"):
        if key in above:
            above[key] = {**below.get(key, {}), **above[key]}
    made.set_defaults(**{**below, **above})
    options = made.parse_args([])
    options.config = None if config is None else str(config)
    return checked(options)


def settings_of(path: Path, made: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """The settings of a recipe.

    Args:
        path: The file.
        made: The parser that they are for.

    Returns:
        Key → value, of the options' types.

    Raises:
        CommandLineError: If there is no such file, it is not YAML, or a key or value is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandLineError(f"--config {path} cannot be read: {error.strerror}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CommandLineError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CommandLineError(f"--config {path} must hold options and their values, one per line (lr: 0.1)")
    return _read(content, made or parser(), f"--config {path}")


def options_of(made: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options by their keys.

    Args:
        made: The parser.

    Returns:
        Key → what argparse knows of it.
    """
    return {action.dest: action for action in made._actions if action.dest not in ("help", "config")}


def _read(content: Mapping[str, Any], made: argparse.ArgumentParser, source: str) -> dict[str, Any]:
    """Settings in the options' types."""
    known = options_of(made)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, 3)
            hint = f"did you mean {', '.join(near)}?" if near else "python -m ms_optim.train --help lists them"
            raise CommandLineError(f"{source}: {key!r} is no option: {_ELSEWHERE.get(key, hint)}")
    return {key: _value(value, known[key], f"{source}: {key}") for key, value in content.items()}


def _value(value: Any, option: argparse.Action, where: str) -> Any:
    """A value as the command line would read it."""
    if value is None and option.default is None:
        return None
    if isinstance(option, Pairs):
        if not isinstance(value, Mapping):
            raise CommandLineError(f"{where} must be keys and values ({{rho: 0.1}}), got {value!r}")
        return dict(pair(f"{key}={each}") if isinstance(each, str) else (key, each) for key, each in value.items())
    if isinstance(option.default, bool):
        if not isinstance(value, bool):
            raise CommandLineError(f"{where} must be true or false, got {value!r}")
        return value
    several = option.nargs == "+" or isinstance(option.nargs, int)
    if several != isinstance(value, (list, tuple)):
        raise CommandLineError(f"{where} must be {'a list' if several else 'one value'}, got {value!r}")
    if isinstance(option.nargs, int) and len(value) != option.nargs:
        raise CommandLineError(f"{where} must have {option.nargs} values, got {value!r}")
    read = [_one(each, option, where) for each in value] if several else _one(value, option, where)
    if option.choices is not None and read not in option.choices:
        raise CommandLineError(f"{where} must be one of {', '.join(map(repr, option.choices))}, got {value!r}")
    return read


def _one(value: Any, option: argparse.Action, where: str) -> Any:
    """One value in the option's type; a number is not silently rounded, or made of a word that is none."""
    kind: Any = option.type or str
    try:
        read = kind(value)
        exact = kind is str or isinstance(value, str) or (not isinstance(value, bool) and read == value)
    except (TypeError, ValueError):
        exact = False
    if not exact or isinstance(value, (Mapping, list)):
        raise CommandLineError(f"{where} must be {kind.__name__}, got {value!r}")
    return read


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Refuse numbers out of their range, before anything is made.

    Args:
        options: The options.

    Returns:
        The same.

    Raises:
        CommandLineError: If one is.
    """
    for keys, least in ((_POSITIVE, 1), (_NOT_NEGATIVE, 0)):
        for key in keys:
            value = getattr(options, key)
            if value is not None and not value >= least:
                raise CommandLineError(f"--{key.replace('_', '-')} must be at least {least}, got {value}")
    for key in _SHARES_BELOW_ONE:
        if not 0 <= getattr(options, key) < 1:
            raise CommandLineError(f"--{key.replace('_', '-')} is between 0 and 1 (not 1), got {getattr(options, key)}")
    if options.clip_grad is not None and not options.clip_grad > 0:
        raise CommandLineError(f"--clip-grad must be more than 0, got {options.clip_grad}; leave it out not to clip")
    for key, needed in _NEEDS.items():
        if getattr(options, key) and not getattr(options, needed):
            flags = (f"--{name.replace('_', '-')}" for name in (key, needed))
            raise CommandLineError("{} has no effect without {}; give both or neither".format(*flags))
    if options.label_noise > 1:
        raise CommandLineError(f"--label-noise is a share, at most 1, got {options.label_noise}")
    if options.sharpness_samples < 2:
        raise CommandLineError(f"--sharpness-samples must be at least 2, got {options.sharpness_samples}")
    if options.fsdp and options.model_ema:
        raise CommandLineError("--model-ema copies the model, which FSDP2 does not allow; leave out one of the two")
    if options.wandb_resume_id and not options.resume:
        raise CommandLineError("--wandb-resume-id goes on with a run of wandb's, so it needs --resume as well")
    return options


def write_args(options: argparse.Namespace, path: Path) -> None:
    """Write all options, in the form of a recipe.

    Args:
        options: The options.
        path: ``args.yaml``.
    """
    kept = options_of(parser())
    plain = {key: _plain(value) for key, value in sorted(vars(options).items()) if key in kept}
    with whole_file(path) as file:
        file.write_text(yaml.safe_dump(plain, default_flow_style=False, allow_unicode=True), encoding="utf-8")


def _plain(value: Any) -> Any:
    """Tuples as the lists that YAML has."""
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
