"""Parallel measurement: sums over the ranks of a process group, and the module inside a wrapper.

Every rank measures its own data; what is reduced are sums, in float64, so that two ranks with half of the data each
find what one finds with all of it.  A rank that fails tells the others, which would otherwise wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import DataError

ProcessGroup = Any  # torch.distributed.ProcessGroup, which is missing where torch is built without it


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``.

    Their hooks and compiled graphs serve the training pass; curvature needs autograd's own graph of the module.

    Args:
        model: A module, wrapped or not.

    Returns:
        The module itself.
    """
    while True:
        wrapper = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        inner = model.module if wrapper else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def own_generator(generator: torch.Generator, group: ProcessGroup) -> torch.Generator:
    """A generator for this rank alone.

    With equal ones, as a fixed seed gives them, the i-th sample of every rank would have the same signs, and errors
    would add up that the standard error takes for independent.

    Args:
        generator: This rank's, equal on all ranks or not; one number is drawn from it.
        group: The process group.

    Returns:
        A generator whose seed is that number plus the rank.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(generator.device).manual_seed(int(seed) + dist.get_rank(group))


def sum_over_ranks(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace each tensor by its sum over the ranks, in one call per dtype and device.

    Args:
        tensors: Contiguous tensors of the same shapes on all ranks.
        group: The process group.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def agree_on_success(error: BaseException | None, device: torch.device, group: ProcessGroup) -> None:
    """Fail on every rank if one has failed.

    Args:
        error: What this rank met; ``None`` for nothing.
        device: Where the group communicates.
        group: The process group.

    Raises:
        BaseException: This rank's own error.
        DataError: If only others failed; it names how many.
    """
    failed = torch.tensor([0.0 if error is None else 1.0], device=device)
    dist.all_reduce(failed, group=group)
    if error is not None:
        raise error
    if float(failed) > 0:
        raise DataError(
            f"{int(failed)} of {dist.get_world_size(group)} ranks failed in this measurement; its error is raised there"
        )
