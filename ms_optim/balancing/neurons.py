r"""Balance of neurons: the canonical representative of a network under rescalings of single hidden units.

    MS(θ) = min_t Σ_p Σ_{j,i} C_p,ji e^{−2 a_p,ji(t)}

with C_p the exact diagonal of the parameter's Hessian block (summed over the positions of a kernel).  Which units the
sum decides, and which are *scale-free* or *dead*, is read off its graph (:mod:`~ms_optim.balancing.flow`).  In turn,

1. balanced units: the minimiser of the sum over the terms among them, by Osborne's updates and Newton's method
   (:mod:`~ms_optim.balancing.osborne`);
2. dead units, where they are tied to others by weights that are not 0: balanced norms, the minimiser of
   Σ W² e^{2a} over them;
3. what is left, scale-free units first of all: rows of norm 1, Σ_{incoming} W² e^{2a} = number of incoming rows, from
   the inputs to the outputs; a unit without any norm stays.

Each step depends on the network through what transforms under a rescaling as the network does, so equivalent networks
get one representative.  The value is the infimum: balanced terms at their minimum, plus the terms of scale-free units
at their pins; what dead units add can be made as small as one likes.

Without scale-free units the layer-wise minimum is one over a subgroup, so this one is never larger.  In front of a
normaliser both are conventions: Σ_j C_j N_j row by row here, (Σ_j C_j)(Σ_j N_j) / rows there, and either may be larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BalanceError
from ..symmetry.unit_group import NeuronGroup
from .flow import Block, blocks, restricted, strong_components
from .osborne import minimise
from .program import Mask, Matrix, Vector


@dataclass(frozen=True, eq=False)
class NeuronBalance:
    """The representative of a network whose single units are balanced; scales are natural logarithms.

    Attributes:
        t: ``[U]``, float64.
        log_scale: Parameter name → a_p(t), broadcasting to the parameter; the representative is e^{a_p} W_p.
        minimum_sharpness: The infimum of the trace over the group, with scale-free units at their pins.
        trace: Σ_p Σ C_p here.
        reached: The trace at t; larger than the minimum where units are dead on one side only.
        pulls: Parameter name → what multiplies 2 W_p in the regulariser's gradient at the representative: C_j / R_j on
            the rows of a scale-free unit j. Exact where its rows meet no other unit; else how one pin depends on
            another is left out.
        scale_free: ``[U]``, the units whose scale is pinned whatever the curvature.
        dead: ``[U]``, the units that have no curvature on one side.
        gauge: κ: 0 for traces, 1 for norms.
        residual: The largest imbalance |in − out| / (in + out) of a unit that was solved for.
        notes: What had to be decided by convention, in words.
    """

    t: Tensor
    log_scale: dict[str, Tensor]
    minimum_sharpness: float
    trace: float
    reached: float
    pulls: dict[str, Tensor]
    scale_free: Tensor
    dead: Tensor
    gauge: float
    residual: float
    notes: tuple[str, ...]
    _program: _Program | None = field(default=None, repr=False)

    def state(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors, for a checkpoint.

        Returns:
            What :meth:`from_state` reads.
        """
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_program"}
        return {**kept, "notes": list(self.notes)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> NeuronBalance:
        """Read what :meth:`state` wrote.

        Args:
            state: The state.

        Returns:
            The balance.
        """
        return cls(**{**state, "notes": tuple(state["notes"])})

    def moved(self) -> NeuronBalance:
        """What holds after the network itself went to the representative (``group.rescale_(model, balance.t)``).

        Returns:
            A balance with log-scales 0; its ``trace`` is the one that was reached.
        """
        still = {name: torch.zeros_like(a) for name, a in self.log_scale.items()}
        return replace(self, t=torch.zeros_like(self.t), log_scale=still, trace=self.reached, _program=None)

    def at(self, group: NeuronGroup, t: Tensor) -> NeuronBalance:
        """The same network with other scales than the best, where those had to be bounded.

        Args:
            group: The group.
            t: ``[U]``.

        Returns:
            A balance with the scales, pulls and trace of t; ``minimum_sharpness`` stays the minimum.

        Raises:
            BalanceError: If this balance was read from a checkpoint, or is one after its rescaling.
        """
        if self._program is None:
            raise BalanceError("this NeuronBalance is without the network's numbers; call balance_neurons again")
        vector, program = t.detach().cpu().double().numpy(), self._program
        return replace(
            self,
            t=t.detach().cpu().double(),
            log_scale=group.log_scale(t),
            reached=program.trace(vector) + program.constant,
            pulls=program.pulls(vector, self.scale_free.numpy()),
        )


def balance_neurons(
    model: nn.Module, diagonal: Mapping[str, Tensor], group: NeuronGroup, gauge: float = 0.0
) -> NeuronBalance:
    r"""Find the representative that minimises :math:`\sum_p \sum_{ji} C_{p,ji} e^{-2 a_{p,ji}}` over single units.

    Args:
        model: The network; only the squares of its weights are read.
        diagonal: C_p by parameter name, such as what ``hessian_diagonal`` returns.
        group: The group of the model's units.
        gauge: 0: traces decide; 1: norms decide, Σ W² e^{2a}, and the diagonal only says what the trace is.

    Returns:
        The balance. Nothing is moved.

    Raises:
        ValueError: If the gauge is neither 0 nor 1.
        BalanceError: If diagonals are missing, of another shape, negative or not finite.

    Source: arXiv 2106.12612, Theorem 1, for single units; Osborne, J. ACM 7 (1960).
    """
    if gauge not in (0.0, 1.0):
        raise ValueError(
            f"gauge must be 0 or 1 for single units, got {gauge}; 0 is the smallest trace, 1 balances norms, and what "
            "lies between is defined for layers only"
        )
    parameters = dict(model.named_parameters())
    moving = blocks(group)
    traces = _read(parameters, diagonal, group)
    tables = [block.table(diagonal[block.name]) for block in moving]
    norms = [block.table(parameters[block.name].detach().double().square()) for block in moving]
    constant = sum(traces[name] for name in traces.keys() - {block.name for block in moving})
    program = _Program(moving, tables, norms, group.units, constant)
    found = program.solve(gauge)
    t = torch.from_numpy(found.t.copy())
    return NeuronBalance(
        t=t,
        log_scale=group.log_scale(t),
        minimum_sharpness=found.minimum + constant,
        trace=sum(traces.values()),
        reached=program.trace(found.t) + constant,
        pulls=program.pulls(found.t, found.scale_free),
        scale_free=torch.from_numpy(found.scale_free),
        dead=torch.from_numpy(found.dead),
        gauge=gauge,
        residual=found.residual,
        notes=found.notes,
        _program=program,
    )


@dataclass
class _Found:
    t: Vector
    minimum: float
    scale_free: Mask
    dead: Mask
    residual: float
    notes: tuple[str, ...]


class _Program:
    """The terms of a network, and the three steps."""

    def __init__(
        self, parts: tuple[Block, ...], traces: list[Matrix], norms: list[Matrix], count: int, constant: float
    ) -> None:
        self.parts, self.traces, self.norms, self.count, self.constant = parts, traces, norms, count, constant

    def trace(self, t: Vector) -> float:
        """Σ C e^{−2a}, over parameters that move."""
        return self._at(self.traces, t)

    def solve(self, gauge: float) -> _Found:
        """All units' scales."""
        everything = [np.ones_like(block.size, dtype=np.bool_) for block in self.parts]
        structure = strong_components(self.parts, everything, self.count)
        scale_free = structure[:-1] != structure[-1]
        bounded = [block.components(structure) != -2 for block in self.parts]
        t, done, residual = np.zeros(self.count), np.zeros(self.count, dtype=np.bool_), 0.0
        minimum = math.nan
        dead = np.zeros(self.count, dtype=np.bool_)
        if gauge == 0.0:
            alive = [mask & (c > 0) for mask, c in zip(bounded, self.traces, strict=True)]
            label = strong_components(self.parts, alive, self.count)
            done = (label[:-1] == label[-1]) & ~scale_free
            dead = ~done & ~scale_free
            t, residual = self._balanced(t, done, label, alive)
            # Cycles apart from the ground have a positive minimum of their own, too.
            apart = dead & (np.bincount(label)[label[:-1]] > 1)
            lowest = self._balanced(t, apart, label, alive)[0] if apart.any() else t
            inside = [mask & (block.components(label) != -2) for block, mask in zip(self.parts, alive, strict=True)]
            minimum = self._sum(inside, lowest)
        wanted = ~done & ~scale_free
        if wanted.any():
            tied = [mask & (n > 0) for mask, n in zip(bounded, self.norms, strict=True)]
            label = strong_components(self.parts, tied, self.count, together=done)
            joined = (label[:-1] == label[-1]) & wanted
            t, further = self._normed(t, joined, label, tied)
            done, residual = done | joined, max(residual, further)
        self._pin(t, done)
        if gauge == 1.0:
            minimum = self._sum(bounded, t)
        minimum += self._sum([~mask for mask in bounded], t)
        notes = []
        if dead.any():
            notes.append(
                f"{int(dead.sum())} of {self.count} units have no curvature on one side; their norms are balanced, and "
                "what they add to the minimum is 0"
            )
        if residual > 1e-8:
            notes.append(
                f"the minimiser was not reached: a unit's in- and outgoing terms differ by {residual:.1e} of their sum"
            )
        return _Found(t, minimum, scale_free, dead, residual, tuple(notes))

    def _sum(self, masks: list[Mask], t: Vector) -> float:
        tables = [np.where(mask, c, 0.0) for mask, c in zip(masks, self.traces, strict=True)]
        return self._at(tables, t)

    def _at(self, tables: list[Matrix], t: Vector) -> float:
        still = np.zeros(0, dtype=np.intp)
        return float(sum(restricted(b, d, t, still).table.sum() for b, d in zip(self.parts, tables, strict=True)))

    def _balanced(self, t: Vector, moving: Mask, label: Any, alive: list[Mask]) -> tuple[Vector, float]:
        """Traces decide, over terms within one component."""
        units = np.flatnonzero(moving)
        terms = []
        for block, mask, c in zip(self.parts, alive, self.traces, strict=True):
            inside = mask & (block.components(label) != -2)
            terms.append(restricted(block, np.where(inside, c, 0.0), t, units))
        y, residual = minimise(terms, len(units))
        t = t.copy()
        t[units] = y
        return t, residual

    def _normed(self, t: Vector, moving: Mask, label: Any, tied: list[Mask]) -> tuple[Vector, float]:
        """Norms decide: the same program for Σ W² e^{2a}, in −t."""
        units = np.flatnonzero(moving)
        terms = []
        for block, mask, n in zip(self.parts, tied, self.norms, strict=True):
            inside = mask & (block.components(label) != -2)
            terms.append(restricted(block, np.where(inside, n, 0.0), t, units, sign=-1.0))
        y, residual = minimise(terms, len(units))
        t = t.copy()
        t[units] = -y
        return t, residual

    def _pin(self, t: Vector, done: Mask) -> None:
        """Rows of norm 1 for all units that are not done, in place, each once all that it depends on is."""
        left = ~done
        while left.any():
            waiting = np.zeros(self.count, dtype=np.bool_)
            norm, size, reach = np.zeros(self.count), np.zeros(self.count), np.zeros(self.count)
            for block, n in zip(self.parts, self.norms, strict=True):
                grown = restricted(block, n, -t, np.zeros(0, dtype=np.intp)).table
                (row_up, row_down), (column_up, column_down) = block.signs
                # Other units, not done, that a term of a unit depends on.
                others = [np.asarray((up + down) @ left.astype(float)).ravel() for up, down in block.signs]
                undone = others[0][:, None] + others[1]
                for up, side, axis in ((row_up, block.rows, 1), (column_up, block.columns, 0)):
                    norm += up.T @ grown.sum(axis=axis)
                    size += up.T @ block.size.sum(axis=axis)
                    waiting |= np.asarray(up.T @ (undone > 1).any(axis=axis).astype(float)).ravel() > 0
                    if side.nnz:
                        reach = np.maximum(reach, np.asarray(side.max(axis=0).todense()).ravel())
            ready = left & ~waiting
            if not ready.any():
                ready = left.copy()  # a cycle of pins: all at once, as they stand
            units = ready & (norm > 0)
            t[units] = np.log(size[units] / norm[units]) / (2 * reach[units])
            left &= ~ready

    def pulls(self, t: Vector, scale_free: Mask) -> dict[str, Tensor]:
        """Σ of the curvature of a scale-free unit's rows, per row: Σ_j C_j N_j with N_j = ‖W_j‖² has 2 C_j W_j."""
        found: dict[str, Tensor] = {}
        if not scale_free.any():
            return found
        zero = np.zeros(0, dtype=np.intp)
        curvature, size = np.zeros(self.count), np.zeros(self.count)
        for block, c in zip(self.parts, self.traces, strict=True):
            here = restricted(block, c, t, zero).table
            for (up, _), axis in zip(block.signs, (1, 0), strict=True):
                curvature += up.T @ here.sum(axis=axis)
                size += up.T @ block.size.sum(axis=axis)
        per_unit = np.where(scale_free, curvature / np.maximum(size, 1e-300), 0.0)
        for block in self.parts:
            (row_up, _), (column_up, _) = block.signs
            value = (row_up @ per_unit)[:, None] + column_up @ per_unit
            if value.any():
                found[block.name] = block.spread(value)
        return found


def _read(
    parameters: Mapping[str, nn.Parameter], diagonal: Mapping[str, Tensor], group: NeuronGroup
) -> dict[str, float]:
    """The trace of every parameter that has a diagonal, once all of them are known to fit."""
    if parameters.keys() != set(group.parameters):
        raise BalanceError(
            "the group is not this model's: their parameters have other names; "
            "rebuild it with neuron_symmetries(model, example_inputs)"
        )
    missing = [name for name, factors in group.factors.items() if factors and name not in diagonal]
    unknown = sorted(set(diagonal) - parameters.keys())
    if missing or unknown:
        raise BalanceError(
            f"the diagonals do not fit the group: {', '.join(missing[:3]) or 'none'} missing, "
            f"{', '.join(unknown[:3]) or 'none'} unknown; measure them on this model with hessian_diagonal"
        )
    traces = {}
    for name, value in diagonal.items():
        lowest, total = (float(value.min()), float(value.double().sum())) if value.numel() else (0.0, 0.0)
        if value.shape != parameters[name].shape or not lowest >= 0 or not math.isfinite(total):
            raise BalanceError(
                f"the diagonal of parameter {name} has shape {tuple(value.shape)}, smallest entry {lowest:.3g} and sum "
                f"{total:.3g}; it has the parameter's shape {tuple(parameters[name].shape)}, and is finite and >= 0: "
                "measure it with hessian_diagonal"
            )
        traces[name] = total
        square = float(parameters[name].detach().double().square().sum())
        if not math.isfinite(square):
            raise BalanceError(
                f"the squared norm of parameter {name} is {square}; the network has diverged: restore finite weights"
            )
    return traces
