"""``ms-optim balance``: the same function with balanced weights, in a file of the same layout, proved before it stays.

All weights in the file are moved by the same rescaling: a moving average beside them (``state_dict_ema``) stays an
average of them.  The state of an optimizer does not say which optimizer's it is, and how it moves depends on that, so
that a file with one is refused unless it is to be left out.  Every other entry is kept.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import balance
from ..batch import Batch
from ..curvature import hessian_trace
from ..errors import CommandLineError
from ..symmetry import ScaleGroup
from ..symmetry.invariance import rounding_tolerance
from .checkpoint import Checkpoint, State, load_into, misfit, read_checkpoint, state_of
from .data import add_data_arguments, load_data, logits_on
from .measurement import scale_free_note
from .models import DTYPES, add_model_arguments, load_model
from .output import require_writable, whole_file
from .symmetries import symmetries_of
from .table import number

_EXAMPLES = """\
examples:
  a timm checkpoint, measured on 1,000 training images
    ms-optim balance best.pth balanced.pth --model resnet18 --data imagenet/ --samples 1000 --columns 2
  norms balanced rather than traces, which hardly depends on the data
    ms-optim balance model.pt balanced.pt --model project:make_model --data random --input-size 3 32 32 --gauge 1
  a checkpoint of training, without the optimizer's state
    ms-optim balance last.pth.tar start.pth.tar --model resnet18 --data imagenet/ --drop-optimizer-state"""


@dataclass(frozen=True)
class Difference:
    """How far the logits of a written file are from those of the file that was read.

    Attributes:
        entry: Where the weights lie in the file.
        absolute: max |o' − o|.
        relative: The same over max |o|.
    """

    entry: str
    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.absolute:.3g} ({self.relative:.1e} of the largest logit)"


def add_to(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Add the command.

    Args:
        commands: Of the whole command line.

    Returns:
        Its parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "balance",
        help="write the balanced checkpoint that computes the same function",
        description="Rescale the weights of a checkpoint to the equivalent network with the smallest Hessian trace,\n"
        "write them in the same layout, read them again and compare the logits. If they differ, nothing\n"
        "is left behind.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, metavar="IN", help="the checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write")
    add_model_arguments(parser, checkpoint=False)
    add_data_arguments(parser)
    group = parser.add_argument_group("the balance")
    group.add_argument(
        "--gauge", type=float, default=0.0, metavar="κ", help="0 balances traces, 1 norms (default: 0, the paper's)"
    )
    group.add_argument("--columns", type=int, metavar="R", help="exact columns of each sample (default: all, exact)")
    group.add_argument("--force", action="store_true", help="overwrite OUT")
    group.add_argument("--drop-optimizer-state", action="store_true", help="leave the state of optimizers out of OUT")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Balance, write, prove.

    Args:
        options: The command line.

    Returns:
        The exit code: 1 if the written weights do not compute the same function; nothing is kept then.
    """
    if not 0 <= options.gauge <= 1:
        raise CommandLineError(f"--gauge must be in [0, 1], got {options.gauge}; 0 balances traces, 1 norms")
    _require_new(options)
    checkpoint = read_checkpoint(options.input, options.ema)
    dropped = _optimizer_entries(checkpoint, options)
    model = load_model(options, checkpoint)
    print(f"model: {model}", flush=True)
    data = load_data(options, model)
    print(f"data: {data}", flush=True)
    example = data.example()

    group = symmetries_of(model.module, example)
    found = balance(model.module, hessian_trace(model.module, data, options.columns), group, options.gauge)
    states = {key: state for key, state in checkpoint.states().items() if misfit(model.module, state) is None}
    t = group.bound(_exact(model.module, checkpoint.state), found.t)
    found = found if torch.equal(t, found.t) else found.at(t)
    moved: dict[str | None, State] = {}
    for key, state in states.items():
        network = _exact(model.module, state)
        # Of an average the variances lag behind the weights', and the bound is not theirs.
        group.rescale_(network, t, clamp=key != checkpoint.key)
        moved[key] = state_of(network, state)

    try:
        with whole_file(options.output) as file:
            checkpoint.with_states(moved, dropped).write(file)
            written = read_checkpoint(file, options.ema).states()
            differences = [
                _difference(str(key or "the weights"), model.module, state, written[key], example)
                for key, state in states.items()
            ]
            for each in differences:
                print(f"largest difference of the logits of {each.entry}: {each}")
            tolerance = _tolerance(states, group, options)
            if not all(each.relative <= tolerance for each in differences):
                raise _Unequal(
                    f"the balanced weights compute another function (by more than {tolerance:.0e} of the largest "
                    f"logit), so {options.output} has not been written; try --dtype float64"
                )
            _require_new(options)  # somebody may have been faster
    except _Unequal as failure:
        print(f"ms-optim: {failure}", file=sys.stderr)
        return 1
    largest = max((abs(a) for a in found.log_scale.values()), default=0.0)
    minimum = f", minimum sharpness {number(found.minimum_sharpness)}" if options.gauge == 0 else ""
    print(
        f"trace {number(found.trace)} → {number(found.moved().trace)}{minimum}; "
        f"{sum(a != 0 for a in found.log_scale.values())} of {len(found.log_scale)} parameters rescaled, by factors of "
        f"e^±{largest:.2f} at most"
    )
    remarks = [f"note: {note}" for note in [*found.notes, *scale_free_note(found)]]
    remarks += [f"{key} was rescaled along" for key in moved if key != checkpoint.key]
    remarks += [f"left out: {', '.join(dropped)}"] if dropped else []
    print("\n".join([*remarks, f"wrote {options.output}"]))
    return 0


