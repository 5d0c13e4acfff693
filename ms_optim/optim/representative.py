r"""Representative: where a network stands among its equivalents, found again every so many steps.

A *refresh* discovers the scale group (once), traces, solves, and with ``rebalance="move"`` rescales the weights to the
minimiser, together with the base optimizer's state and everything else that is kept per weight.  With ``"rows"`` it
rescales them to where the rows of all layers have one size, and the minimiser is a metric there.  With several ranks
the traces are those of all their samples, and all go to the same place.

Source: arXiv 2106.12612, Thm 1, per batch.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..balancing import Balance, NeuronBalance, balance, balance_neurons, row_balance
from ..balancing.rebalance import Granularity
from ..batch import Batch
from ..curvature import hessian_diagonal, hessian_trace
from ..errors import NoEffectWarning, UnsupportedError
from ..symmetry import Group, LogScales, NeuronGroup, ScaleGroup, neuron_symmetries, scale_symmetries
from .distributed import gathered, reshard
from .gradient_pass import Snapshot
from .requirements import MOVING, Rebalance
from .wrapper import Part

if TYPE_CHECKING:
    from .engine import SharpnessAware

# A normaliser's ε stands still while its input is rescaled, so the traces of a badly scaled network are those of a
# slightly different function. Measured again at the representative they are right: the first refresh is repeated, and
# each round takes the difference between equivalent starts from 1e-2 to 1e-6 to rounding.
_FIRST_ROUNDS = 4

RescaleHook = Callable[[Group, Tensor], Any]


class Representative(Part):
    """The balance of an optimizer's model, and when it is found again.

    Args:
        optimizer: The optimizer.
        rebalance: ``"move"``, ``"rows"``, ``"metric"`` or ``None``.
        every: Steps between refreshes.
        columns: Exact columns per sample in the traces; ``None`` is exact.
        gauge: κ.
        granularity: Whether layers or single hidden units are rescaled.
        group: The scale group; ``None``: discovered at the first refresh.

    Attributes:
        balance: What the last refresh found; ``None`` before the first, and where there is no symmetry to use.
        log_scale: By how much the last refresh rescaled each parameter, or would have (``"metric"``); on average over
            its rows and columns, for single units.
        due: Steps until the next refresh.
    """

    def __init__(
        self,
        optimizer: SharpnessAware,
        rebalance: Rebalance,
        every: int,
        columns: int | None,
        gauge: float,
        granularity: Granularity,
        group: Group | None,
    ) -> None:
        super().__init__(optimizer)
        self.rebalance, self.every, self.columns, self.gauge, self.group = rebalance, every, columns, gauge, group
        self.granularity: Granularity = granularity
        self.balance: Balance | NeuronBalance | None = None
        self.log_scale: dict[str, float] = {}
        self.due = 0
        self._subgroups: dict[frozenset[str], Group] = {}
        self._hooks: OrderedDict[int, RescaleHook] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """A hook carries along something of the original's, as an average of its weights."""
        return {**super().__getstate__(), "_hooks": OrderedDict()}

    @property
    def moves(self) -> bool:
        """Whether refreshes rescale the weights."""
        return self.rebalance in MOVING

    @property
    def identity(self) -> list[Any]:
        """Which representative it is, for a checkpoint."""
        return [self.rebalance, self.gauge] + ([] if self.granularity == "layer" else [self.granularity])

    def register_hook(self, hook: RescaleHook) -> RemovableHandle:
        """Have a function called whenever the weights were rescaled."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def announce(self, group: Group, t: Tensor) -> None:
        """Call the hooks."""
        for hook in tuple(self._hooks.values()):
            hook(group, t)

    def refresh(self, model: nn.Module, batch: Batch, before: Snapshot | None = None) -> Balance | NeuronBalance | None:
        """Find the representative of a model, and rescale with ``"move"`` or ``"rows"``; an exception changes nothing.

        Args:
            model: The plain module.
            batch: The batch.
            before: The state before the step, to go back to after an exception; ``None``: the state now.

        Returns:
            The balance; ``None`` if the model has no symmetry to use.
        """
        if self.group is None:
            with gathered(model):
                discover = scale_symmetries if self.granularity == "layer" else neuron_symmetries
                self.group = discover(model, batch)
        group = self._subgroup(model, self.group)
        if len(group) == 0:
            self.due, self.balance, self.log_scale = self.every, None, {}
            return None
        if before is None:
            before = Snapshot(self.optimizer, alone=True)
        if self.moves:
            before.keep_weights()
        stream = self.optimizer.generator.get_state()
        normalised = bool(group.statistics) or group.inexact_normalizers > 0
        repeat = self.moves and self.balance is None and normalised
        try:
            found, t = self._move(model, batch, group, before)
            for _ in range(_FIRST_ROUNDS - 1 if repeat else 0):
                self.optimizer.generator.set_state(stream)  # other signs would lead somewhere else each time
                weights = [p.detach().clone() for p in self.optimizer.parameters()]
                found, further = self._move(model, batch, group, before)
                t = t + further
                pairs = zip(weights, self.optimizer.parameters(), strict=True)
                if self._on_all_ranks(all(torch.equal(w, p) for w, p in pairs)):
                    break
        except BaseException:
            before.restore()
            raise
        self.due, self.balance = self.every, found
        scales = group.log_scale(t)
        self.log_scale = {n: float(a.mean()) if isinstance(a, Tensor) else a for n, a in scales.items()}
        if self.moves:
            reshard(model)
            self.optimizer.moved.append((group, t))
            self.announce(group, t)
        return found

    def _move(
        self, model: nn.Module, batch: Batch, group: Group, before: Snapshot
    ) -> tuple[Balance | NeuronBalance, Tensor]:
        """Measure, solve, and rescale unless it is the metric alone that is wanted."""
        optimizer, ranks = self.optimizer, self.optimizer.ranks
        found = self._balanced(model, batch, group)
        if not self.moves:
            return found, found.t
        device = optimizer.device
        wanted = found.t
        if self.rebalance == "rows":
            assert isinstance(group, ScaleGroup)
            with gathered(model):
                wanted = row_balance(model, group)
        t = ranks.of_first(group.bound(model, wanted, lambda limits: ranks.largest(limits, device)), device)
        bounded = not torch.equal(t, wanted)
        scales: dict[str, LogScales]
        if isinstance(group, NeuronGroup):
            assert isinstance(found, NeuronBalance)
            found = (found.at(group, t) if bounded else found).moved()
            scales = {name: list(parts) for name, parts in group.terms(t).items()}
        else:
            assert isinstance(found, Balance)
            found = found.moved(t) if self.rebalance == "rows" else (found.at(t) if bounded else found).moved()
            scales = dict(group.log_scale(t))
        group.rescale_(model, t, optimizer.base)
        if before.keeps_weights:
            before.rescalings.append(scales)
            before.note_versions()
        optimizer.rescale_kept(scales)
        return found, t

    def _balanced(self, model: nn.Module, batch: Batch, group: Group) -> Balance | NeuronBalance:
        """The balance of a model as it is: of layers by their traces, of single hidden units by the diagonal."""
        optimizer = self.optimizer
        if isinstance(group, NeuronGroup) and optimizer.sharded:
            raise UnsupportedError(
                "granularity='neuron' rescales rows and columns of whole parameters, and these are sharded over ranks; "
                "use granularity='layer', or DistributedDataParallel"
            )
        how: dict[str, Any] = {
            "statistics": "training",
            "generator": optimizer.generator,
            "process_group": optimizer.ranks.group,
            "max_memory": "pass",
        }
        with gathered(model):
            if isinstance(group, NeuronGroup):
                return balance_neurons(model, hessian_diagonal(model, batch, self.columns, **how), group, self.gauge)
            return balance(model, hessian_trace(model, batch, self.columns, **how), group, self.gauge)

    def _on_all_ranks(self, reached: bool) -> bool:
        """Whether it is so on every rank: they make the same number of measurements."""
        return not self.optimizer.ranks.largest([0.0 if reached else 1.0], self.optimizer.device)[0]

    def _subgroup(self, model: nn.Module, group: Group) -> Group:
        """The part of the group that moves only parameters this optimizer may move: trainable and its own."""
        own = {id(p) for p in self.optimizer.parameters()}
        fixed = frozenset(n for n, p in model.named_parameters() if id(p) not in own or not p.requires_grad)
        if fixed not in self._subgroups:
            self._subgroups[fixed] = group.fixing(fixed)
            if len(group) and not len(self._subgroups[fixed]):
                warnings.warn(
                    f"every scale symmetry of {type(model).__name__} moves a frozen parameter or one that this "
                    "optimizer does not have, so balancing changes nothing; unfreeze it, or pass all parameters",
                    NoEffectWarning,
                    stacklevel=2,
                )
        return self._subgroups[fixed]
