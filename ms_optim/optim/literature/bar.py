r"""BAR: balancedness-aware regularisation, what SAM does to the balance of two factors, without its second pass.

For a function of x yᵀ the difference ‖x‖² − ‖y‖² does not move under gradient flow, and moves under SAM as the
difference of the gradients' norms does.  Before each step of the base optimizer a pair is multiplied by 1 ± a · lr:

    nBAR   if ‖g_x‖ ≥ ‖g_y‖:  x ← (1 + a lr) x ,  y ← (1 − a lr) y ;  else the other way around
    oBAR   if ‖x‖ ≥ ‖y‖:      x ← (1 − a lr) x ,  y ← (1 + a lr) y ;  else the other way around

Pairs are given, as the two factors of a LoRA module, or are those of the network's scale group: what a generator
moves up and what it moves down.  One pass.

Source: Li et al., arXiv 2410.14802, Algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import OptimizerError
from ..copies import to_the_end
from ..distributed import local
from ..engine import Plan, SharpnessAware
from ..gradients import inner
from ..requirements import require_nonnegative

Pair = tuple[Sequence[Tensor], Sequence[Tensor]]


def bar_factors(
    norm_of_first: float, norm_of_second: float, rate: float, kind: Literal["n", "o"]
) -> tuple[float, float]:
    """The two factors of a pair.

    Args:
        norm_of_first: ‖g_x‖ for nBAR, ‖x‖ for oBAR.
        norm_of_second: The same of y.
        rate: a · lr.
        kind: ``"n"`` or ``"o"``.

    Returns:
        Of x, and of y.
    """
    up = (norm_of_first >= norm_of_second) == (kind == "n")
    return (1.0 + rate, 1.0 - rate) if up else (1.0 - rate, 1.0 + rate)


class BAR(SharpnessAware):
    r"""The base optimizer after :math:`x ← (1 ± a\,lr) x,\; y ← (1 ∓ a\,lr) y` on every pair; one pass.

    Args:
        model_or_params: The model, or parameters or groups with ``model=`` beside them.
        base: The class of the optimizer that descends.
        strength: a ≥ 0; 0 is the base optimizer. The paper lets it fall to 0 over the run.
        pairs: Two factors each: a parameter, or several, on either side. A pair of which one is frozen, or without a
            gradient in a step, is left alone.
        kind: ``"n"``: by the norms of gradients, ``"o"``: of weights.
        **options: ``model`` and what goes with it (see :class:`SharpnessAware`), and the base optimizer's own
            arguments, such as ``lr``.

    Raises:
        OptimizerError: If a parameter is not the model's, or a pair not the optimizer's.
        ValueError: If a number or the kind is out of range.

    Source: arXiv 2410.14802, Algorithms 1 (n) and 2 (o).
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        strength: float = 0.1,  # a
        pairs: Iterable[tuple[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor]]] = (),
        kind: Literal["n", "o"] = "n",
        **options: Any,
    ) -> None:
        if kind not in ("n", "o"):
            raise ValueError(f"kind must be 'n' or 'o', got {kind!r}")
        require_nonnegative("strength", strength)
        super().__init__(model_or_params, base, {"strength": strength}, **options)
        self.kind = kind
        self._positions = [(self._places(x), self._places(y)) for x, y in pairs]
        if any(set(x) & set(y) for x, y in self._positions):
            raise OptimizerError("a pair has the same parameter on both sides, where its two factors would cancel")
        if not self._positions:
            raise OptimizerError(
                "BAR was given no pairs; pass pairs=[(x, y), ...], the two factors of each LoRA module, say, or "
                "ms_optim.optim.literature.bar.pairs_of(group, model) for those of a network's scale group"
            )
        self.take_loops()

    def _places(self, side: Tensor | Sequence[Tensor]) -> list[int]:
        """Where the parameters of one side are."""
        places = {id(p): i for i, p in enumerate(self.parameters())}
        side = [side] if isinstance(side, Tensor) else list(side)
        if len({id(p) for p in side}) < len(side):
            raise OptimizerError("a side of a pair holds a parameter twice; name each once")
        missing = [tuple(p.shape) for p in side if id(p) not in places]
        if missing or not side:
            raise OptimizerError(f"a pair holds tensors that are not parameters of this optimizer: shapes {missing}")
        return [places[id(p)] for p in side]

    def plan(self) -> Plan:
        """See the base class."""
        yield None

    def descend(self) -> None:
        """Balance the pairs, then the base optimizer's step."""
        if self.active:
            parameters = self.parameters()
            self.backup.take([parameters[i] for i in sorted({i for x, y in self._positions for i in (*x, *y)})])
            try:
                for x, y in self._positions:
                    self._balance(x, y)
            except BaseException:
                to_the_end(self.backup.put_back)
                raise
        super().descend()

    def _balance(self, x: list[int], y: list[int]) -> None:
        """One pair."""
        parameters, strength = self.parameters(), self.setting("strength")
        if any(not parameters[i].requires_grad or parameters[i].grad is None for i in (*x, *y)):
            return  # (to move only the other one would change the function)
        rates = [float(entry["lr"]) for entry in self.param_groups for _ in entry["params"]]
        source = self.gradients() if self.kind == "n" else [p.detach() for p in parameters]
        norms = []
        for side in (x, y):
            part = [source[i] for i in side]
            norms.append(math.sqrt(inner(part, part, [1.0] * len(part))))
        if not all(math.isfinite(norm) for norm in norms):
            return
        with torch.no_grad():
            for side, position in ((x, 0), (y, 1)):
                for i in side:
                    factors = bar_factors(norms[0], norms[1], strength[i] * rates[i], self.kind)
                    local(parameters[i]).mul_(factors[position])


def pairs_of(group: Any, model: nn.Module) -> list[Pair]:
    """The two sides of every generator of a scale group: what it moves up, and what it moves down.

    Args:
        group: A :class:`ms_optim.ScaleGroup`.
        model: Its model.

    Returns:
        Pairs for :class:`BAR`; generators that move one way only (before a normaliser) are left out.
    """
    parameters = dict(model.named_parameters())
    pairs: list[Pair] = []
    for generator in group.generators:
        up = [parameters[name] for name, a in zip(group.parameters, generator.tolist(), strict=True) if a > 0]
        down = [parameters[name] for name, a in zip(group.parameters, generator.tolist(), strict=True) if a < 0]
        if up and down:
            pairs.append((up, down))
    return pairs
