"""Named object: something of the user's own, ``module:function``, found in the working directory or installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import CommandLineError


def is_named_object(text: str) -> bool:
    """Whether a word on the command line names an object: ``module:function`` or ``file.py:function``.

    Args:
        text: The word.

    Returns:
        Whether what stands on both sides of its last colon could be that.
    """
    module, _, path = text.rpartition(":")
    importable = all(part.isidentifier() for part in module.split(".")) or module.endswith(".py")
    return importable and all(part.isidentifier() for part in path.split("."))


def find(text: str, option: str) -> Any:
    """Import an object.

    Args:
        text: ``module:function``, ``package.module:Class.method`` or ``path/to/file.py:function``.
        option: The option it was given for, for messages.

    Returns:
        The object.

    Raises:
        CommandLineError: If it is not there, or importing it fails.
    """
    if not is_named_object(text):
        raise CommandLineError(f"{option} {text} is not of the form module:function or file.py:function")
    module_name, _, path = text.rpartition(":")
    found: Any = _module(module_name, option)
    for part in path.split("."):
        if not hasattr(found, part):
            owner = getattr(found, "__name__", module_name)
            public = ", ".join(name for name in vars(found) if not name.startswith("_")) or "nothing public"
            raise CommandLineError(f"{option} {text}: {owner} has no {part!r}; it has {_shortened(public)}")
        found = getattr(found, part)
    return found


def call(text: str, option: str, **arguments: Any) -> Any:
    """Import a function and call it.

    Args:
        text: As in :func:`find`.
        option: The option it was given for, for messages.
        **arguments: Passed on.

    Returns:
        What it returns.

    Raises:
        CommandLineError: If it is not there, cannot be called, or raises.
    """
    function = find(text, option)
    if not callable(function):
        raise CommandLineError(f"{option} {text} is a {type(function).__name__}, and a function is needed")
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        raise CommandLineError(f"{option} {text} raised {_described(error)}") from error


def _module(name: str, option: str) -> ModuleType:
    """A module by its name, or by its file."""
    try:
        return importlib.import_module(name) if not name.endswith(".py") else _module_in(Path(name), option)
    except CommandLineError:
        raise
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and name.split(".")[0] == error.name
        hint = "; it is looked for in the working directory and among what is installed" if missing else ""
        raise CommandLineError(f"{option}: cannot import {name}: {_described(error)}{hint}") from error


def _module_in(file: Path, option: str) -> ModuleType:
    """The module that a file holds, imported once."""
    if not file.is_file():
        raise CommandLineError(f"{option}: there is no file {file}")
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file.resolve()):
        return loaded
    spec = importlib.util.spec_from_file_location(file.stem, file.resolve())
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    if loaded is None:  # classes are pickled by their module's name; one that is taken stays
        sys.modules[file.stem] = module
    sys.path.insert(0, str(file.resolve().parent))  # as if it were run: it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if loaded is None:
            del sys.modules[file.stem]
        raise
    return module


def _described(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[:length] + " …"
