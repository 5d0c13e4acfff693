"""Copies: tensors as they were, to be put back in place.

Kept in memory that lives as long as the optimizer (allocating it anew in every step costs more than copying), and
copied list by list: on a GPU a kernel for every single buffer of a network takes longer than the copying.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from .distributed import local

# Where a buffer is, by module and name, and the buffer or a copy of it.
Slot = tuple[dict[str, Tensor | None], str, Tensor]


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

    def put_back(self, but: Collection[int] = ()) -> None:
        """Make the tensors again what they were.

        Args:
            but: The positions of those that are left alone.
        """
        if self.tensors:
            left = set(but)
            pairs = [(t, m) for i, (t, m) in enumerate(zip(self.tensors, self._memory, strict=True)) if i not in left]
            with torch.no_grad():
                copy_lists([t for t, _ in pairs], [m for _, m in pairs])

    def forget(self) -> None:
        """There is nothing to put back any more."""
        self.tensors = []


class Buffers:
    """The buffers of modules as they were: their values, and which tensor each is, since some are assigned anew.

    Args:
        copies: Holds the values.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._slots: list[Slot] = []
        copies.forget()

    def take(self, modules: Sequence[nn.Module | None]) -> None:
        """Copy the buffers of modules as they are.

        Args:
            modules: The modules; ``None`` for none.
        """
        inside = dict.fromkeys(part for module in modules if module is not None for part in module.modules())
        tables = [part._buffers for part in inside if part._buffers]
        self._slots = [(table, name, b) for table in tables for name, b in table.items() if b is not None]
        self._copies.take([buffer for _, _, buffer in self._slots])

    def present(self) -> list[Slot]:
        """Copies of what is there now."""
        found = ((table, name, table[name]) for table, name, _ in self._slots)
        return [(table, name, buffer.detach().clone()) for table, name, buffer in found if buffer is not None]

    def put_back(self) -> None:
        """Make the buffers again what they were."""
        for table, name, buffer in self._slots:
            table[name] = buffer
        self._copies.put_back()


def set_buffers(slots: Sequence[Slot]) -> None:
    """Give buffers the values of copies: in place where they fit.

    Args:
        slots: Where, and the values.
    """
    with torch.no_grad():
        for table, name, value in slots:
            buffer = table[name]
            if buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype:
                buffer.copy_(value)
            else:
                table[name] = value


def to_the_end(undo: Callable[[], None]) -> None:
    """Put something back, once more if that is interrupted; the interruption goes on afterwards.

    Args:
        undo: What puts it back, from wherever it left off.
    """
    try:
        undo()
    except BaseException:
        undo()
        raise


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
