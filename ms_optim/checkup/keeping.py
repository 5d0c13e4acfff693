"""Keeping: everything that can be reached from some objects, as it was, to be put back in place, bit for bit.

A step changes weights, buffers, ``.grad``, an optimizer's state, a scaler's scale, module modes, hooks, counters of
whatever kind.  Which of them, and where an optimizer keeps its own, cannot be known of an optimizer in general, so the
objects themselves are walked: containers, tensors and attributes, down to what cannot be changed.  Everything is put
back *in place*: whoever holds a tensor or a dictionary holds the same one afterwards.

What lies behind C++ (the buckets of a reducer, compiled graphs) and what is only found by running code (an iterator of
a data loader, a closure's variables) is not walked.
"""

from __future__ import annotations

import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as module_hooks
import torch.optim.optimizer as optimizer_hooks
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..optim.copies import to_the_end
from ..optim.distributed import local

# What does not change, what has no attributes that are its own, and what only code can tell about.
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType, types.MethodType),
    *(types.BuiltinFunctionType, types.GeneratorType, types.CodeType, types.FrameType, weakref.ref, Enum, partial),
    *(torch.dtype, torch.device, torch.Size),
)
_FOREIGN = (
    *("torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch._C", "torch.fx", "torch.utils.data"),
    *("lightning", "pytorch_lightning", "accelerate", "transformers.trainer"),
)
_INSIDE = (Tensor, nn.Module, MutableMapping, list, deque, set, tuple, torch.Generator, np.ndarray)


class Kept:
    """What was kept.

    Args:
        *roots: The objects to walk from.
    """

    def __init__(self, *roots: Any) -> None:
        self._walked: dict[int, Any] = {}  # and held, so that no other object takes its place in memory
        self._undo: list[Callable[[], Any]] = [*_streams()]
        self.add(*roots)
        self._undo += [partial(self._refill_hooks, table, dict(table)) for table in _hook_tables()]

    def add(self, *roots: Any) -> None:
        """Keep more, as it is now; what was kept before stays as it was kept.

        Args:
            *roots: The objects to walk from.
        """
        waiting = deque((root, True) for root in roots)
        while waiting:
            thing, deep = waiting.pop()
            if isinstance(thing, _LEAVES) or id(thing) in self._walked or not (deep or isinstance(thing, _INSIDE)):
                continue
            self._walked[id(thing)] = thing
            # A module may know its trainer, and that the data: of what it holds, containers and tensors only.
            deep = deep and not isinstance(thing, nn.Module)
            further = [(part, deep) for part in self._kept(thing)]
            waiting.extend(further) if deep else waiting.extendleft(further)

    def restore(self) -> None:
        """Put everything back, to the end even if interrupted."""
        to_the_end(self._restore)

    def _restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for undo in self._undo:
                undo()
        torch.clear_autocast_cache()

    def _refill_hooks(self, table: dict[Any, Any], hooks: dict[Any, Any]) -> None:
        """Of all modules or optimizers: without new ones, and with those of what was kept.

        Other objects may have died meanwhile and have taken their hooks along.
        """
        for key in [key for key in table if key not in hooks]:
            del table[key]
        if any(key not in table and id(getattr(hook, "__self__", None)) in self._walked for key, hook in hooks.items()):
            alive = {
                key: hook
                for key, hook in hooks.items()
                if key in table or id(getattr(hook, "__self__", None)) in self._walked
            }
            _refill_mapping(table, alive)

    def _kept(self, thing: Any) -> list[Any]:
        """Keep one object, and return what is to be kept of it beyond that."""
        if isinstance(thing, Tensor):
            return self._kept_tensor(thing)
        if isinstance(thing, MutableMapping):
            entries = dict(thing)
            self._undo.append(partial(_refill_mapping, thing, entries))
            return [*(key for key in entries if isinstance(key, Tensor)), *entries.values(), *_attributes(thing)]
        if isinstance(thing, (list, deque)):
            items = list(thing)
            self._undo.append(partial(_refill_sequence, thing, items))
            return [*items, *_attributes(thing)]
        if isinstance(thing, set):
            members = set(thing)
            self._undo.append(partial(_refill_set, thing, members))
            return [*members]
        if isinstance(thing, (tuple, frozenset)):
            return [*thing]
        if isinstance(thing, torch.Generator):
            self._undo.append(partial(thing.set_state, thing.get_state()))
            return []
        if isinstance(thing, np.ndarray):
            self._undo.append(partial(np.copyto, thing, thing.copy()))
            return []
        if isinstance(thing, Dataset):
            return []
        if type(thing).__module__.startswith(_FOREIGN):
            return self._kept_wrapper(thing) if isinstance(thing, nn.Module) else _optimizers_in(thing)
        return _attributes(thing)

    def _kept_tensor(self, tensor: Tensor) -> list[Any]:
        """Keep its values in its memory, and if it is a leaf, its gradient."""
        memory = local(tensor).detach()
        if not any(size > 1 and stride == 0 for size, stride in zip(memory.shape, _strides(memory), strict=False)):
            self._undo.append(partial(_refill_tensor, tensor, memory, memory.clone()))
        if not tensor.is_leaf:
            return _attributes(tensor)
        gradient, wanted = tensor.grad, tensor.requires_grad

        def undo() -> None:
            if tensor.requires_grad != wanted:
                tensor.requires_grad_(wanted)
            if tensor.grad is not gradient:
                tensor.grad = gradient

        self._undo.append(undo)
        return [*([] if gradient is None else [gradient]), *_attributes(tensor)]

    def _kept_wrapper(self, module: nn.Module) -> list[Any]:
        """Of a wrapper, whose other attributes mirror what lies behind C++: its mode, its hooks and what is inside."""
        self._undo.append(partial(_set_mode, module, module.training))
        tables = [value for key, value in vars(module).items() if key.endswith("_hooks")]
        return [module._modules, module._parameters, module._buffers, *tables]


