"""Copies: tensors as they were, to be put back in place.

Kept in memory that lives as long as the optimizer (allocating it anew in every step costs more than copying), and
copied list by list: on a GPU a kernel for every single buffer of a network takes longer than the copying.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import local


class Copies:
    """Copies of some tensors.

    Attributes:
        tensors: The tensors; empty for none.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._memory: list[Tensor] = []

    def __reduce__(self) -> tuple[type[Copies], tuple[()]]:
        """Of a copy of the optimizer, nothing."""
        return Copies, ()

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors as they are, of sharded ones this rank's part.

        Args:
            tensors: The tensors.
        """
        self.tensors = []
        tensors = [local(tensor) for tensor in tensors]
        memory = self._memory
        fits = len(memory) == len(tensors) and all(
            a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
            for a, b in zip(memory, tensors, strict=True)
        )
        with torch.no_grad():
            if not fits:
                self._memory = [torch.empty_like(t) for t in tensors]
            copy_lists(self._memory, tensors)
        self.tensors = tensors  # last: from here on there is something to put back

    def put_back(self) -> None:
        """Make the tensors again what they were."""
        if self.tensors:
            with torch.no_grad():
                copy_lists(self.tensors, self._memory)

    def forget(self) -> None:
        """There is nothing to put back any more."""
        self.tensors = []


def copy_lists(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into tensors, those of one type and device together: mixed lists are copied one by one.

    Args:
        targets: Where to.
        sources: Of the same shapes.
    """
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, of = kinds.setdefault((target.dtype, target.device), ([], []))
        into.append(target)
        of.append(source)
    for into, of in kinds.values():
        torch._foreach_copy_(into, of)
