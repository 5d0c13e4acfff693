"""Command: a sweep from a command line, or from a file that holds the same words.

0     done
1     done, and some trials failed or diverged: the report says which
2     bad input, said in one line on stderr
130   interrupted; the same command goes on
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cli.command import Parser, in_one_line
from ..errors import CommandLineError
from . import grid
from .choice import TEST, VALIDATION
from .pool import Resources
from .progress import progress
from .protocol import choose_and_report
from .report import PAGE, Report
from .trial import FINISHED, Trial

#: What a trial does unless something else is asked for.
TRAINING = "ms_optim.train:run"

_DESCRIPTION = """\
Train with every optimizer of a grid, choose the best setting of each by validation, train that one from fresh seeds,
and compare the optimizers seed by seed. Stopped in whatever way, the same command goes on where it was."""

_EPILOG = """\
the grid:
  lr=0.05,0.1            values of an option of ms_optim.train; a list as a value is written lr_cycle=[1,2],[2,3]
  rho=0.05,0.1           any other name is an option of the optimizer and goes to opt_kwargs; optimizers that certainly
                         do not take it (SGD) go without, and it is said
  mssam:rho=0.05,0.1     values for one optimizer alone
  opt=sgd,mssam          the optimizers; what is compared
  label_noise=0,0.2      data, model, and split make a problem: settings are chosen for each problem on its own
with another --function, all names are given to it as they are; a.b=1 goes into the mapping a

a file (--sweep sweep.yaml) has the same options as keys, and a grid for each method instead of --grid:
  recipes: [recipes/digits_mlp.yaml]
  set: {epochs: 10}
  grid: {lr: [0.05, 0.1]}
  methods:
    sgd:
    sam: {rho: [0.05, 0.1, 0.2]}
    sam without momentum: {opt: sam, momentum: 0.0, rho: [0.05, 0.1, 0.2]}
  seeds: [0, 1, 2]
  fresh-seeds: [10, 11, 12, 13, 14]

written to --output: trials.csv (all trials, anew after each), trials/<key>/ (record.json, log.txt, and run/: what the
training writes), summary.md, summary.csv
exit codes: 0 done; 1 some trials failed or diverged; 2 bad input; 130 interrupted

