"""``ms-optim measure``: traces, α* and shares of every layer, and the measures that were asked for."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..balancing import balance
from ..curvature import hessian_trace
from ..errors import CommandLineError, MsOptimError, SymmetryError
from ..sharpness.catalogue import MEASURES, Measure, available
from ..sharpness.trace import summed
from ..sharpness.value import Sharpness
from ..symmetry import ScaleGroup
from .data import Data, add_data_arguments, load_data
from .figure import draw, require_matplotlib
from .measurement import Measurement, Outcome, layers_of, minimum_of
from .models import add_model_arguments, load_model, pair
from .output import STANDARD_OUTPUT, require_writable, write_csv, write_json
from .symmetries import symmetries_of
from .table import table

_EXAMPLES = """\
examples:
  a timm checkpoint on 1,000 training images, every measure, a table, a file and a figure
    ms-optim measure --model resnet18 --checkpoint best.pth --data imagenet/ --samples 1000 --measures all \\
        --columns 2 --json best.json --figure best.png
  your own network on your own batches; make_model() and batches() stand in project.py
    ms-optim measure --model project:make_model --checkpoint model.pt --data project:batches
  CIFAR-10 from torchvision, in double precision
    ms-optim measure --model resnet18 --num-classes 10 --checkpoint last.pth --data torch/cifar10 --data-dir data/ \\
        --input-size 3 32 32 --crop-pct 1 --samples 500 --dtype float64
  no data and no weights, to see it work
    ms-optim measure --model test_resnet --data random --samples 8

measures (--list-measures says what they are):
"""


def add_to(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Add the command.

    Args:
        commands: Of the whole command line.

    Returns:
        Its parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "measure",
        help="sharpness of a model: traces of the layers, minimum sharpness and other measures",
        description="Measure a model: the exact Hessian trace of every layer, the scales that take it to the\n"
        "equivalent network with the smallest trace, and the measures of the catalogue.",
        epilog=_EXAMPLES + "  " + ", ".join(available()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--measures",
        type=_names,
        default=["trace", "minimum"],
        metavar="NAME,…",
        help="of the catalogue, or all (default: trace,minimum)",
    )
    group.add_argument("--list-measures", action=_Catalogue, nargs=0, help="show the catalogue and exit")
    group.add_argument(
        "--columns",
        type=_columns,
        metavar="R",
        help="exact columns of each sample; the rest is sampled (default: all, exact; rank: as many as matter)",
    )
    group.add_argument(
        "--probes", type=int, default=2, metavar="M", help="signed columns for the rest; errors from 2 on (default: 2)"
    )
    group.add_argument(
        "--set",
        type=_setting,
        nargs="+",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="options of a measure's function, as sam.rho=0.1",
    )
    group = parser.add_argument_group("the report")
    group.add_argument("--json", type=Path, metavar="FILE", help="everything; - writes it in place of the tables")
    group.add_argument("--csv", type=Path, metavar="FILE", help="the layers, a row for each")
    group.add_argument("--figure", type=Path, metavar="FILE", help="the layers, drawn (needs matplotlib)")
    parser.set_defaults(run=run)
    return parser


class _Catalogue(argparse.Action):
    """Show the catalogue and exit: as --help, whatever else was said."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print a table of the measures there are."""
        rows = [
            [name, measure.formula, measure.invariances, "labels" if measure.needs_labels else "", measure.source]
            for name, measure in available().items()
        ]
        print(table(["measure", "formula", "does not depend on", "needs", "source"], rows))
        parser.exit()


def run(options: argparse.Namespace) -> int:
    """Measure and report.

    Args:
        options: The command line.

    Returns:
        The exit code.
    """
    chosen = _chosen(options)
    require_matplotlib(options.figure)
    for name in ("json", "csv", "figure"):
        require_writable(getattr(options, name), f"--{name}")
    model = load_model(options)
    quiet = options.json == STANDARD_OUTPUT
    if not quiet:
        print(f"model: {model}", flush=True)
    data = load_data(options, model)

    group, notes = _symmetries(data)
    traces = hessian_trace(
        model.module,
        data,
        options.columns,
        generator=torch.Generator().manual_seed(options.seed),
        probes=1 if options.columns in (None, "rank") else options.probes,
    )
    found = None if group is None else balance(model.module, traces, group)
    known = {"trace": summed(traces)}
    if found is not None:
        known["minimum"] = minimum_of(traces, found)
    measurement = Measurement(
        model=model.facts(),
        data=str(data),
        options={
            **{"measures": list(chosen), "columns": options.columns, "seed": options.seed},
            "set": {f"{name}.{key}": value for name, key, value in options.set},
        },
        layers=layers_of(model.module, traces, found),
        traces=traces,
        measures=_measured(chosen, known, data, group, options),
        notes=notes,
    )
    if options.csv is not None:
        write_csv(options.csv, *measurement.as_rows())
    if options.figure is not None:
        draw(measurement, options.figure)
    if not quiet:
        print(measurement)
    if options.json is not None:
        write_json(options.json, measurement.as_json())

    failed = [f"{name}: {outcome.reason}" for name, outcome in measurement.measures.items() if outcome.value is None]
    if failed and "all" not in options.measures:
        raise CommandLineError(f"{len(failed)} of {len(chosen)} measures could not be taken: {'; '.join(failed)}")
    return 0


