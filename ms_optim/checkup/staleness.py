"""Staleness: whether a forward pass under autocast was computed with the weights that are there.

Autocast keeps a low-precision copy of each weight for the life of its outermost block, and does not see that the
weight is changed in place.  What that cache holds can be seen by its effect alone: the model is run twice more without
it, from the same random streams, on copies of the buffers, and without anybody's hooks.  Outputs that are off by more
than those two runs differ were not computed with these weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..optim.randomness import Streams
from .observation import Forward

_OFF = 4.0  # times the difference of two equal runs


def staleness(
    model: nn.Module, forward: Forward, parameters: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float:
    """How far the outputs of a forward pass are from those of the weights that are there.

    Args:
        model: The model, just after the pass.
        forward: What was seen of it.
        parameters: Its parameters.
        args: What it was called with.
        kwargs: The same, by name.

    Returns:
        The largest difference, beyond what two equal runs differ by; 0 where there is none, or it cannot be told.
    """
    tables = [table for module in model.modules() for table in (module._forward_pre_hooks, module._forward_hooks)]
    hooks, now = [dict(table) for table in tables], Streams.now(parameters)
    names = [name for name, _ in model.named_buffers()]
    kind = parameters[0].device.type
    fresh: list[list[Tensor]] = []
    try:
        for table in tables:
            table.clear()
        for _ in range(2):
            forward.stream.restore()
            buffers = {name: value.clone() for name, value in zip(names, forward.buffers, strict=True)}
            copies = iter([tensor.clone() for tensor in forward.inputs])
            leaves, structure = tree_flatten((args, kwargs))
            leaves = [next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            again, named = tree_unflatten(leaves, structure)
            cast = torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
            with cast, torch.no_grad():
                fresh.append(outputs_of(functional_call(model, buffers, again, named)))
    except Exception:  # noqa: BLE001 - a model that cannot be run again tells nothing
        return 0.0
    finally:
        for table, kept in zip(tables, hooks, strict=True):
            table.update(kept)
        now.restore()
    off = _largest_difference(forward.outputs, fresh[0])
    return off if off > _OFF * _largest_difference(*fresh) else 0.0


def outputs_of(output: Any) -> list[Tensor]:
    """Copies of the floating-point tensors in what a model returned; of its loss alone, if it says which that is.

    Args:
        output: What it returned.

    Returns:
        The tensors.
    """
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    found = [loss] if isinstance(loss, Tensor) else tree_leaves(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor) and output[0].numel() == 1:
        found = [output[0]]
    return [leaf.detach().clone() for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Between entries; infinite between different shapes."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    gaps = [(x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True) if x.numel()]
    return max((gap for gap in gaps if math.isfinite(gap)), default=0.0)
