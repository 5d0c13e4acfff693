"""Checkpoint: a file with weights, in whatever layout it has, and the same layout with other weights.

    {name: tensor}                                        a state_dict by itself
    {"state_dict": …, "state_dict_ema": …, "epoch": …}    timm's; also under "model", "model_state_dict", …
    *.safetensors                                         tensors and metadata

Names may have been prefixed by wrappers (``module.`` by data parallelism, ``_orig_mod.`` by ``torch.compile``,
``model.`` by Lightning): what all names share, and the model's do not have, is left out.  Files are read with
``weights_only=True``: they can hold tensors and plain containers (and ``argparse.Namespace``, in which timm keeps its
arguments), and cannot run code.
"""

from __future__ import annotations

import argparse
import copy
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CommandLineError
from .table import shortened

State = Mapping[str, Any]

_PLAIN = ("state_dict", "model", "model_state_dict", "model_state", "net", "weights")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_COUNTERS = ("n_averaged",)  # of torch's AveragedModel: beside the weights, not among them


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: The file.
        content: All of it.
        key: Under which entry the weights are that were asked for; ``None``: the content is the weights.
        metadata: Of a safetensors file.
    """

    path: Path
    content: Any
    key: str | None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """The weights that were asked for."""
        found: State = self.content if self.key is None else self.content[self.key]
        return found

    def states(self) -> dict[str | None, State]:
        """All weights in the file by their entry: those that were asked for and, say, their average."""
        if self.key is None:
            return {None: self.content}
        found: dict[str | None, State] = {key: value for key, value in self.content.items() if _is_state(value)}
        return found

    def optimizer_entries(self) -> list[str]:
        """The entries that hold the state of optimizers, which belongs to the weights as they are."""
        if self.key is None:
            return []
        return [str(key) for key, value in self.content.items() if _is_optimizer_state(value)]

    def with_states(self, states: Mapping[str | None, State], without: Collection[str] = ()) -> Checkpoint:
        """The same file with other weights.

        Args:
            states: Entry → weights, as in :meth:`states`.
            without: Entries to leave out.

        Returns:
            A checkpoint whose other entries are this one's.
        """
        if None in states:
            return replace(self, content=states[None])
        content = copy.copy(self.content)
        for entry in without:
            del content[entry]
        for key, state in states.items():
            content[key] = state
        return replace(self, content=content)

    def write(self, path: Path) -> None:
        """Write the file, in the format of the one that was read.

        Args:
            path: Where.
        """
        if self.path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(dict(self.content), path, self.metadata or None)
        else:
            torch.save(self.content, path)

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path} [{self.key}]"


def read_checkpoint(path: Path, averaged: bool = False) -> Checkpoint:
    """Read a file and find the weights in it.

    Args:
        path: The file.
        averaged: Whether the moving average of the weights is wanted.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        CommandLineError: If there is no such file, it cannot be read safely, or there are no weights in it.
    """
    if not path.is_file():
        raise CommandLineError(f"the checkpoint {path} is {'a folder' if path.is_dir() else 'not there'}")
    content, metadata = _read(path)
    if not isinstance(content, Mapping):
        raise CommandLineError(
            f"the checkpoint {path} holds a {type(content).__name__}; save the model's state_dict(), or a dictionary "
            'with it as "state_dict"'
        )
    if not averaged and _is_state(content):
        return Checkpoint(path, content, None, metadata)
    keys = [key for key, value in content.items() if _is_state(value)]
    wanted = [key for key in (_AVERAGED if averaged else _PLAIN) if key in keys]
    if not wanted and not averaged and len(keys) == 1:
        wanted = keys
    if not wanted:
        what = "average of the weights" if averaged else "weights"
        looked = ", ".join(_AVERAGED if averaged else _PLAIN)
        has = shortened([str(key) for key in content], 8) or "nothing"
        raise CommandLineError(f"the checkpoint {path} has no {what} (looked for: {looked}); it holds {has}")
    return Checkpoint(path, content, wanted[0], metadata)


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """The content of a file, and its metadata."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            from safetensors.torch import load_file

            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
            return load_file(path), metadata
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        try:
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # noqa: BLE001 - not a file of torch.save at all
            raise CommandLineError(f"the checkpoint {path} is not a file of torch.save") from error
        raise CommandLineError(
            f"the checkpoint {path} holds objects that only running code could restore ({shortened(foreign, 3)}), "
            "which is not done here; save the model's state_dict() instead"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # not that of a reader which met the end too soon
            raise
        raise CommandLineError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}); is "
            "it complete?"
        ) from error


