"""``ms-optim symmetries``: which rescalings leave the function unchanged, in words, and what stands in the way."""

from __future__ import annotations

import argparse
import contextlib
import io
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..batch import Batch
from ..errors import NoEffectWarning, SymmetryError
from ..symmetry import Check, ScaleGroup, scale_symmetries
from .data import add_data_arguments, load_data
from .models import add_model_arguments, load_model
from .output import STANDARD_OUTPUT, require_writable, write_json
from .table import shortened

_EXAMPLES = """\
examples:
  an architecture of timm, as it is
    ms-optim symmetries --model resnet18
  a network of your own on images of 3×32×32, with a numerical proof
    ms-optim symmetries --model project:make_model --checkpoint model.pt --input-size 3 32 32 --check
  the whole group as numbers, for a program
    ms-optim symmetries --model vit_tiny_patch16_224 --json -

Only the graph matters here, so that random inputs do: --samples 2 of them are enough."""

_SHOWN = 12
_WIDTH = 100


def add_to(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Add the command.

    Args:
        commands: Of the whole command line.

    Returns:
        Its parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "symmetries",
        help="the rescalings of parameters that leave the function unchanged",
        description="Read the scale symmetries off a model's graph: what moves up and down together, and what no\n"
        "scale passes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_data_arguments(parser, default="random")
    parser.set_defaults(batch_size=2)
    group = parser.add_argument_group("the report")
    group.add_argument("--check", action="store_true", help="prove it: move along a random element, compare the logits")
    group.add_argument("--json", type=Path, metavar="FILE", help="the group as numbers; -: in place of the words")
    group.add_argument("--all", action="store_true", help="list every parameter, however many there are")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Find the group and show it.

    Args:
        options: The command line.

    Returns:
        The exit code: 1 if it does not hold what it promises.
    """
    require_writable(options.json, "--json")
    model = load_model(options)
    example = load_data(options, model).example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # said in the report
        group = symmetries_of(model.module, example)
    check: Check | None = None
    failure: SymmetryError | None = None
    if options.check:
        try:
            check = group.check(model.module, example, generator=torch.Generator().manual_seed(options.seed))
        except SymmetryError as error:
            failure = error
    if options.json != STANDARD_OUTPUT:
        print(f"model: {model}\n")
        print(in_words(group, None if options.all else _SHOWN))
        if check is not None:
            print(
                f"check: a random rescaling changes the logits by {check.eval_error:.1e} of their size in evaluation "
                f"mode, and by {check.training_error:.1e} in training mode"
            )
        if failure is not None:
            print(f"check failed: {failure}")
    if options.json is not None:
        write_json(options.json, {"model": model.facts(), **as_numbers(group), "check": _check(check, failure)})
    return 0 if failure is None else 1


def symmetries_of(model: nn.Module, example: Batch) -> ScaleGroup:
    """The scale group of a model, without what torch prints about a graph that it fails to read.

    Args:
        model: The model.
        example: A batch on its device.

    Returns:
        The group.

    Raises:
        SymmetryError: If the model cannot be exported; what there is to say about it is in the error.
    """
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always", NoEffectWarning)
        group = scale_symmetries(model, example)
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    return group


def in_words(group: ScaleGroup, shown: int | None = _SHOWN) -> str:
    """The group as sentences: for each generator, what moves up and what down.

    Args:
        group: The group.
        shown: How many names a list may have; ``None``: all.

    Returns:
        Lines.
    """
    moving, count = len(group.moving), len(group.parameters)
    head = "rescaling leaves the function unchanged; it moves" if len(group) == 1 else ""
    head = head or "independent rescalings leave the function unchanged; they move"
    lines = [f"{len(group)} {head} {moving} of {count} parameters"]
    for index, row in enumerate(group.generators.tolist()):
        up = [_powered(name, power) for name, power in zip(group.parameters, row, strict=True) if power > 0]
        down = [_powered(name, -power) for name, power in zip(group.parameters, row, strict=True) if power < 0]
        along = [s.mean.rpartition(".")[0] or "the model" for s in group.statistics if float(s.row[index])]
        heads = [f"{index + 1:>4}. ", "      "]
        for word, names in (("up:", up), ("down:", down)):
            if names:
                lines.append(_listed(f"{heads.pop(0)}{word:<6}", names, shown))
        if along:
            lines.append(_listed("      along: running statistics of ", along, shown))
    fixed = _fixed(group)
    if fixed:
        lines.append(_listed("  fixed: ", fixed, shown))
    if group.inexact_normalizers:
        lines.append(
            f"  {group.inexact_normalizers} LayerNorm-like normalisers have an ε that does not move: there the\n"
            "  function is unchanged up to ε over the variance"
        )
    places: dict[tuple[str, str], list[str]] = {}
    for opaque in group.opaque:
        places.setdefault((opaque.operation, opaque.reason), []).append(opaque.where or "the model itself")
    if places:
        lines.append("  opaque, so that no scale passes:")
    for (operation, reason), where in places.items():
        lines.append(_listed(f"    {operation} ({reason}), {len(where)} times, in ", list(dict.fromkeys(where)), shown))
    return "\n".join(lines)


def as_numbers(group: ScaleGroup) -> dict[str, Any]:
    """The group in plain containers.

    Args:
        group: The group.

    Returns:
        What ``--json`` writes: for each generator, name → the power of the scale that the parameter moves by.
    """
    rows = group.generators.tolist()
    return {
        "generators": [
            {name: int(power) for name, power in zip(group.parameters, row, strict=True) if power} for row in rows
        ],
        "fixed": _fixed(group),
        "statistics": [
            {"mean": s.mean, "variance": s.variance, "eps": s.eps, "powers": [int(power) for power in s.row.tolist()]}
            for s in group.statistics
        ],
        "opaque": [{"operation": o.operation, "where": o.where, "reason": o.reason} for o in group.opaque],
        "inexact_normalizers": group.inexact_normalizers,
    }


def _fixed(group: ScaleGroup) -> list[str]:
    """The parameters that no element moves."""
    moving = set(group.moving)
    return [name for name in group.parameters if name not in moving]


def _check(check: Check | None, failure: SymmetryError | None) -> dict[str, Any] | None:
    """What the proof gave."""
    if failure is not None:
        return {"passed": False, "reason": str(failure)}
    if check is None:
        return None
    return {"passed": True, "eval_error": check.eval_error, "training_error": check.training_error}


def _powered(name: str, power: float) -> str:
    """A name, and the power of the scale where it is not 1."""
    return name if power == 1 else f"{name} (to the power {power:g})"


def _listed(head: str, names: list[str], shown: int | None) -> str:
    """A list, wrapped under its head."""
    text = shortened(names, len(names) if shown is None else shown)
    indent = " " * min(len(head), 12)
    return textwrap.fill(
        head + text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