examples:
  python -m ms_optim.sweep -c recipes/digits_mlp.yaml --grid opt=sgd,mssam mssam:rho=0.05,0.1 --seeds 0 1 --output out
  python -m ms_optim.sweep --sweep sweep.yaml --output out --workers 4
  python -m ms_optim.sweep --function mine:trial --grid width=8,16 --seeds 0 1 2 --output out"""


def parser() -> argparse.ArgumentParser:
    """The command line.

    Returns:
        Its parser.
    """
    made = Parser(
        prog="python -m ms_optim.sweep",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument_group("what is tried").add_argument
    add("--sweep", type=Path, metavar="FILE", help="a file with all or some of this; what stands here wins")
    add(
        "-c",
        "--recipes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="recipes: settings that all trials share",
    )
    add("--set", nargs="+", default={}, metavar="NAME=VALUE", help="settings in place of those of the recipes")
    add("--grid", nargs="+", default={}, metavar="NAME=VALUE,…", help="values that are tried; see below")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of every setting (default: 0)")
    add(
        "--fresh-seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="of the chosen settings, to report (default: none)",
    )
    add("--function", default=TRAINING, metavar="MODULE:FUNCTION", help=f"what a trial does (default: {TRAINING})")

    add = made.add_argument_group("what is made of it").add_argument
    add("--output", type=Path, metavar="DIR", help="folder of records and summary")
    add(
        "--metric",
        default=VALIDATION,
        help="what settings are chosen by; never one of the test set (default: %(default)s)",
    )
    add("--smallest", action="store_true", help="the smallest is the best, as of a loss")
    add(
        "--report",
        default=TEST,
        metavar="METRIC",
        help="what is reported of the chosen settings (default: %(default)s)",
    )
    add("--baseline", metavar="METHOD", help="what the others are compared with (default: sgd, or the first)")
    add(
        "--problem",
        nargs="+",
        default=list(grid.PROBLEM),
        metavar="NAME",
        help="settings that make a problem (default: data, model, split)",
    )

    add = made.add_argument_group("how it is run").add_argument
    add("--workers", type=int, metavar="N", help="processes (default: one per GPU or, without, per core; 0: this one)")
    add("--gpus", nargs="+", metavar="ID", help="GPUs, given to the processes in turn (default: all; none: no GPU)")
    add("--threads", type=int, metavar="N", help="of torch in each process (default: cores divided by processes)")
    add("--trials-per-process", type=int, default=1, metavar="N", help="before a new one is started (default: 1)")
    add("--retry", action="store_true", help="run trials again that have failed")
    add("--dry-run", action="store_true", help="list the trials and end")
    add("--traceback", action="store_true", help="show where an error comes from")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = list(sys.path)
    try:
        sys.path.insert(0, os.getcwd())  # a function of the user's own
        return _run(options_of(arguments))
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - the border
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"sweep: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        sys.path[:] = path


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and the file that it names.

    Args:
        arguments: The words.

    Returns:
        The options; ``methods`` is what the file says of them.

    Raises:
        CommandLineError: If there is something wrong with either.
    """
    made = parser()
    options = made.parse_args(arguments)
    file: dict[str, Any] = grid.mapping_in(options.sweep, "--sweep") if options.sweep else {}
    known = set(vars(options)) - {"sweep"} | {"methods"}
    unknown = [name for name in file if name not in known]
    if unknown:
        raise CommandLineError(f"--sweep {options.sweep} has {unknown[0]!r}; its keys are {', '.join(sorted(known))}")
    methods = file.pop("methods", None) or {}
    for name in ("set", "grid"):
        if not isinstance(file.get(name) or {}, Mapping):
            raise CommandLineError(f"--sweep {options.sweep}: {name} has to be names with values, got {file[name]!r}")
        file[name] = grid.underscored(file.get(name) or {})
    many: dict[str, Any] = {action.dest: action.type or str for action in made._actions if action.nargs == "+"}
    for name, kind in many.items():
        if name in file and name not in ("set", "grid"):
            values = file[name] if isinstance(file[name], list) else [file[name]]
            if kind is int and not all(type(value) is int for value in values):
                raise CommandLineError(f"--sweep {options.sweep}: {name} has to be whole numbers, got {values}")
            file[name] = [kind(value) for value in values]
    made.set_defaults(**file)
    options = made.parse_args(arguments)
    if options.output is None:
        raise CommandLineError(f"--output is missing: the folder of records and summary; see {made.prog} --help")
    options.methods = {} if isinstance(options.grid, list) else methods
    return options


def trials_of(options: argparse.Namespace) -> tuple[list[Trial], list[str]]:
    """The trials of a command line.

    Args:
        options: The options.

    Returns:
        The trials, and what is to be said about them.

    Raises:
        CommandLineError: If an option is unknown to training, or there is nothing to vary.
    """
    training = options.function == TRAINING
    names = _options_of_training() if training else None
    fixed = options.set if isinstance(options.set, Mapping) else _fixed(options.set)
    bases: dict[str, dict[str, Any]] = {}
    for file in options.recipes:
        base = _recipe(file, training)
        label = file.stem if file.stem not in bases else str(file)
        bases[label] = grid.settings(base, fixed, names)
    bases = bases or {"": grid.settings({}, fixed, names)}
    remarks: dict[str, list[str]] = {}
    methods = {}
    for label, base in bases.items():
        methods[label] = [_known(each, names, remarks) for each in _methods(options, str(base.get("opt", "")))]
        if names is not None:
            _require_fitting(label, base, methods[label], names)
    made = grid.trials(bases, methods, options.seeds, names, options.problem)
    if training:
        from ..train.config import read_settings

        for settings in {trial.setting_key: trial.settings for trial in made}.values():
            read_settings(settings)  # all of them, before the first one has run for an hour
    kept = {name for each in methods.values() for method in each for name in method.axes}
    lost = sorted({name for names_of in remarks.values() for name in names_of} - kept)
    if lost:
        raise CommandLineError(f"no optimizer of the sweep has an option {lost[0]}, and training has none of that name")
    return made, [f"{name} has no {', '.join(strange)}: it is trained without" for name, strange in remarks.items()]


