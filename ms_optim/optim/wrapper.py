"""Wrapper: an optimizer around another, with which it shares its parameter groups and its state.

Hence schedulers, ``add_param_group`` and checkpoints see one thing.  Everything per parameter is a list in the order of
the groups: names, gradients, settings such as ρ, the scales of the representative.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from ..balancing import Balance, NeuronBalance
from ..errors import OptimizerError
from ..symmetry import Group, LogScales, multiply_
from .distributed import is_sharded
from .requirements import Rebalance, require_nonnegative, require_real_parameters

if TYPE_CHECKING:
    from .engine import SharpnessAware
    from .representative import Representative


class Part:
    """A part of an optimizer, which it looks at but does not keep alive: a dropped optimizer frees its memory at once.

    Args:
        optimizer: Whose part it is.
    """

    def __init__(self, optimizer: SharpnessAware) -> None:
        self.belongs_to(optimizer)

    def belongs_to(self, optimizer: SharpnessAware) -> None:
        """Become the part of another optimizer, as of a copy."""
        self._optimizer: weakref.ReferenceType[SharpnessAware] | None = weakref.ref(optimizer)

    @property
    def optimizer(self) -> SharpnessAware:
        """Whose part it is."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            raise OptimizerError("the optimizer that this belongs to is gone; keep it as long as its passes are used")
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        """All but the optimizer, whose copy takes its copy of this."""
        return {**vars(self), "_optimizer": None}


class Wrapper(Optimizer):
    """What an optimizer knows of its parameters and of the optimizer that descends; abstract.

    Attributes:
        base: The optimizer that descends.
        model: The plain module that owns the parameters; ``None`` while it is not known.
        representative: The balance of the model, and when it is found again.
        kept: The gradients of the step before, if the plan wants them.
    """

    base: Optimizer
    model: nn.Module | None
    representative: Representative
    kept: list[Tensor | None]
    _settings: dict[str, float]
    _names: list[str]
    _constructed: bool

    @property
    def rebalance(self) -> Rebalance:
        """``"rows"``, ``"move"``, ``"metric"`` or ``None``."""
        return self.representative.rebalance

    @property
    def group(self) -> Group | None:
        """The scale group; ``None`` before it is discovered."""
        return self.representative.group

    @property
    def balance(self) -> Balance | NeuronBalance | None:
        """What the last refresh found."""
        return self.representative.balance

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks."""
        return dist.is_available() and dist.is_initialized() and is_sharded(self.parameters())

    def parameters(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [p for entry in self.param_groups for p in entry["params"]]

    def names(self) -> list[str]:
        """Their names in the model (group and position, without a model)."""
        return self._names

    def setting(self, key: str) -> list[float]:
        """A group setting (``rho``, ``strength``), per parameter.

        Args:
            key: Its name.

        Returns:
            One number per parameter.

        Raises:
            ValueError: If a schedule has made it negative.
        """
        for entry in self.param_groups:
            require_nonnegative(key, entry[key])
        return [float(entry[key]) for entry in self.param_groups for _ in entry["params"]]

    def scales(self, which: Literal["log_scale", "weights", "trace_weights"]) -> list[float]:
        """A field of the balance, per parameter; what an unbalanced optimizer has where there is none.

        Args:
            which: The field.

        Returns:
            One number per parameter.
        """
        neutral = 1.0 if which in ("weights", "trace_weights") else 0.0
        # (The weights of single units are where they are balanced: each of these is neutral there.)
        if self.balance is None or isinstance(self.balance, NeuronBalance):
            return [neutral] * len(self.parameters())
        values: dict[str, float] = getattr(self.balance, which)
        return [values.get(name, neutral) for name in self._names]

    def pulls(self) -> list[float | Tensor]:
        """What multiplies 2 W_p in the regulariser's gradient, per parameter: a number, or one for every row."""
        if self.balance is None:
            return [0.0] * len(self.parameters())
        values: Mapping[str, float | Tensor] = self.balance.pulls
        found = [values.get(name, 0.0) for name in self._names]
        pairs = zip(found, self.parameters(), strict=True)
        return [value.to(p) if isinstance(value, Tensor) else value for value, p in pairs]

    def signs(self) -> list[float]:
        """−1 for parameters along whose gradient the base optimizer ascends (``maximize``), else 1."""
        return [-1.0 if entry.get("maximize", False) else 1.0 for entry in self.param_groups for _ in entry["params"]]

    def radii(self) -> list[float]:
        """ρ per parameter, negative where the base optimizer ascends: there the objective is −L."""
        return [rho * sign for rho, sign in zip(self.setting("rho"), self.signs(), strict=True)]

    def momentum(self) -> list[Tensor | None]:
        """The base optimizer's running average of gradients, per parameter; ``None`` where there is none yet."""
        states = [self.base.state.get(p, {}) for p in self.parameters()]
        return [state.get("momentum_buffer", state.get("exp_avg")) for state in states]

    def previous_gradients(self) -> list[Tensor | None]:
        """The gradients that the step before descended along, per parameter; ``None`` where there was none."""
        return self.kept + [None] * (len(self.parameters()) - len(self.kept))

    def gradients(self) -> list[Tensor | None]:
        """``.grad`` of each parameter: what the last pass found."""
        return [p.grad for p in self.parameters()]

    def rescale_kept(self, log_scale: Mapping[str, LogScales]) -> None:
        """Move the gradients that are kept along with the weights: by e^{-a}.

        Args:
            log_scale: a, by parameter name: a number, or terms that broadcast.
        """
        with torch.no_grad():
            for name, grad in zip(self._names, self.kept, strict=False):
                if grad is not None and log_scale.get(name):
                    multiply_(grad, log_scale[name], -1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see :meth:`torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: As in torch; ``rho`` or ``strength`` may be given.

        Raises:
            OptimizerError: If a parameter is not the model's.
        """
        if not self._constructed:
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        # A generator can be read once; torch reads it after us. (A set stays one: torch refuses it.)
        params = given if isinstance(given, (Tensor, set)) else list(given)
        param_group = {**self._settings, **param_group, "params": params}
        self._check_group(param_group)
        self.base.add_param_group(param_group)
        self._share()

    def _share(self) -> None:
        """One list of groups and one state for both optimizers: torch replaces them on loading."""
        self.param_groups, self.state = self.base.param_groups, self.base.state
        if self.model is None:
            sizes = enumerate(len(entry["params"]) for entry in self.param_groups)
            self._names = [f"{g}.{i}" for g, size in sizes for i in range(size)]
        else:
            known = {id(p): name for name, p in self.model.named_parameters()}
            self._names = [known.get(id(p), "") for p in self.parameters()]

    def signature(self) -> list[list[list[str]]]:
        """Per group, the name and shape of each parameter."""
        names = iter(self._names)
        return [[[next(names), str(tuple(p.shape))] for p in entry["params"]] for entry in self.param_groups]

    def _check_group(self, entry: dict[str, Any]) -> None:
        """Refuse settings out of range, complex parameters and parameters that are not the model's."""
        for key in self._settings:
            require_nonnegative(key, entry[key])
        given = entry["params"]
        require_real_parameters([given] if isinstance(given, Tensor) else given, self.model)