def _symmetries(data: Data) -> tuple[ScaleGroup | None, tuple[str, ...]]:
    """The scale group; without one there are still traces."""
    try:
        return symmetries_of(data.model.module, data.example()), ()
    except SymmetryError as error:
        return None, (f"no α* and no minimum sharpness, for the symmetries are not known: {error}",)


def _chosen(options: argparse.Namespace) -> dict[str, Measure]:
    """The measures that were asked for, once their names and settings are known to be right."""
    there = available()
    every = "all" in options.measures
    asked = [name for name in options.measures if name != "all"]
    for name in [*asked, *(name for name, _, _ in options.set)]:
        if name not in there:
            missing = " (its function is not part of this version)" if name in MEASURES else ""
            raise CommandLineError(f"there is no measure {name!r}{missing}; there are {', '.join(there)}")
    given: dict[str, list[str]] = {name: [] for name in there}
    for name, key, _ in options.set:
        given[name].append(key)
        if not there[name].accepts(key):
            raise CommandLineError(f"--set {name}.{key}: {there[name]} takes {', '.join(there[name].options)}")
    lacking = {name: [key for key in measure.required if key not in given[name]] for name, measure in there.items()}
    for name in asked:
        if lacking[name]:
            needed = " ".join(f"{name}.{key}=…" for key in lacking[name])
            raise CommandLineError(
                f"the measure {name} needs --set {needed}; what cannot be written there can be passed to "
                f"ms_optim.sharpness.{there[name].function_name}(model, data, …)"
            )
    return {name: measure for name, measure in there.items() if name in asked or (every and not lacking[name])}


def _measured(
    chosen: dict[str, Measure],
    known: dict[str, Sharpness],
    data: Data,
    group: ScaleGroup | None,
    options: argparse.Namespace,
) -> dict[str, Outcome]:
    """Take the measures one by one; one that fails leaves the others alone."""
    labelled = data.labelled()
    outcomes = {}
    for name, measure in _with_bar(chosen.items()):
        settings = {key: value for each, key, value in options.set if each == name}
        if name in known and not settings:
            outcomes[name] = Outcome(measure.formula, known[name])
            continue
        if measure.needs_labels and not labelled and not settings:  # which may lift that
            outcomes[name] = Outcome(measure.formula, reason="it needs labels, and the data has none")
            continue
        begin = time.perf_counter()
        offered = {"columns": options.columns, "group": group, "seed": options.seed}
        offered["generator"] = torch.Generator().manual_seed(options.seed)
        taken = {key: value for key, value in offered.items() if measure.accepts(key)}
        try:
            value = measure(data.model.module, data, **{**taken, **settings})
        except Exception as error:  # noqa: BLE001 - reported in its row
            if options.traceback:
                traceback.print_exc()
            text = " ".join(str(error).split())
            reason = text if isinstance(error, MsOptimError) else f"{type(error).__name__}: {text}"
            outcomes[name] = Outcome(measure.formula, reason=reason)
        else:
            outcomes[name] = Outcome(measure.formula, value, seconds=time.perf_counter() - begin)
    return outcomes


def _with_bar(items: Iterable[tuple[str, Measure]]) -> Iterable[tuple[str, Measure]]:
    """A bar of the measures, on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm  # an extra
    except ImportError:
        return items
    shown: Iterable[tuple[str, Measure]] = tqdm(
        list(items), desc="measures", unit="measure", delay=2, disable=None, leave=False
    )
    return shown


def _names(text: str) -> list[str]:
    """Read ``trace,minimum``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("no measure is named")
    return list(dict.fromkeys(names))


def _columns(text: str) -> int | str:
    """Read a number of columns, or ``rank``."""
    if text == "rank":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor rank") from error


def _setting(text: str) -> tuple[str, str, Any]:
    """Read ``measure.option=value``."""
    name, dot, rest = text.partition(".")
    if not dot or "=" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form measure.option=value")
    return (name, *pair(rest))
