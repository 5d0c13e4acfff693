"""Pool: as many processes as there are GPUs, or cores, each of which has one trial at a time.

A trial that raises, runs out of memory or is killed takes its process with it at worst, and nobody else's: its record
says what happened, and a new process takes the next trial.  A process is used once unless the caller says otherwise, so
that nothing (GPU memory, compiled code, random streams, defaults of torch) comes from one trial into another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from ..cli.named_object import find
from ..errors import CommandLineError
from .records import LOG, RECORD, Records, died, write
from .trial import FAILED, Result, Trial, folder_of
from .worker import attempt, serve

#: Told of each result when it is there, with how many there are, and how many there will be.
Listener = Callable[[Result, int, int], None]

_SPAWN = multiprocessing.get_context("spawn")  # a process forked after torch has started its threads can hang
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Resources:
    """What trials share: processes, and what each of them has for itself.

    Attributes:
        workers: How many processes; 0: none, trials run in this one, where a crash is the end (for looking into a trial
            with a debugger).
        gpus: Numbers or names of GPUs, given to the processes in turn; empty: what a process sees is left as it is.
        threads: Of torch, for each process.
        trials_per_process: How many trials before a new process is started.

    Raises:
        CommandLineError: If a number is too small.
    """

    workers: int
    gpus: tuple[str, ...] = ()
    threads: int = 1
    trials_per_process: float = 1

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("threads", 1), ("trials_per_process", 1)):
            if getattr(self, name) < least:
                raise CommandLineError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @classmethod
    def here(
        cls,
        workers: int | None = None,
        gpus: Sequence[str] | None = None,
        threads: int | None = None,
        trials_per_process: float = 1,
    ) -> Resources:
        """What this machine has, where it is not said.

        Args:
            workers: By default one per GPU; without GPUs, one per core.
            gpus: By default all that this process sees.
            threads: By default the cores, shared equally.
            trials_per_process: As of the class.

        Returns:
            The resources.
        """
        gpus = visible_gpus() if gpus is None else tuple(gpus)
        workers = (len(gpus) or cores()) if workers is None else workers
        share = max(1, cores() // max(1, workers))
        return cls(workers, tuple(gpus), share if threads is None else threads, trials_per_process)

    def environment(self, slot: int) -> dict[str, str]:
        """What the process of a slot finds in its environment.

        Args:
            slot: Its number.

        Returns:
            Name → value.
        """
        found = dict.fromkeys(_THREADS, str(self.threads))
        if self.gpus:
            found["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return found


def run_trials(
    trials: Iterable[Trial],
    function: str,
    folder: Path | str,
    resources: Resources | None = None,
    *,
    retry: bool = False,
    listener: Listener | None = None,
) -> list[Result]:
    """Run those trials of which a folder has no record yet.

    Args:
        trials: The trials; one that is there twice runs once.
        function: ``module:function`` or ``file.py:function``.  It is called with the settings of a trial and, beside
            them, ``output`` (the folder of the trial), ``experiment`` (the name of a folder in it, which it may make
            and write to) and ``resume`` = ``"auto"``: it should go on from what lies there.  It returns a mapping of
            plain values: a number that is not finite, or a :class:`~ms_optim.errors.DivergedError`, says that the trial
            has diverged, ``None`` that there is no such number.
        folder: Where the records are.
        resources: By default, one process per GPU or core.
        retry: Whether trials that have failed run again; those that have diverged have a result.
        listener: Is told of each new result.

    Returns:
        The results, in the order of the trials.

    Raises:
        CommandLineError: If there is no such function, or another sweep is in the folder.
    """
    with Records(folder).locked() as records:
        return run_locked(list(trials), function, records, resources or Resources.here(), retry, listener)


def run_locked(
    trials: Sequence[Trial],
    function: str,
    records: Records,
    resources: Resources,
    retry: bool = False,
    listener: Listener | None = None,
) -> list[Result]:
    """:func:`run_trials` in a folder that is locked already.

    Args:
        trials: The trials.
        function: ``module:function``.
        records: Of the folder.
        resources: What the trials share.
        retry: Whether trials that have failed run again.
        listener: Is told of each new result.

    Returns:
        The results, in the order of the trials.

    Raises:
        CommandLineError: If there is no such function.
    """
    if not callable(find(function, "the function of the sweep")):
        raise CommandLineError(f"the function of the sweep, {function}, is not a function")
    records.relabel(trials, function)
    wanted = {trial.key(function): trial for trial in trials}
    for key, trial in wanted.items():
        known = records.result(trial, function)
        if retry and known is not None and known.status == FAILED:
            records.forget(key)
    open_trials = [trial for trial in wanted.values() if records.result(trial, function) is None]
    records.write_table()
    ended = _in_this_process if resources.workers == 0 else _in_processes
    for count, trial in enumerate(ended(open_trials, function, records.folder, resources), 1):
        assert records.look(trial.key(function))  # it has just been written
        result = records.result(trial, function)
        if listener is not None and result is not None:
            listener(result, len(wanted) - len(open_trials) + count, len(wanted))
    found = [records.result(trial, function) for trial in trials]
    return [result for result in found if result is not None]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count]) if named else tuple(map(str, range(count)))


def _in_this_process(trials: Sequence[Trial], function: str, folder: Path, resources: Resources) -> Iterator[Trial]:
    for trial in trials:
        attempt(trial, function, folder, logged=False)
        yield trial


class _Slot:
    """A place for a process, and the trial that it has."""

    def __init__(self, number: int, resources: Resources) -> None:
        self.number, self.resources = number, resources
        self.trial: Trial | None = None
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._taken = 0

    def start(self, trial: Trial, function: str, folder: Path) -> None:
        if self._process is None or not self._process.is_alive() or self._taken >= self.resources.trials_per_process:
            self.end()
            ours, theirs = _SPAWN.Pipe()
            # Not a daemon: those may not have processes of their own, as loaders of data do.
            process = _SPAWN.Process(target=serve, args=(theirs,), name=f"trials-{self.number}")
            with _environment(self.resources.environment(self.number)):
                process.start()
            theirs.close()
            self._process, self._connection, self._taken = process, ours, 0
        self.trial, self._taken = trial, self._taken + 1
        with contextlib.suppress(OSError):  # it has died on the way, which is noticed where trials end
            self.connection.send((trial, function, folder))

    @property
    def connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    @property
    def waited_for(self) -> list[Any]:
        assert self._process is not None
        return [self.connection, self._process.sentinel]

    def ended(self) -> str | None:
        """How the trial has ended: empty if its process says so, a reason if it died; ``None`` while it runs."""
        assert self._process is not None
        alive = self._process.is_alive()  # asked first: what a dying process still said is read below
        try:
            if self.connection.poll():
                self.connection.recv()
                return ""
        except (EOFError, OSError):
            self._process.join(5)
            alive = False
        return None if alive else _exit(self._process.exitcode)

    def end(self, at_once: bool = False) -> None:
        """End the process; one that has no trial does so by itself."""
        if self._process is None:
            return
        self.connection.close()
        if at_once:
            self._process.terminate()
        self._process.join(5 if at_once else 30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._process = self._connection = None


def _in_processes(trials: Sequence[Trial], function: str, folder: Path, resources: Resources) -> Iterator[Trial]:
    """Run trials side by side; each is given back when its record is written."""
    waiting = deque(trials)
    slots = [_Slot(number, resources) for number in range(min(resources.workers, len(trials)))]
    try:
        while waiting or any(slot.trial for slot in slots):
            for slot in slots:
                if slot.trial is None and waiting:
                    slot.start(waiting.popleft(), function, folder)
            busy = [slot for slot in slots if slot.trial]
            # Not for ever: processes of a killed process can keep its pipes open for a while.
            wait([each for slot in busy for each in slot.waited_for], timeout=1.0)
            for slot in busy:
                trial, reason = slot.trial, slot.ended()
                if trial is None or reason is None:
                    continue
                slot.trial = None
                _bury(trial, reason, function, folder)
                if not waiting:
                    slot.end()
                yield trial
    finally:
        for slot in slots:
            slot.end(at_once=True)


def _bury(trial: Trial, reason: str, function: str, folder: Path) -> None:
    """Write the record of a trial whose process could not."""
    own = folder_of(folder, trial.key(function))
    if (own / RECORD).is_file():
        return
    own.mkdir(exist_ok=True)
    log = str((own / LOG).relative_to(folder)) if (own / LOG).is_file() else ""
    text = reason or "its process wrote no record"
    write(folder, function, died(trial, text, log=log))


def _exit(code: int | None) -> str:
    """How a process has ended, in words."""
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = ", as by a system that runs out of memory" if -code == signal.SIGKILL else ""
        return f"its process was killed by {name}{hint}"
    return f"its process ended with exit code {code} before the function returned"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """What a process that is started now finds in its environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
