"""Output: a file that is written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CommandLineError

#: In place of a file's name: the terminal, or whatever standard output is.
STANDARD_OUTPUT = Path("-")


def require_writable(path: Path | None, option: str) -> None:
    """Refuse what cannot be written before anything has been computed for it.

    Args:
        path: The file to come; ``None`` or ``-``: nothing to check.
        option: Where it was given, for the message.

    Raises:
        CommandLineError: If its folder is not there or not writable, or it is a folder itself.
    """
    if path is None or path == STANDARD_OUTPUT:
        return
    if path.is_dir():
        raise CommandLineError(f"{option} {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise CommandLineError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise CommandLineError(f"{option} {path}: the folder {path.parent} is not writable")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside another one, that takes its place if all goes well, and else is gone.

    Args:
        path: The place.

    Yields:
        The file to write, in the same folder and with the same ending.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        else:  # what any new file has; mkstemp's can be read by nobody else
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, in which numbers that are not finite are ``null``.

    Args:
        path: The file, or ``-`` for standard output.
        content: Plain containers.
    """
    text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, in which what is not known is empty.

    Args:
        path: The file.
        header: Names of the columns.
        rows: Their values.
    """
    with whole_file(path) as file, file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if _unknown(value) else value for value in row] for row in rows)


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _finite(value: Any) -> Any:
    """The same with ``None`` for NaN and infinities, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(each) for each in value]
    if isinstance(value, float):  # also the subclasses, as plain floats
        return float(value) if math.isfinite(value) else None
    return value
