"""Grid: which settings there are, from a command line or a file.

A method is an optimizer with a grid of its own, for each has another hyperparameter: ρ for SAM, a strength for
MSRegularizedSGD, nothing for SGD.  A grid is the product of its axes.  What a sweep varies is either part of the
*method* (what is tuned) or of the *problem* (data, network, seed of the split): settings of different problems are
never chosen from, since an easier problem is no better setting.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import CommandLineError
from .trial import Trial, flat

#: What makes a problem, of the options of ``ms_optim.train``.
PROBLEM = (
    *("dataset", "data_dir", "train_split", "val_split", "test_split", "class_map", "target_key", "num_classes"),
    *("model", "train_num_samples", "val_num_samples", "holdout", "split_seed", "label_noise"),
)
_OPTIONS = "opt_kwargs"


#: YAML in which 1e-3 is a number: YAML 1.1, which the library reads, asks for a dot and a sign, 1.0e-3.
_Loader: Any = type("_Loader", (yaml.SafeLoader,), {})
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Method:
    """Who is compared, and what is tried for it.

    Attributes:
        name: In tables.
        axes: Setting → the values that are tried.
    """

    name: str
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def settings(self) -> list[dict[str, Any]]:
        """All points of the grid, the last axis first to change.

        Returns:
            Setting → value.
        """
        values = itertools.product(*self.axes.values())
        return [dict(zip(self.axes, point, strict=True)) for point in values]


def scalar(text: str) -> Any:
    """A value as YAML reads it, and 1e-3 as everyone does.

    Args:
        text: The value.

    Returns:
        A number, a word, a list …

    Raises:
        CommandLineError: If this is no value.

    >>> scalar("1e-3"), scalar("20"), scalar("true"), scalar("sgd"), scalar("[0.9, 0.95]")
    (0.001, 20, True, 'sgd', [0.9, 0.95])
    """
    return _parsed(text, text)


def axis(text: str) -> tuple[str, str, list[Any]]:
    """An axis as it stands on a command line, ``[optimizer:]name=value,value``.

    Args:
        text: The word.

    Returns:
        The optimizer that it is for (empty: all), its name, its values.

    Raises:
        CommandLineError: If it is not of this form, has no value, or one twice.

    >>> axis("lr=0.1,1e-3"), axis("sam:rho=0.05"), axis("opt_betas=[0.9,0.99],[0.9,0.999]")
    (('', 'lr', [0.1, 0.001]), ('sam', 'rho', [0.05]), ('', 'opt_betas', [[0.9, 0.99], [0.9, 0.999]]))
    """
    left, equals, right = text.partition("=")
    method, _, name = left.rpartition(":")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise CommandLineError(f"{text!r} is not of the form name=value,value or optimizer:name=value,value")
    values = _parsed(f"[{right}]", text)
    return method, name.replace("-", "_"), checked(name, values)


def checked(name: str, values: Any) -> list[Any]:
    """The values of an axis.

    Args:
        name: Its name, for messages.
        values: A list; anything else is the only value.

    Returns:
        The values.

    Raises:
        CommandLineError: If there are none, or one twice.
    """
    found = values if isinstance(values, list) else [values]
    if not found or any(value is None for value in found):
        raise CommandLineError(f"{name} needs values, got {values!r}; to leave an option as it is, leave it out")
    twice = [value for index, value in enumerate(found) if value in found[:index]]
    if twice:
        raise CommandLineError(
            f"{name} has the value {twice[0]!r} twice; a setting is sampled by seeds, not by repetition"
        )
    return found


def methods(axes: Sequence[tuple[str, str, list[Any]]], recipe_optimizer: str = "") -> list[Method]:
    """The methods of a command line: a grid for each value of ``opt``.

    Args:
        axes: As :func:`axis` reads them.
        recipe_optimizer: The one that is trained with if no axis says so.

    Returns:
        The methods.

    Raises:
        CommandLineError: If an axis is for an optimizer that is not in the sweep, or is there twice.
    """
    shared = [(name, values) for owner, name, values in axes if not owner and name != "opt"]
    named = [values for owner, name, values in axes if not owner and name == "opt"]
    owners = list(dict.fromkeys(owner for owner, *_ in axes if owner))
    optimizers = named[0] if named else [recipe_optimizer] if recipe_optimizer else owners
    lost = [owner for owner in owners if owner not in optimizers]
    if lost:
        raise CommandLineError(f"an axis is for {lost[0]}, which is not in opt={','.join(map(str, optimizers))}")
    found = []
    for optimizer in optimizers or [""]:
        mine = shared + [(name, values) for owner, name, values in axes if owner and owner == optimizer]
        twice = {name for name, _ in mine if [n for n, _ in mine].count(name) > 1} | (
            {"opt"} if len(named) > 1 else set()
        )
        if twice:
            raise CommandLineError(
                f"there are two axes {min(twice)}{f' for {optimizer}' if optimizer else ''}; join them"
            )
        chosen = {"opt": [optimizer]} if optimizer else {}
        found.append(Method(str(optimizer) or "all", {**chosen, **dict(mine)}))
    return found


def settings(base: Mapping[str, Any], point: Mapping[str, Any], options: Collection[str] | None) -> dict[str, Any]:
    """A recipe with some values in place of its own.

    Args:
        base: The recipe.
        point: Name → value; a dot leads into settings inside settings, as in ``opt_kwargs.rho``.
        options: The names of the options of training; another name is an option of the optimizer, and goes to
            ``opt_kwargs``.  ``None``: all names are known.

    Returns:
        The settings.

    >>> settings({"lr": 0.1, "opt_kwargs": {"gauge": 1}}, {"lr": 0.2, "rho": 0.05}, {"lr", "opt_kwargs"})
    {'lr': 0.2, 'opt_kwargs': {'gauge': 1, 'rho': 0.05}}
    """
    found: dict[str, Any] = dict(base)
    for name, value in point.items():
        head, _, rest = name.partition(".")
        if not rest and options is not None and name not in options:
            head, rest = _OPTIONS, name
        if not rest:
            found[head] = value
            continue
        inner = found.get(head) or {}
        if not isinstance(inner, Mapping):
            raise CommandLineError(
                f"{name}={value!r} goes into {head}, which is {inner!r} and no mapping; write it as one"
            )
        found[head] = settings(inner, {rest: value}, None)
    return found


def trials(
    bases: Mapping[str, Mapping[str, Any]],
    grids: Mapping[str, Sequence[Method]],
    seeds: Sequence[int],
    options: Collection[str] | None = None,
    problem: Collection[str] = PROBLEM,
) -> list[Trial]:
    """All trials: recipe by recipe, method by method, setting by setting, seed by seed.

    Args:
        bases: Name of a recipe → its settings.
        grids: Name of a recipe → its methods.
        seeds: The seeds.
        options: As of :func:`settings`.
        problem: The names of settings that make the problem.

    Returns:
        The trials.  Their problem is named by what differs: the recipe, if one method comes from several, and
        those settings of the problem that differ between trials.

    Raises:
        CommandLineError: If there are no seeds, or one twice.
    """
    checked("seeds", list(seeds))
    found: list[tuple[str, str, dict[str, Any]]] = []
    for name, base in bases.items():
        for method in grids[name]:
            points = [settings(base, point, options) for point in method.settings()]
            found += [(name, method.name, each) for each in points]
    parts = [{key: str(value) for key, value in flat(each).items() if key in problem} for *_, each in found]
    differing = [
        key for key in dict.fromkeys(k for part in parts for k in part) if len({p.get(key) for p in parts}) > 1
    ]
    owners: dict[tuple[str, ...], set[str]] = {}
    for (name, method_name, _), part in zip(found, parts, strict=True):
        owners.setdefault((method_name, *(part.get(key, "") for key in differing)), set()).add(name)
    several = any(len(names) > 1 for names in owners.values())
    made = []
    for (name, method_name, each), part in zip(found, parts, strict=True):
        words = [name] if several or not differing else []
        words += [f"{key} = {part[key]}" for key in differing if key in part]
        label = ", ".join(words) if several or differing or len(bases) == 1 else _shared(list(bases))
        made += [Trial({**each, "seed": seed}, method_name, label) for seed in seeds]
    return made


def without_strangers(method: Method, options: Collection[str]) -> tuple[Method, list[str]]:
    """Leave out what an optimizer of timm's registry certainly does not take: ρ for SGD.

    Args:
        method: A method with an ``opt``.
        options: The names of the options of training.

    Returns:
        The method without those axes, and their names.
    """
    from timm.optim._optim_factory import default_registry

    from ..integrations import timm as _  # noqa: F401 - registers ours

    (optimizer,) = method.axes.get("opt", [""])
    try:
        parameters = inspect.signature(default_registry.get_optimizer_class(optimizer, bind_defaults=False)).parameters
    except (ValueError, TypeError):
        return method, []  # unknown here; training says what it thinks of it
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return method, []
    strange = [name for name in method.axes if name not in options and "." not in name and name not in parameters]
    return Method(method.name, {name: v for name, v in method.axes.items() if name not in strange}), strange


def mapping_in(file: Path, option: str) -> dict[str, Any]:
    """Read a YAML file of names and values.

    Args:
        file: The file.
        option: Where it was given, for messages.

    Returns:
        Its content.

    Raises:
        CommandLineError: If it is not there, or something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandLineError(f"{option} {file}: {error.strerror}") from error
    content = _parsed(text, f"{option} {file}")
    if not isinstance(content, dict):
        raise CommandLineError(f"{option} {file} holds a {type(content).__name__}, and names with values are needed")
    return underscored(content)


def underscored(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Names as Python has them: ``weight-decay`` is ``weight_decay``.

    Args:
        content: Names and values.

    Returns:
        The same.
    """
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _shared(names: Sequence[str]) -> str:
    """What names begin with alike, word by word: recipes of one problem, an optimizer each."""
    words = [re.split(r"[_-]", name) for name in names]
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    return "_".join(column[0] for column in alike)


def _parsed(text: str, shown: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise CommandLineError(f"cannot read {shown}: {' '.join(str(error).split())}") from error
