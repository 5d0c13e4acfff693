"""Checkpoints: what an optimizer writes, and what it reads: its own, and those of a SAM that saved too little.

A checkpoint is the base optimizer's ``state_dict`` as torch writes it, with one more entry, ``"ms_optim"``, in which
everything else stands that a resumed run needs to be bitwise the uninterrupted one.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ..balancing import Balance, NeuronBalance
from ..errors import LostStateWarning, StateError

if TYPE_CHECKING:
    from .engine import SharpnessAware

_VERSION = 1


def written(optimizer: SharpnessAware) -> dict[str, Any]:
    """The checkpoint of an optimizer.

    Args:
        optimizer: The optimizer.

    Returns:
        Plain containers, numbers and tensors only.
    """
    representative = optimizer.representative
    own = {
        "version": _VERSION,
        "optimizer": type(optimizer).__name__,
        "parameters": optimizer.signature(),
        "steps": optimizer.steps,
        "due": representative.due,
        "representative": representative.identity,
        "generator": optimizer.generator.get_state(),
        "seed": optimizer.seed,
        "balance": None if representative.balance is None else representative.balance.state(),
        "log_scale": dict(representative.log_scale),
        "kept": list(optimizer.kept),
    }
    return {**optimizer.base.state_dict(), "ms_optim": own}


def read(optimizer: SharpnessAware, state_dict: dict[str, Any]) -> None:
    """Take a checkpoint, all of which is checked before.

    Args:
        optimizer: The optimizer.
        state_dict: The checkpoint.

    Raises:
        StateError: If it is another optimizer's or another model's.
    """
    own = state_dict.get("ms_optim")
    if own is None and _of_two_step_sam(state_dict):
        _read_two_step_sam(optimizer, state_dict)
        return
    if own is None:
        raise StateError(
            f"the state_dict has no 'ms_optim' entry, so it was not written by {type(optimizer).__name__}; to start "
            "from a plain optimizer's state load it into optimizer.base"
        )
    if own["version"] != _VERSION or own["optimizer"] != type(optimizer).__name__:
        raise StateError(
            f"the state_dict is version {own['version']} of {own['optimizer']}, not version {_VERSION} of "
            f"{type(optimizer).__name__}; build the optimizer that wrote it"
        )
    theirs, ours = own["parameters"], optimizer.signature()
    if _bound(theirs) != _bound(ours):  # one of them has not seen its model yet, hence knows no names
        theirs, ours = _nameless(theirs), _nameless(ours)
    if theirs != ours:
        raise StateError(f"the state_dict belongs to other parameters: {_first_difference(theirs, ours)}")
    representative = optimizer.representative
    restored, due, log_scale = None, 0, {}
    if list(own["representative"]) == representative.identity:
        kind: type[Balance] | type[NeuronBalance] = Balance if representative.granularity == "layer" else NeuronBalance
        restored = None if own["balance"] is None else kind.from_state(own["balance"])
        due = min(int(own["due"]), representative.every)
        log_scale = dict(own.get("log_scale", {}))
    stream = own["generator"].cpu()
    optimizer.base.load_state_dict({key: value for key, value in state_dict.items() if key != "ms_optim"})
    optimizer._share()
    if stream.numel() == optimizer.generator.get_state().numel():
        optimizer.generator.set_state(stream)
    if int(own["steps"]) and optimizer.model is None and not _bound(own["parameters"]):
        optimizer.stop_looking(quietly=True)  # there was no module in the first step either
    optimizer.steps, optimizer.seed = int(own["steps"]), int(own.get("seed", optimizer.seed))
    representative.due, representative.balance, representative.log_scale = due, restored, log_scale
    like = optimizer.parameters()
    optimizer.kept = [
        None if grad is None else grad.detach().to(p.device, copy=True)
        for grad, p in zip(own.get("kept", []), like, strict=False)
    ]


def _of_two_step_sam(state_dict: dict[str, Any]) -> bool:
    """Whether it is of a SAM that keeps the weights before its ascent and, of its base optimizer, nothing."""
    groups, state = state_dict.get("param_groups", []), state_dict.get("state", {})
    known = all("rho" in entry and "adaptive" in entry for entry in groups)
    return bool(groups) and known and all(set(each) <= {"old_p"} for each in state.values())


def _read_two_step_sam(optimizer: SharpnessAware, state_dict: dict[str, Any]) -> None:
    """Take the groups of a two-step SAM's checkpoint, and say what it lacks."""
    theirs, ours = state_dict["param_groups"], optimizer.param_groups
    if "rho" not in ours[0]:
        raise StateError(
            f"the state_dict is that of a two-step SAM, and {type(optimizer).__name__} has no rho; build ms_optim.SAM"
        )
    if [len(entry["params"]) for entry in theirs] != [len(entry["params"]) for entry in ours]:
        counts = " and ".join(str([len(entry["params"]) for entry in groups]) for groups in (theirs, ours))
        raise StateError(f"the state_dict belongs to other parameters: its groups and ours have {counts}")
    for mine, entry in zip(ours, theirs, strict=True):
        mine.update({key: value for key, value in entry.items() if key in mine and key != "params"})
    optimizer.base.state.clear()
    representative = optimizer.representative
    optimizer.steps, optimizer.kept = 0, []
    representative.due, representative.balance, representative.log_scale = 0, None, {}
    translated = theirs[0]["adaptive"] and "adaptive" not in ours[0]
    lost = ", ".join(key for key in ("momentum", "betas") if ours[0].get(key))
    warnings.warn(
        "the state_dict was written by a two-step SAM (davda54/sam), which saves its groups and no state of its base "
        f"optimizer: {type(optimizer.base).__name__}{f' ({lost})' if lost else ''} starts anew, so the run differs "
        "from an uninterrupted one; warm up the learning rate if the loss jumps"
        + (" (adaptive=True there is ms_optim.ASAM(operator='elementwise') here)" if translated else ""),
        LostStateWarning,
        stacklevel=4,
    )


def _bound(signature: list[list[list[str]]]) -> bool:
    """Whether parameters have the names that their model gives them."""
    unbound = [[f"{g}.{i}" for i in range(len(group))] for g, group in enumerate(signature)]
    return [[name for name, _ in group] for group in signature] != unbound


def _nameless(signature: list[list[list[str]]]) -> list[list[list[str]]]:
    """The same without names."""
    return [[["parameter", shape] for _, shape in group] for group in signature]


def _first_difference(theirs: list[list[list[str]]], ours: list[list[list[str]]]) -> str:
    """Where the parameters of two optimizers differ first, in words.

    Args:
        theirs: Per group, name and shape of each parameter.
        ours: The same.

    Returns:
        The difference.
    """
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} parameter groups, the optimizer has {len(ours)}"
    for g, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if len(a) != len(b):
            return f"group {g} has {len(a)} parameters there and {len(b)} here"
        for x, y in zip(a, b, strict=True):
            if x != y:
                return f"group {g} has {x[0]} {x[1]} there where the optimizer has {y[0]} {y[1]}"
    return "no difference"