def _attributes(thing: Any) -> list[Any]:
    """The dictionary of its attributes, in a list; an empty list if it has none."""
    found = getattr(thing, "__dict__", None)
    return [found] if isinstance(found, dict) else []


def _optimizers_in(thing: Any) -> list[Any]:
    """Of a framework's object: the optimizers and scalers that it wraps."""
    kinds = (torch.optim.Optimizer, torch.amp.GradScaler)
    return [value for value in getattr(thing, "__dict__", {}).values() if isinstance(value, kinds)]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of a tensor; none if it is not strided."""
    return tensor.stride() if tensor.layout is torch.strided else ()


def _refill_mapping(mapping: MutableMapping[Any, Any], entries: dict[Any, Any]) -> None:
    """The same entries in the same order; nothing is touched where nothing has changed."""
    same = len(mapping) == len(entries) and all(
        a is b and mapping[a] is value for a, (b, value) in zip(mapping, entries.items(), strict=True)
    )
    if not same:
        mapping.clear()
        mapping.update(entries)


def _refill_sequence(sequence: list[Any] | deque[Any], items: list[Any]) -> None:
    """The same items."""
    if len(sequence) != len(items) or any(a is not b for a, b in zip(sequence, items, strict=True)):
        sequence.clear()
        sequence.extend(items)


def _refill_set(found: set[Any], members: set[Any]) -> None:
    """The same members."""
    found.clear()
    found.update(members)


def _refill_tensor(tensor: Tensor, memory: Tensor, values: Tensor) -> None:
    """The same values in the same memory."""
    memory.copy_(values)
    if memory.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter):
        moved = tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape
        if moved or tensor.stride() != memory.stride() or tensor.dtype != memory.dtype:
            tensor.data = memory  # somebody has given it other memory


def _set_mode(module: nn.Module, training: bool) -> None:
    """Of this module alone."""
    module.training = training


def _hook_tables() -> list[Any]:
    """The hooks on all modules and on all optimizers."""
    tables = [vars(module_hooks), vars(optimizer_hooks)]
    return [
        value
        for table in tables
        for name, value in table.items()
        if name.startswith("_global_") and isinstance(value, dict)
    ]


def _streams() -> Iterator[Callable[[], Any]]:
    """What sets the global random streams back."""
    yield partial(random.setstate, random.getstate())
    yield partial(np.random.set_state, np.random.get_state())
    yield partial(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
