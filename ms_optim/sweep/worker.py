"""Worker: a process that carries out trials, one after another, and writes the record of each.

It is started anew (spawned, not forked) with the GPU and the number of threads that are its own in its environment:
they have to be known before torch is imported.  What a trial prints goes to the trial's log, also what comes from
libraries underneath Python.  Ctrl-C is the sweep's to answer, not the worker's; and when the sweep is gone, so is the
worker: a trial that nobody waits for would write into the folder of the sweep that comes next.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..cli.command import in_one_line
from ..cli.named_object import find
from ..errors import DivergedError, MsOptimError
from ..machine import software
from .lock import held
from .records import LOG, died, write
from .trial import DIVERGED, Result, Trial, folder_of

#: Seconds within which a worker of a killed sweep is gone.
_GRACE = 60.0


def serve(connection: Connection) -> None:
    """Carry out trials until there are no more.

    Args:
        connection: To the sweep; gives (trial, function, folder), and takes a word when its record is written.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            trial, function, folder = connection.recv()
        except EOFError:
            return
        attempt(trial, function, folder)
        connection.send("done")


def attempt(trial: Trial, function: str, folder: Path, logged: bool = True) -> None:
    """Carry out a trial and write its record.

    Args:
        trial: The trial.
        function: ``module:function``.
        folder: That of the sweep.
        logged: Whether what is printed goes to the trial's log.
    """
    own = folder_of(folder, trial.key(function))
    own.mkdir(exist_ok=True)
    facts: dict[str, Any] = {"log": str((own / LOG).relative_to(folder))} if logged else {}
    told = {"output": str(own), "experiment": "run", "resume": "auto"}
    began = time.perf_counter()
    with held(own / "lock", _GRACE), _printing_to(own / LOG) if logged else nullcontext():
        try:
            outcome = find(function, "the function of the sweep")({**trial.settings, **told})
            result = Result.returned(trial, outcome)
        except KeyboardInterrupt:
            raise
        except DivergedError as error:
            result = Result(trial, DIVERGED, error=_said(error))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            result = died(trial, _said(error))
        facts |= {"seconds": round(time.perf_counter() - began, 3), "host": host()}
        write(folder, function, Result(trial, result.status, result.outcome, result.error, **facts))


def host() -> dict[str, Any]:
    """Where this process runs, without the machine's name.

    Returns:
        Plain values.
    """
    # Asked of a process that has not used its GPU, its name would cost hundreds of megabytes of it.
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    return {**software(), "gpu": gpu, "threads": torch.get_num_threads()}


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"the function left by sys.exit({error.code!r})"
    text = in_one_line(error).removesuffix(" (--traceback shows where)")
    return f"{type(error).__name__}: {text}" if isinstance(error, MsOptimError) else text


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


@contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    """What is printed goes to the end of a file, from whatever level of the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(before[0], 1)
        os.dup2(before[1], 2)
        for descriptor in (log, *before):
            os.close(descriptor)
