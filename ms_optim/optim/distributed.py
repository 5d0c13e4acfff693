"""Distributed: what the ranks of a run have to agree on, and what is sharded over them.

Data parallelism (``DistributedDataParallel``): every rank has all weights and a part of the batch.  Whether gradients
are averaged is decided at *forward* time, so a pass that is to stay local is not synchronised from its beginning.

Sharding (``fully_shard``, FSDP2): every rank has a part of each weight, a ``DTensor``.  Sums over entries are completed
over the mesh, one number at a time; to measure the network, its weights are gathered for a moment.

Both: the representative of the weights comes from traces over the samples of all ranks, and is one and the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..curvature.parallel import ProcessGroup, sum_over_ranks
from ..errors import UnsupportedError

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch was built without it: nothing is sharded
    DTensor = ()  # type: ignore[assignment, misc]

GroupChoice = ProcessGroup | Literal["auto"] | None


class Ranks:
    """The ranks that train one model together.

    Where there is neither a wrapper nor a mesh, gradients may still be averaged, by hand or by an engine such as
    DeepSpeed's, and nothing shows it.  Ranks that then did not agree would drift apart without a word, so all are taken
    to train together; those that do not have to say so.

    Args:
        modules: The modules as they were given, wrapped for data parallelism or not.
        choice: Their process group. ``"auto"``: that of the wrapper, that of the mesh over which the parameters are
            sharded, if it has one dimension, else all ranks of the default group; ``None``: this process alone.
    """

    # What was found in the modules, where it is looked for once a step: that takes as long as some collectives.
    _wrappers: list[nn.parallel.DistributedDataParallel] | None = None
    _group: ProcessGroup = None

    def __init__(self, modules: list[nn.Module], choice: GroupChoice = "auto") -> None:
        self.modules = modules
        self.choice = choice

    def __getstate__(self) -> dict[str, Any]:
        """A process group belongs to its process."""
        return {"modules": self.modules, "choice": self.choice if self.choice in ("auto", None) else "auto"}

    @property
    def group(self) -> ProcessGroup | None:
        """Their process group; ``None`` where this process trains alone."""
        if self.choice is None or not dist.is_available() or not dist.is_initialized():
            return None
        group = self.choice
        if group == "auto":
            if self._group is None:
                self._group = self._find_group()
            group = self._group
        return group if dist.get_world_size(group) > 1 else None

    def _find_group(self) -> ProcessGroup:
        """What ``"auto"`` is."""
        wrappers = self.wrappers()
        if wrappers:
            return wrappers[0].process_group
        sharded = (p for given in self.modules for p in given.parameters() if isinstance(p, DTensor))
        meshes = {p.device_mesh for p in sharded}
        mesh = meshes.pop() if len(meshes) == 1 else None
        return mesh.get_group() if mesh is not None and mesh.ndim == 1 else dist.group.WORLD

    def wrappers(self) -> list[nn.parallel.DistributedDataParallel]:
        """The wrappers that average gradients."""
        if self._wrappers is None:
            kind, parts = nn.parallel.DistributedDataParallel, (m for given in self.modules for m in given.modules())
            self._wrappers = list(dict.fromkeys(part for part in parts if isinstance(part, kind)))
        return self._wrappers

    def look_again(self) -> None:
        """Forget what was found: a model may have been wrapped, or sharded, since."""
        self._wrappers = self._group = None

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Gradients of forward passes inside stay those of this rank."""
        with ExitStack() as stack:
            for wrapper in self.wrappers():
                stack.enter_context(wrapper.no_sync())
            yield

    def average_(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace tensors by their mean over the ranks, in one call per dtype and device; nothing of what is sharded.

        Args:
            tensors: Equal in shapes on all ranks; ``None`` entries are left out.
        """
        group = self.group
        if group is None:
            return
        own = [tensor for tensor in tensors if tensor is not None and not isinstance(tensor, DTensor)]
        if any(tensor.is_sparse for tensor in own):
            raise UnsupportedError(
                "a sparse gradient cannot be averaged over ranks here; build the layer with sparse=False"
            )
        with torch.no_grad():
            sum_over_ranks(own, group)
            if own:
                torch._foreach_div_(own, dist.get_world_size(group))

    def of_first(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The same tensor on all ranks: the first one's.

        Args:
            tensor: On the CPU, equal in shape on all ranks.
            device: Where the group communicates.

        Returns:
            A tensor on the CPU.
        """
        group = self.group
        if group is None:
            return tensor
        sent = tensor.to(device, copy=True)
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        return sent.cpu()

    def largest(self, values: list[float], device: torch.device) -> list[float]:
        """The largest of each number over the ranks.

        Args:
            values: Numbers.
            device: Where the group communicates.

        Returns:
            As many.
        """
        group = self.group
        if group is None or not values:
            return values
        sent = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sent, dist.ReduceOp.MAX, group=group)
        return list(sent.tolist())


