"""``ms-optim doctor``: one dry step of the user's own training loop, and what goes wrong in it without a word."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkup import Diagnosis, Finding
from ..checkup import doctor as examined
from ..errors import CommandLineError
from .models import pair
from .named_object import call
from .output import STANDARD_OUTPUT, require_writable, write_json

_EXAMPLES = """\
the function returns (model, optimizer, step), or a dictionary of the arguments of ms_optim.doctor:

    # train.py
    def one_step():
        model, loader = build_model(), build_loader()
        optimizer = ms_optim.SAM(model, torch.optim.SGD, rho=0.05, lr=0.1)
        x, y = next(iter(loader))            # outside: what a step takes from elsewhere is gone

        def step():                          # one step, as your loop makes it
            def closure():
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss
            optimizer.step(closure)

        return model, optimizer, step        # or {"model": …, "optimizer": …, "step": …, "scaler": …}

examples:
    ms-optim doctor --loop train.py:one_step
    ms-optim doctor --loop project.train:one_step --kwargs amp=True --json diagnosis.json"""


def add_to(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Add the command.

    Args:
        commands: Of the whole command line.

    Returns:
        Its parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="examine a training loop: one dry step, everything is put back",
        description="Run one dry step of your own training loop, with any optimizer, and report what goes wrong in it\n"
        "without a word. Exit code 1 if there is a problem; notes alone give 0.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--loop", required=True, metavar="FUNCTION", help="module:function or file.py:function, as shown below"
    )
    parser.add_argument(
        "--kwargs", type=pair, nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the function"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the diagnosis; - writes it in place of the words")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Examine and report.

    Args:
        options: The command line.

    Returns:
        The exit code: 1 if there is a problem.
    """
    require_writable(options.json, "--json")
    diagnosis = examined(**_arguments(call(options.loop, "--loop", **dict(options.kwargs)), options.loop))
    if options.json != STANDARD_OUTPUT:
        print(diagnosis)
    if options.json is not None:
        write_json(options.json, as_plain(diagnosis))
    return 0 if diagnosis.healthy else 1


def as_plain(diagnosis: Diagnosis) -> dict[str, Any]:
    """A diagnosis in plain containers.

    Args:
        diagnosis: The diagnosis.

    Returns:
        What ``--json`` writes.
    """
    return {
        "subject": diagnosis.subject,
        "healthy": diagnosis.healthy,
        "passes": [asdict(seen) for seen in diagnosis.passes],
        "loss_gap": diagnosis.loss_gap,
        "cosine": diagnosis.cosine,
        "findings": [_finding(found) for found in diagnosis.findings],
    }


def _finding(found: Finding) -> dict[str, Any]:
    names = ("name", "severity", "what", "where", "next_move")
    return {**{name: getattr(found, name) for name in names}, "measured": dict(found.measured)}


def _arguments(returned: Any, name: str) -> dict[str, Any]:
    """The arguments of ``ms_optim.doctor``."""
    known = ("model", "optimizer", "step", "scaler", "others")
    if isinstance(returned, (tuple, list)) and len(returned) == 3:
        return dict(zip(known, returned, strict=False))
    if isinstance(returned, Mapping) and {"model", "optimizer", "step"} <= returned.keys() <= set(known):
        return dict(returned)
    what = f"a {type(returned).__name__}"
    if isinstance(returned, (tuple, list, Mapping)):
        what += f" with {', '.join(map(str, returned))}" if isinstance(returned, Mapping) else f" of {len(returned)}"
    raise CommandLineError(
        f"--loop {name} returned {what}; return (model, optimizer, step), or a dictionary with these and, if there are "
        "any, scaler and others"
    )
