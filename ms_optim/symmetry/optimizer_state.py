"""How an optimizer's state moves when its parameters are rescaled.

If W moves by e^a, a gradient moves by e^{-a}; a momentum or a first moment, being a sum of gradients, by e^{-a}; a
second moment, being a sum of their squares, by e^{-2a}.  State that is not in the table is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UnsupportedError

#: Optimizer -> key of its state -> k, where the state moves by e^{ka}. Exact classes only: a subclass may keep
#: something else under the same names.
STATE_EXPONENTS: dict[type[torch.optim.Optimizer], dict[str, int]] = {
    torch.optim.SGD: {"momentum_buffer": -1},
    torch.optim.Adam: {"step": 0, "exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    torch.optim.AdamW: {"step": 0, "exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
}


def moving_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> list[tuple[str, str, Tensor, int]]:
    """The tensors of an optimizer's state that move with a model's parameters; nothing is changed here.

    Args:
        optimizer: The optimizer, or a wrapper that holds it as ``base``.
        names: The model's parameters, with their names; others the optimizer may have are left alone.

    Returns:
        Name of the parameter, key of the state, the tensor, and k: it moves by e^{ka} if the parameter moves by e^a.

    Raises:
        UnsupportedError: If one of the parameters has state that is not in ``STATE_EXPONENTS``.
    """
    base = getattr(optimizer, "base", None)
    optimizer = base if isinstance(base, torch.optim.Optimizer) else optimizer
    known = STATE_EXPONENTS.get(type(optimizer), {})
    moving = []
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            continue
        for key, value in state.items():
            if key not in known:
                supported = ", ".join(kind.__name__ for kind in STATE_EXPONENTS)
                raise UnsupportedError(
                    f"{type(optimizer).__name__} keeps {key!r} for {names[parameter]}, and it is not known how that "
                    f"moves with the parameter's scale; use {supported}, or rescale before the optimizer's first step"
                )
            if isinstance(value, Tensor) and known[key]:
                moving.append((names[parameter], key, value, known[key]))
    return moving