def inside_wrapper() -> bool:
    """Whether a forward pass of ``DistributedDataParallel`` is under way that averages gradients."""
    active = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    return active is not None and bool(active.require_backward_grad_sync)


def mixed_seed(seed: int, steps: int, index: int = 0) -> int:
    """A seed for one step and one part, the same on every rank that asks for it.

    Args:
        seed: Of the run.
        steps: The number of the step.
        index: Of the part.

    Returns:
        A number below 2^63.
    """
    mixed = seed
    for part in (steps, index):  # a multiplicative congruential step, by Knuth's constant
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return mixed


def whole(number: Tensor) -> Tensor:
    """A reduction over all of a tensor, wherever its parts lie."""
    return number.full_tensor() if is_sharded([number]) else number  # type: ignore[attr-defined]


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether a tensor is the part of a larger one.

    Args:
        tensors: Parameters, say.

    Returns:
        Whether there is a ``DTensor`` among them.
    """
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory.

    Args:
        tensor: Sharded or not.

    Returns:
        A plain tensor.
    """
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def completed(squares: Sequence[Tensor], tensors: Sequence[Tensor]) -> float:
    """The sum of numbers, each of which is a sum over this rank's entries of a tensor, over all entries.

    Args:
        squares: One number per tensor, float64.
        tensors: The tensors, sharded or not.

    Returns:
        The sum.
    """
    kinds: dict[Any, list[Tensor]] = {}
    for square, tensor in zip(squares, tensors, strict=True):
        where = (tensor.device_mesh, tuple(tensor.placements)) if isinstance(tensor, DTensor) else None
        kinds.setdefault(where, []).append(square)
    total = 0.0
    for where, parts in kinds.items():
        number = torch.stack(parts).sum()
        if where is not None:
            mesh, placements = where
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    dist.all_reduce(number, group=mesh.get_group(dimension))
        total += float(number)
    return total


def as_shard_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the shape in which a parameter's gradient is held.

    Args:
        tensor: Whole, and equal on all ranks.
        parameter: Sharded or not.

    Returns:
        The same, or its ``DTensor``.
    """
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def shard_index(parameter: Tensor) -> int:
    """Which part of a tensor this rank has: a number that is equal where parts are.

    Args:
        parameter: Sharded or not.

    Returns:
        0 for what is not sharded.
    """
    if not isinstance(parameter, DTensor):
        return 0
    index, mesh = 0, parameter.device_mesh
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard():
            index = index * mesh.size(dimension) + mesh.get_local_rank(dimension) + 1
    return index


def reshard(model: nn.Module) -> None:
    """Forget gathered weights, which would not see that their shards have changed.

    Args:
        model: A module; nothing happens if it is not sharded.
    """
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


@contextmanager
def gathered(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Put whole weights in the place of sharded ones, and take the sharding's own hooks off, for a measurement.

    Every rank has all weights inside, as if they were not sharded; nothing else does (their gradients are not kept).

    Args:
        model: The module; nothing happens if it is not sharded.

    Yields:
        The whole weights that were put in, by name.
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
    whole: dict[int, nn.Parameter] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    try:
        for module in model.modules():
            for name, p in module._parameters.items():
                if isinstance(p, DTensor):
                    if id(p) not in whole:
                        whole[id(p)] = nn.Parameter(p.full_tensor().detach(), requires_grad=p.requires_grad)
                    held.append((module, name, p))
            if _is_fully_sharded(module):
                for table in (module._forward_pre_hooks, module._forward_hooks):
                    hooks.append((table, dict(table)))
                    for key, hook in list(table.items()):
                        owner = type(getattr(hook, "__self__", hook)).__module__
                        if owner.startswith("torch.distributed") or "fsdp" in getattr(hook, "__module__", ""):
                            del table[key]
        for module, name, p in held:
            module._parameters[name] = whole[id(p)]
        yield {names[key]: p for key, p in whole.items()}
    finally:
        for module, name, p in held:
            module._parameters[name] = p
        for table, kept in hooks:
            table.clear()
            table.update(kept)


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to it."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")