def _methods(options: argparse.Namespace, recipe_optimizer: str) -> list[grid.Method]:
    shared = options.grid
    if isinstance(shared, list):
        return grid.methods([grid.axis(word) for word in shared], recipe_optimizer)
    axes = [("", name, grid.checked(name, values)) for name, values in shared.items()]
    if not options.methods:
        return grid.methods(axes, recipe_optimizer)
    if not isinstance(options.methods, Mapping):
        raise CommandLineError(f"methods has to be names with a grid each, got {options.methods!r}")
    found = []
    for name, own in options.methods.items():
        if not isinstance(own or {}, Mapping):
            raise CommandLineError(f"the method {name} needs names with values, got {own!r}")
        mine = {key: grid.checked(f"{name}: {key}", values) for key, values in grid.underscored(own or {}).items()}
        first = {"opt": [str(name)]} if options.function == TRAINING else {}
        found.append(grid.Method(str(name), {**first, **{key: values for _, key, values in axes}, **mine}))
    return found


def _known(method: grid.Method, names: frozenset[str] | None, remarks: dict[str, list[str]]) -> grid.Method:
    if names is None:
        return method
    known, strange = grid.without_strangers(method, names)
    if strange:
        remarks[method.name] = strange
    return known


def _require_fitting(
    label: str, base: Mapping[str, Any], methods: Sequence[grid.Method], names: frozenset[str]
) -> None:
    """Refuse to give an optimizer what a recipe says of another one."""
    for method in methods:
        optimizer = method.axes.get("opt", [""])
        _, strange = grid.without_strangers(
            grid.Method(method.name, {**(base.get("opt_kwargs") or {}), "opt": optimizer}), names
        )
        if strange:
            raise CommandLineError(
                f"the recipe {label} has opt_kwargs {strange[0]} for {base.get('opt')}, which {optimizer[0]} does not "
                "take; begin with a recipe without it, or give each optimizer its own recipe"
            )


def _recipe(file: Path, training: bool) -> dict[str, Any]:
    if not training:
        return grid.mapping_in(file, "--recipes")
    from ..train.config import settings_of

    return settings_of(file)


def _options_of_training() -> frozenset[str]:
    from ..train.config import options_of as keys_of
    from ..train.options import parser as of_training

    return frozenset(keys_of(of_training()))


def _fixed(words: Sequence[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise CommandLineError(f"--set {word!r} is not of the form name=value")
        found[name] = grid.scalar(value)
    return grid.underscored(found)


def _run(options: argparse.Namespace) -> int:
    trials, remarks = trials_of(options)
    for remark in remarks:
        print(f"sweep: {remark}", file=sys.stderr)
    if options.dry_run:
        for trial in trials:
            print(trial.key(options.function), trial.problem, trial.method, dict(trial.settings), sep="  ")
        return 0
    gpus = [] if options.gpus == ["none"] else options.gpus
    resources = Resources.here(options.workers, gpus, options.threads, options.trials_per_process)
    if options.gpus == ["none"]:
        resources = replace(resources, gpus=("",))  # an empty list of devices hides them all
    methods = {trial.method for trial in trials}
    if options.baseline is not None and options.baseline not in methods:
        raise CommandLineError(f"--baseline {options.baseline} is not among the methods: {', '.join(sorted(methods))}")
    with progress(trials, (options.metric, options.report)) as listener:
        results = choose_and_report(
            trials,
            options.fresh_seeds,
            options.function,
            options.output,
            resources,
            metric=options.metric,
            largest=not options.smallest,
            retry=options.retry,
            listener=listener,
        )
    report = Report.of(results, options.baseline, options.metric, options.report, not options.smallest)
    report.write(options.output)
    print(report.text())
    print(f"\nwritten: {options.output / PAGE}")
    return int(any(result.status != FINISHED for result in results))
