"""Process: where a training runs: its device, its place among the ranks, what it may and may not do at random."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..cli.models import require_device
from ..errors import CommandLineError
from ..machine import processor, software


@dataclass(frozen=True)
class Process:
    """One process of a training.

    Attributes:
        device: Where the model is.
        rank: Its place.
        world: How many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def primary(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    def summed(self, *values: float | Tensor) -> list[float]:
        """Sums over all ranks, in float64 where the device has it; waits for the device.

        Args:
            *values: This rank's numbers.

        Returns:
            The sums.
        """
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        parts = [torch.as_tensor(value, dtype=dtype, device=self.device) for value in values]
        total = torch.stack(parts)
        if self.distributed:
            dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.distributed:
            dist.barrier()

    def of_primary(self, value: Any) -> Any:
        """What the primary process has, on all.

        Args:
            value: Anything that can be pickled; only the primary's counts.

        Returns:
            The primary's.
        """
        if not self.distributed:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]


@contextmanager
def process(options: argparse.Namespace) -> Iterator[Process]:
    """Join the other ranks if there are any, and set up torch; all of it is put back in the end.

    Args:
        options: ``device``, ``threads``, ``deterministic``.

    Yields:
        This process.

    Raises:
        CommandLineError: If the device is not there, or sharding is asked of a process that is alone.
    """
    from timm.utils import init_distributed_device

    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require_device(name)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    settings = SimpleNamespace(device=name)  # timm writes what it finds into it
    device = init_distributed_device(settings)
    found = Process(torch.device(device), settings.rank, settings.world_size)
    try:
        if options.fsdp and not found.distributed:
            raise CommandLineError("--fsdp shards weights over several processes: torchrun --nproc_per_node=N -m …")
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.set_default_dtype(torch.float32)  # of weights and images, whatever the caller works with
        with _determinism(options.deterministic):
            yield found
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if found.distributed:
            dist.destroy_process_group()


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Only operations that give the same bits each time, or the fastest."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
    )
    try:
        if wanted:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS has no deterministic mode without
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not wanted
        torch.backends.cuda.matmul.allow_tf32 = True  # as timm's train.py
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = before[2:]


def environment(device: torch.device) -> dict[str, Any]:
    """What numbers depend on, and nothing that names the machine or its folders.

    Args:
        device: Where the model is.

    Returns:
        Plain values.
    """
    here = {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {**software(), **here}


def device_name(device: torch.device) -> str:
    """A device as people call it.

    Args:
        device: The device.

    Returns:
        The model of the GPU or of the processor.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = processor() if device.type == "cpu" else ""
    return known or f"{device.type} ({platform.machine()})"
