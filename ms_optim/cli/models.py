"""Models: a module by the name of timm's architecture or of the user's own function, with the weights of a file."""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CommandLineError
from .checkpoint import Checkpoint, State, load_into, read_checkpoint, stored_names
from .named_object import call, find

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # of timm's names with a colon


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, on its device, in its type.

    Attributes:
        module: The module.
        name: As it was asked for.
        weights: Where its weights come from, in words.
    """

    module: nn.Module
    name: str
    weights: str

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters."""
        return next(self.module.parameters()).dtype

    def facts(self) -> dict[str, Any]:
        """What is to be said about it, in plain values."""
        count = sum(p.numel() for p in self.module.parameters())
        where = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        return {"name": self.name, "weights": self.weights, "parameters": count, **where}

    def __str__(self) -> str:
        facts = self.facts()
        return f"{self.name}, {facts['parameters']:,} parameters, {self.weights}, {facts['dtype']} on {facts['device']}"


def pair(text: str) -> tuple[str, Any]:
    """Read ``key=value``, the value as Python would read it, or else as a word.

    Args:
        text: The argument.

    Returns:
        Key and value.

    Raises:
        argparse.ArgumentTypeError: If it is not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def add_model_arguments(parser: argparse.ArgumentParser, checkpoint: bool = True) -> None:
    """Add the options that name a model.

    Args:
        parser: Of a command.
        checkpoint: Whether the weights' file is an option too.
    """
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="an architecture of timm (resnet18), or module:function, file.py:function that returns a module",
    )
    if checkpoint:
        group.add_argument(
            "--checkpoint",
            type=Path,
            metavar="FILE",
            help='its weights: a state_dict, or a dictionary with one as "state_dict" (default: as the model is made)',
        )
    group.add_argument("--ema", action="store_true", help="take the moving average of the weights from the checkpoint")
    group.add_argument(
        "--num-classes", type=int, metavar="K", help="number of logits (default: timm's models as in the checkpoint)"
    )
    group.add_argument(
        "--model-kwargs",
        type=pair,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of the architecture or function, as in_chans=1 or pretrained=True",
    )
    group.add_argument("--device", default="cpu", metavar="DEVICE", help="as cuda or cuda:1 (default: cpu)")
    group.add_argument("--dtype", choices=list(DTYPES), default="float32", help="(default: float32)")


def load_model(options: argparse.Namespace, checkpoint: Checkpoint | None = None) -> LoadedModel:
    """Make the model and give it its weights.

    Args:
        options: As of :func:`add_model_arguments`.
        checkpoint: Its weights, if they have been read already; else ``options.checkpoint`` is.

    Returns:
        The model.

    Raises:
        CommandLineError: If it cannot be made, or the weights do not fit.
    """
    device = _device(options.device)
    if checkpoint is None and getattr(options, "checkpoint", None) is not None:
        checkpoint = read_checkpoint(options.checkpoint, options.ema)
    if checkpoint is None and options.ema:
        raise CommandLineError("--ema takes the average of the weights from a --checkpoint, and none is given")
    model = make_model(options, None if checkpoint is None else checkpoint.state)
    if checkpoint is not None:
        load_into(model, checkpoint.state, str(checkpoint))
        weights = f"weights of {checkpoint}"
    else:
        weights = "weights as the model was made"
    if next(model.parameters(), None) is None:
        raise CommandLineError(f"--model {options.model} has no parameters, so there is nothing to measure")
    return LoadedModel(model.to(device, DTYPES[options.dtype]).eval(), options.model, weights)


def make_model(options: argparse.Namespace, state: State | None = None) -> nn.Module:
    """Make the model, with the weights that it is made with.

    Args:
        options: As of :func:`add_model_arguments`.
        state: Weights to come: their classifier says how many classes there are.

    Returns:
        The module.

    Raises:
        CommandLineError: If it cannot be made.
    """
    arguments = dict(options.model_kwargs)
    if options.num_classes is not None:
        arguments["num_classes"] = options.num_classes
    if options.model.startswith(_SOURCES) or ":" not in options.model:
        model = timm_model(options.model, arguments)
        classes = None if state is None or "num_classes" in arguments else _classes_in(state, model)
        return model if classes is None else timm_model(options.model, {**arguments, "num_classes": classes})
    found = find(options.model, "--model")
    if isinstance(found, nn.Module):
        if arguments:
            raise CommandLineError(f"--model {options.model} is a module already, and takes no --model-kwargs")
        return copy.deepcopy(found)  # its owner's stays as it is
    made = call(options.model, "--model", **arguments)
    if not isinstance(made, nn.Module):
        raise CommandLineError(f"--model {options.model} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def timm_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Make a model of timm's.

    Args:
        name: Of the architecture.
        arguments: Of ``timm.create_model``.

    Returns:
        The module.

    Raises:
        CommandLineError: If timm has no such architecture, or cannot make it.
    """
    import timm  # here, so that --help does not wait for it

    plain = not name.startswith(_SOURCES)
    if plain and not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3)
        hint = f"did you mean {', '.join(near)}?" if near else "a function of your own is module:function"
        raise CommandLineError(f"--model {name} is no architecture of timm {timm.__version__}; {hint}")
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise CommandLineError(f"timm cannot make {name} with {given}: {text}") from error
    return model


def _classes_in(state: State, model: nn.Module) -> int | None:
    """The number of classes of a timm model's weights, if it is another one than the model's own."""
    configuration = getattr(model, "pretrained_cfg", None) or {}
    classifier = configuration.get("classifier")
    name = classifier[0] if isinstance(classifier, (tuple, list)) and classifier else classifier
    if not isinstance(name, str):
        return None
    own = model.state_dict()
    saved = state.get(stored_names(state, own.keys()).get(f"{name}.weight", ""))
    mine = own.get(f"{name}.weight")
    if saved is None or mine is None or saved.shape[:1] == mine.shape[:1] or saved.ndim != mine.ndim:
        return None
    return int(saved.shape[0])


def require_device(name: str) -> torch.device:
    """A device that is there.

    Args:
        name: As ``cuda:1``.

    Returns:
        The device.

    Raises:
        CommandLineError: If it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or ["not available"])[0]
        raise CommandLineError(f"--device {name} cannot be used: {first}") from error
    return device


def _device(name: str) -> torch.device:
    """A device that numbers can be read from."""
    device = require_device(name)
    if device.type == "meta":
        raise CommandLineError("--device meta holds no numbers to measure; take cpu or cuda")
    return device