class _Unequal(Exception):
    """Balanced weights that compute another function."""


def _require_new(options: argparse.Namespace) -> None:
    """Refuse to overwrite."""
    require_writable(options.output, "OUT")
    if options.output.exists() and not options.force:
        raise CommandLineError(f"{options.output} exists already; --force overwrites it")


def _optimizer_entries(checkpoint: Checkpoint, options: argparse.Namespace) -> list[str]:
    """The entries that are to be left out."""
    entries = checkpoint.optimizer_entries()
    if entries and not options.drop_optimizer_state:
        raise CommandLineError(
            f"{checkpoint.path} holds the state of an optimizer ({', '.join(entries)}), which belongs to the weights "
            "as they are, and does not say how it would move with them; --drop-optimizer-state leaves it out of OUT, "
            "or rebalance in the program that trains: ms_optim.rebalance_(model, data, optimizer)"
        )
    return entries


def _exact(model: nn.Module, state: State) -> nn.Module:
    """A copy of the model in float64 with some weights: they are rounded once, to what they are kept in."""
    network = copy.deepcopy(model).to("cpu", torch.float64)
    load_into(network, state, "the checkpoint")
    return network


def _difference(entry: str, model: nn.Module, before: State, after: State, example: Batch) -> Difference:
    """Compare what the model computes with two sets of weights."""
    logits = []
    for state in (before, after):
        network = copy.deepcopy(model)
        load_into(network, state, entry)
        logits.append(logits_on(network, example, entry).double())
    absolute, largest = float((logits[1] - logits[0]).abs().max()), float(logits[0].abs().max())
    return Difference(entry, absolute, absolute / largest if largest > 0 else absolute)


def _tolerance(states: Mapping[str | None, State], group: ScaleGroup, options: argparse.Namespace) -> float:
    """What rounding may do, in the coarsest type that numbers are kept in on the way."""
    kept = [t.dtype for s in states.values() for t in s.values() if isinstance(t, Tensor) and t.is_floating_point()]
    coarsest = max(torch.finfo(dtype).eps for dtype in [*kept, DTYPES[options.dtype]])
    return rounding_tolerance(coarsest, group.inexact_normalizers > 0)
