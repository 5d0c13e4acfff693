"""Sharding: weights spread over ranks (FSDP2), and the whole of them for a checkpoint and back.

A checkpoint of a sharded run is that of a plain one: whole tensors under the plain names, so either can go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch built without torch.distributed
    DTensor = None  # type: ignore[assignment,misc]


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Shard a model over all ranks in place, block by block where it has sequences of blocks.

    Args:
        model: The module.
        device: Where it is.
        world: The number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    for module in list(model.modules()):
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and module is not model:
            for block in module.children():
                if not isinstance(block, (nn.Sequential, nn.ModuleList)) and _owns_weights(block):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _owns_weights(block: nn.Module) -> bool:
    """Whether it has weights enough to be worth a message of their own."""
    return sum(p.numel() for p in block.parameters()) >= 10_000


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of a model, its shards put together; every rank has to ask.

    Args:
        model: The plain module, sharded or not.

    Returns:
        Name → whole tensor.
    """
    return {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()}


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put whole weights into a model, sharded or not.

    Args:
        model: The plain module.
        state: As of :func:`whole_model`.
    """
    own = model.state_dict()
    model.load_state_dict({name: _like(tensor, own.get(name)) for name, tensor in state.items()})


def whole(value: Any) -> Any:
    """The same containers with shards put together; every rank has to ask.

    Args:
        value: As of ``optimizer.state_dict()``.

    Returns:
        A copy.
    """
    if _is_shard(value):
        return value.full_tensor().detach()
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(each) for each in value)
    return value


def spread(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimizer's whole state, spread as its parameters are.

    Args:
        state: As of :func:`whole`.
        parameters: The optimizer's, in the order of its groups.

    Returns:
        A copy.
    """
    if not any(_is_shard(p) for p in parameters):
        return state
    entries = {
        index: {key: _like(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    spread_state = {**state, "state": entries}
    own = state.get("ms_optim")
    if own is not None:
        pairs = zip(own["kept"], parameters, strict=False)
        spread_state["ms_optim"] = {**own, "kept": [_like(value, p) for value, p in pairs]}
    return spread_state


def _is_shard(value: Any) -> bool:
    return DTensor is not None and isinstance(value, DTensor)


def _like(value: Any, other: Any) -> Any:
    """A whole tensor spread as another of its shape is."""
    if not _is_shard(other) or not isinstance(value, Tensor) or value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
