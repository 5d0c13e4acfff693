r"""How memory is measured: the peak of a process of its own, whole or above model and inputs.

The *whole* peak resident set (``getrusage``, ``ru_maxrss``) contains the interpreter, torch and everything the process
did.  The peak *above model and inputs* is what one call adds: the process imports, builds and makes one tiny call of
everything first, hands freed memory back (``malloc_trim``), sets Linux's high-water mark back to the present
(``/proc/self/clear_refs``), and reports how far the call lifts it: VmHWM − VmRSS, to a few hundred KiB, since Linux
counts pages in batches.  On CUDA it is ``torch.cuda.max_memory_allocated`` above what was allocated.  Every line of
results names its method.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .harness import Contender, failure, settle

_M_MMAP_THRESHOLD = -3  # of malloc.h


def peak_bytes(function: Callable[..., None], *args: Any) -> int:
    """The peak resident set of a new process that runs ``function(*args)`` and ends.

    Args:
        function: Importable, since the process is spawned.
        *args: Its arguments.

    Returns:
        Bytes.

    Raises:
        RuntimeError: If the process failed.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(child, function, args))
    process.start()
    child.close()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the measured process ended with {process.exitcode}; run {function.__name__} by itself")
    return int(parent.recv())


def _measured(channel: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run and report; in the new process."""
    function(*args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    channel.send(peak if sys.platform == "darwin" else 1024 * peak)


def peak_above(prepare: Callable[..., Contender], *args: Any, device: str = "cpu") -> dict[str, Any]:
    """How far one call lifts the peak of memory above what its model and its inputs take, in a new process.

    Args:
        prepare: Importable, since the process is spawned. ``prepare(*args)`` builds model and inputs, makes whatever
            tiny call pays for imports, and returns what is then called once.
        *args: Its arguments.
        device: Where the call allocates.

    Returns:
        ``peak_bytes`` and the ``method``, or ``failed``.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_lifted, args=(child, device, prepare, args))
    process.start()
    child.close()
    process.join()
    if process.exitcode != 0 or not parent.poll():
        return {"failed": f"the measured process ended with {process.exitcode}"}
    found: dict[str, Any] = parent.recv()
    return found


def _lifted(channel: Any, device: str, prepare: Callable[..., Contender], args: tuple[Any, ...]) -> None:
    """Prepare, measure one call and report; in the new process."""
    try:
        contender = prepare(*args)
        settle(device)
        peak, method = lift(contender, device)
    except Exception as error:  # noqa: BLE001 - a peer that fails is a result, and says how
        failed = failure("", "", error)["failed"]
        channel.send({"failed": failed})
    else:
        channel.send({"peak_bytes": peak, "method": method})


def lift(contender: Contender, device: str = "cpu") -> tuple[int, str]:
    """How far one call lifts this process's peak of memory.

    Args:
        contender: What to call.
        device: Where it allocates.

    Returns:
        Bytes, and the name of the method.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender()
        settle(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    if not _reset_high_water():
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        contender()
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), "ru_maxrss"
    before = _status("VmRSS")
    contender()
    return max(0, _status("VmHWM") - before), "VmHWM"


def only_what_is_alive() -> None:
    """Have glibc take blocks of 64 KiB and more from the system, and hand them back, one by one.

    Otherwise a process keeps some of what was freed, for blocks that may or may not fit into it: the same step of the
    same optimizer then differs by tens of MiB, and its peak is not that of what it held at one time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)


def _reset_high_water() -> bool:
    """Set Linux's VmHWM back to VmRSS, after freed memory went back to the system; ``False`` where that cannot be."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's; else what the contender frees and takes again would not show
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