def _is_state(value: Any) -> bool:
    """Whether a value is weights by name: tensors, and nothing that could hold further ones."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    parts = list(value.values())
    return any(isinstance(part, Tensor) for part in parts) and not any(isinstance(part, Mapping) for part in parts)


def _is_optimizer_state(value: Any) -> bool:
    """Whether a value is what ``optimizer.state_dict()`` returns, or a list of those."""
    if isinstance(value, (list, tuple)):
        return any(_is_optimizer_state(each) for each in value)
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def stored_names(state: State, wanted: Collection[str]) -> dict[str, str]:
    """The names of weights without the prefixes of wrappers.

    Args:
        state: The weights.
        wanted: The model's names: as soon as one of them is found, nothing more is left out.

    Returns:
        Name → the key in the state.
    """
    names = {key: key for key in state if key not in _COUNTERS}
    while names and names.keys().isdisjoint(wanted):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        names = {name.removeprefix(prefix): key for name, key in names.items()}
    return names


def misfit(model: nn.Module, state: State) -> str | None:
    """Why weights are not a model's, if they are not.

    Args:
        model: The model.
        state: The weights.

    Returns:
        The first names or shapes that differ, in words; ``None`` if the weights fit.
    """
    wanted = model.state_dict()
    stored = stored_names(state, wanted.keys())
    # Files of old have no counters of BatchNorm, and a model in use does not read them.
    missing = [name for name in wanted if name not in stored and not name.endswith("num_batches_tracked")]
    foreign = [name for name in stored if name not in wanted]
    if missing or foreign:
        parts = [f"it lacks {shortened(missing, 3)}"] if missing else []
        parts += [f"it has {shortened(foreign, 3)}, which the model has not"] if foreign else []
        return f"{'; '.join(parts)}; name the --model (and --model-kwargs) that it was saved from"
    tensors = {name: (state[key], wanted[name]) for name, key in stored.items()}
    others = [
        f"{name} has shape {tuple(saved.shape)} there and {tuple(own.shape)} in the model"
        for name, (saved, own) in tensors.items()
        if isinstance(saved, Tensor) and isinstance(own, Tensor) and saved.shape != own.shape
    ]
    if others:
        return (
            f"{shortened(others, 2, '; ')}; --num-classes and --model-kwargs (in_chans=1, …) make the model that it "
            "was saved from"
        )
    return None


def load_into(model: nn.Module, state: State, source: str) -> None:
    """Put weights into a model, all of them.

    Args:
        model: The model.
        state: The weights.
        source: Where they come from, for messages.

    Raises:
        CommandLineError: If names or shapes are not the model's.
    """
    reason = misfit(model, state)
    if reason is not None:
        raise CommandLineError(f"{source} does not fit {type(model).__name__}: {reason}")
    stored = stored_names(state, model.state_dict().keys())
    model.load_state_dict({name: state[key] for name, key in stored.items()}, strict=False)


def state_of(model: nn.Module, like: State) -> State:
    """A model's weights under the names, in the types and in the container of others.

    Args:
        model: The model.
        like: What was loaded into it, or into a model of the same kind.

    Returns:
        New weights; entries that are not the model's are those of ``like``.
    """
    own = model.state_dict()
    state = copy.copy(like)
    assert isinstance(state, dict)
    made: dict[tuple[int, torch.Size], Tensor] = {}  # what was one tensor under two names stays one
    for name, key in stored_names(like, own.keys()).items():
        old = like[key]
        if isinstance(old, Tensor):
            new = own[name].detach().to(old.device, old.dtype)
            state[key] = made.setdefault((old.data_ptr(), old.shape), new) if old.numel() else new
    return state
