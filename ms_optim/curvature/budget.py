r"""The budget: how many samples and columns go together in the memory there is.

Of a forward pass autograd keeps A bytes a sample, and of a group of g columns the accumulators keep k(g) bytes a
sample; both are read off the graph of one or two samples before any work is done.  A chunk of n samples then needs

    n (A + k(g) + f) + t ,

f for the gradients in flight and t for the temporaries of one contraction, which are made in slices.  Neither depends
on the number of classes, apart from the logits and the columns themselves.

On a CPU a smaller chunk is taken than memory allows: what the last-level cache nearly holds is faster than what it does
not, and fresh pages from the operating system cost as much as the arithmetic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..errors import MemoryBudgetError
from .graph.backprop import bytes_of
from .graph.tape import Tape
from .rules import contraction as contractions
from .rules.contraction import Contraction
from .rules.shared import joinable

# Activations of as many samples as fit in this go together on a CPU, if they are at least so many that the weights,
# which are read once for all of them, are not what is waited for. (LeNet, the small CNN and ResNet-8, on a processor
# with 32 MiB of last-level cache: from 24 to 96 MiB it is the same, and 12 MiB is a tenth slower.)
_CACHE_BYTES = 48 * 2**20
_FEWEST_SAMPLES = 32

# δ of as many columns as fit in this go together under vmap: on a GPU to keep it busy, on a CPU to save the overhead of
# a call where that is what counts (larger ones push each other out of the cache).
_TOGETHER_BYTES = {"cpu": 2 * 2**20}
_TOGETHER_BYTES_ELSEWHERE = 256 * 2**20

# The share of free memory that is taken when nothing is said.
_SHARE = 0.5


@dataclass(frozen=True)
class Chunk:
    """How much goes together.

    Attributes:
        samples: n, samples in one forward pass.
        group: g, columns that are accumulated before a contraction is finished.
    """

    samples: int
    group: int


def available_bytes(device: torch.device) -> int:
    """Free memory of a device.

    Of a GPU with what PyTorch's allocator could reuse; else of the machine, or of the control group that the process
    lives in, whichever is less.

    Args:
        device: The device.

    Returns:
        Bytes; 4 GiB where nothing can be read.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = []
    try:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = [1024 * int(line.split()[1])]
    except (OSError, ValueError, AttributeError):
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(found, default=4 * 2**30)


@cache
def keep_pages() -> None:
    """Let the C library keep the memory that is freed for what comes next, once in a process.

    glibc hands blocks back to the system until one of their size has been freed once, and every page that is taken
    anew is a fault; in a measurement of small tensors that can be a sixth of the time, of a training loop too.  A block
    as large as it ever learns from (``DEFAULT_MMAP_THRESHOLD_MAX``, 32 MiB) is taken, not touched, and freed.  On other
    systems nothing comes of it.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def default_budget(device: torch.device) -> int:
    """The bytes that a measurement may take when nothing is said: half of what is free."""
    return int(_SHARE * available_bytes(device))


def columns_together(nodes: Sequence[object], device: torch.device) -> int:
    """How many columns go under one ``vmap``.

    Args:
        nodes: The nodes at which δ of all of them will be kept.
        device: Where.

    Returns:
        At least 1.
    """
    limit = _TOGETHER_BYTES.get(device.type, _TOGETHER_BYTES_ELSEWHERE)
    return max(1, limit // max(1, sum(bytes_of(node) for node in nodes)))


def plan_chunk(
    tape: Tape,
    rules: Mapping[str, Sequence[Contraction]],
    measured: int,
    wanted: int,
    columns: int,
    item: int,
    budget: int,
    fixed: int,
    cached: bool,
) -> Chunk:
    """Choose a chunk.

    Args:
        tape: Of a forward pass of ``measured`` samples.
        rules: Parameter name → the contractions of its uses in that pass.
        measured: The number of samples of that pass.
        wanted: The most samples that are of use.
        columns: C, the number of columns to come.
        item: Bytes of a number.
        budget: Bytes.
        fixed: Bytes that are needed whatever the chunk.
        cached: Whether to stay in the processor's caches, if that is possible.

    Returns:
        The chunk with the most samples, then the most columns.

    Raises:
        MemoryBudgetError: If one sample and one column do not fit; the parameter that needs most is named.
    """
    activations = tape.activation_bytes / measured
    flight = 3 * max((bytes_of(node) for node in tape.order if node._input_metadata), default=0) / measured
    each = [rule for site in rules.values() for rule in site]

    def temporary(samples: float) -> float:
        largest = max((rule.temporary_bytes(item) for rule in each), default=0)
        return max(largest, min(samples * largest, contractions._CHUNK_BYTES))

    several = [site for site in rules.values() if len(site) > 1]

    def per_sample(group: int) -> float:
        kept = sum(rule.kept_bytes(group, item) for rule in each)
        for site in several:
            outers = joinable(site)
            if outers is None:  # gradients are formed, for one column at a time, before they are squared
                kept += 2 * item * math.prod(site[0].use.shape)
            else:
                kept += sum(group * item * math.prod(o.use.output_shape) // o.samples for o in outers)
        return activations + flight + kept

    groups = sorted({columns, *(g for g in (1, 2, 4, 8, 16, 32, 64, 128) if g < columns)}, reverse=True)
    best = Chunk(0, 1)
    for group in groups:
        samples = int((budget - fixed - temporary(1)) / per_sample(group))
        if samples > best.samples:
            best = Chunk(min(samples, wanted), group)
        if best.samples >= min(wanted, _FEWEST_SAMPLES):
            break
    if best.samples < 1 and not rules:
        needed = int(fixed + per_sample(1)) + 1
        raise MemoryBudgetError(
            f"max_memory={budget} bytes is too small for one sample and one column, which need {needed} bytes for "
            f"activations and gradients; pass max_memory={needed} or more, or None"
        )
    if best.samples < 1:
        name = max(rules, key=lambda name: sum(r.kept_bytes(1, item) + r.temporary_bytes(item) for r in rules[name]))
        own = sum(r.kept_bytes(1, item) + r.temporary_bytes(item) for r in rules[name])
        needed = int(fixed + temporary(1) + per_sample(1)) + 1
        raise MemoryBudgetError(
            f"max_memory={budget} bytes is too small for one sample and one column, which need {needed} bytes; of the "
            f"layers {name} needs most, {own} bytes beside the activations. Pass max_memory={needed} or more, or None"
        )
    if cached and activations > 0:
        fits = max(_FEWEST_SAMPLES, int(_CACHE_BYTES / activations))
        chunks = -(-wanted // min(best.samples, fits))
        best = Chunk(-(-wanted // chunks), best.group)  # all of one size
    return best
