"""Lock: one sweep at a time in a folder, for as long as its process lives.

The operating system holds the lock and gives it back when the process is gone, however it went: a lock that a killed
sweep has left behind cannot exist, nor can two sweeps take over one that did.  The process's number stands in the file
for whoever is refused.
"""

from __future__ import annotations

import errno
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CommandLineError, NoEffectWarning

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]  # mypy knows the module of the system it runs on

_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def held(file: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock.

    Args:
        file: The file that stands for it; made if it is not there, and not removed, for someone may be waiting for it.
        wait: Seconds to wait for whoever holds it.

    Yields:
        Nothing.

    Raises:
        CommandLineError: If another process holds it.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, file, wait)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # gives it back


def _take(descriptor: int, file: Path, wait: float) -> None:
    if fcntl is None:
        warnings.warn(f"{file}: nothing keeps a second sweep out of this folder here", NoEffectWarning, stacklevel=4)
        return
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:  # a file system without locks
                text = f"{file}: nothing keeps a second sweep out of this folder: {error.strerror}"
                warnings.warn(text, NoEffectWarning, stacklevel=4)
                return
            if time.monotonic() >= until:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise CommandLineError(
                    f"{file.parent} is in use by {owner}; wait until it has ended, end it, or name another folder"
                ) from error
        time.sleep(0.05)
