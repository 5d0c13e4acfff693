r"""Balance: the canonical representative of a network, and what it says about sharpness at the network itself.

From traces c_p, squared norms n_p and the scale group comes t*, the minimiser of the program J_κ, a = B t*, and

    MS = Σ_p c_p e^{−2a_p} .

*The gradient of MS.*  With κ = 0 and independent scale-free classes, F pins itself and

    MS = min_t Σ_{g∉F} C_g e^{−2a_g} + Σ_{g∈F} C_g N_g / R_g .

The first term is a minimum over t, so by the envelope theorem its derivative in c_p is that of the sum at fixed t*:
w_p = e^{−2a_p}.  The second has derivatives N_g/R_g = w_p in c_p and C_g/R_g = w_p C_g/N_g in n_p.  As n_p = ‖W_p‖²,

    ∇MS = Σ_p w_p ∇c_p + Σ_{g∈F} 2 w_p (C_g/N_g) W_p .

The second sum is what makes the gradient tangential to the group: along a generator d it is Σ_p d_p (−2 w_p c_p +
2 n'_p n_p) = 0 (the first terms by stationarity, F class by class); without it, scale-free weights are pushed outward.

*κ > 0.*  Multiplying dJ = (1−κ) dT/T + κ dS/S by T, with T = Σ_{g∉F} C_g e^{−2a_g} and S = Σ_{g∉F} N_g e^{2a_g}, gives
a regulariser in units of trace: (1−κ) w_p ∇c_p and 2κ (T/S) e^{2a_p} W_p, weight decay in balanced coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BalanceError
from .chain import closed_form
from .floors import floored
from .program import Classes, Mask, Program, Vector, classes, minimise

if TYPE_CHECKING:
    from ..symmetry.group import ScaleGroup


@dataclass(frozen=True)
class Representative:
    """The numbers behind a Balance: the network as it is, and the program that balances it.

    Attributes:
        classes: The classes of the group.
        traces: c_p, ``[P]``.
        norms: n_p, ``[P]``.
        program: J_κ in today's coordinates, repaired where traces are degenerate.
        pinned: ``[M]``, the classes that the program pins.
        gauge: κ as asked for.
    """

    classes: Classes
    traces: Vector
    norms: Vector
    program: Program
    pinned: Mask
    gauge: float

    def coefficients(self, a: Vector) -> tuple[Vector, Vector]:
        """What multiplies ∇c_p and 2 W_p in the regulariser's gradient at the log-scales a.

        Args:
            a: ``[M]``, per class.

        Returns:
            Trace weights and pulls, ``[P]`` each.
        """
        member, w = self.classes.member, np.exp(-2 * a)
        traces, norms = self.classes.total(self.traces), self.classes.total(self.norms)
        summed = ~self.pinned
        trace_sum, norm_sum = float(traces[summed] @ w[summed]), float(norms[summed] @ (1 / w[summed]))
        pull = np.zeros_like(w)
        if norm_sum > 0:
            pull[summed] = self.gauge * trace_sum / norm_sum / w[summed]
        # A class of zeros feels no pull: 2 n W = 0 whatever n is.
        pinned = self.pinned & (norms > 0)
        pull[pinned] = (w * traces)[pinned] / norms[pinned]
        pull[norms == 0] = 0.0
        return np.where(summed, 1 - self.gauge, 1.0)[member] * w[member], pull[member]

    def moved(self, a: Vector) -> Representative:
        """The same after the network itself was scaled by e^{a_g}, a ``[M]``."""
        growth = np.exp(2 * a)[self.classes.member]
        return Representative(
            self.classes, self.traces / growth, self.norms * growth, self.program.shifted(a), self.pinned, self.gauge
        )


@dataclass(frozen=True, eq=False)
class Balance:
    """The balanced representative of a network; names are parameter names, scales are natural logarithms.

    Attributes:
        log_scale: a_p = (B t)_p; the representative is e^{a_p} W_p.
        weights: w_p = e^{−2a_p}, which turns a trace here into a trace at the representative.
        trace_weights: What multiplies ∇c_p in the regulariser's gradient: (1−κ) w_p, and w_p if pinned.
        pulls: What multiplies 2 W_p there.
        minimum_sharpness: Σ c_p e^{−2a_p} at the minimiser, with the traces as they were given.
        trace: Σ c_p here.
        t: ``[G]``, float64.
        free: The scale-free parameters.
        gauge: κ.
        residual: The largest entry of |∇J| at t.
        notes: What had to be repaired, in words.
    """

    log_scale: dict[str, float]
    weights: dict[str, float]
    trace_weights: dict[str, float]
    pulls: dict[str, float]
    minimum_sharpness: float
    trace: float
    t: Tensor
    free: tuple[str, ...]
    gauge: float
    residual: float
    notes: tuple[str, ...]
    _representative: Representative | None = field(default=None, repr=False)

    def state(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors, for a checkpoint.

        Returns:
            What :meth:`from_state` reads.
        """
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_representative"}
        return {**kept, "free": list(self.free), "notes": list(self.notes)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Balance:
        """Read what :meth:`state` wrote; all but :meth:`at` and :meth:`moved` works on the result.

        Args:
            state: The state.

        Returns:
            The Balance.
        """
        return cls(**{**state, "free": tuple(state["free"]), "notes": tuple(state["notes"])})

    def _numbers(self) -> Representative:
        if self._representative is None:
            raise BalanceError(
                "this Balance was read from a checkpoint, without the network's numbers; "
                "call balance(model, traces, group)"
            )
        return self._representative

    def at(self, t: Tensor) -> Balance:
        """The same network with other scales than the best, where those had to be bounded.

        Args:
            t: ``[G]``.

        Returns:
            A Balance with scales, weights, pulls and residual of t; ``minimum_sharpness`` stays that of the minimiser.

        Raises:
            BalanceError: If t does not have one finite entry per generator.
        """
        if t.shape != self.t.shape or not bool(torch.isfinite(t).all()):
            raise BalanceError(
                f"t has shape {tuple(t.shape)} and values {t.tolist()}; this group has {self.t.numel()} generators: "
                "pass a finite vector with one entry for each"
            )
        vector = t.detach().to("cpu", torch.float64)
        return _present(self._numbers(), vector.numpy(), self.minimum_sharpness, self.notes)

    def moved(self, t: Tensor | None = None) -> Balance:
        """What holds after the network itself was rescaled.

        Args:
            t: ``[G]``, by what it was (``group.rescale_(model, t)``); ``None``: to the representative, by this t.

        Returns:
            A Balance seen from there: with log-scales 0 and weights 1 if that is the representative; its ``trace`` is
            the one that was reached.
        """
        by = self.t.numpy() if t is None else t.detach().to("cpu", torch.float64).numpy()
        numbers = self._numbers()
        rest = np.zeros(len(self.t)) if t is None else self.t.numpy() - by
        return _present(numbers.moved(numbers.program.rows @ by), rest, self.minimum_sharpness, self.notes)


def balance(model: nn.Module, traces: Mapping[str, float], group: ScaleGroup, gauge: float = 0.0) -> Balance:
    r"""Find the representative that minimises J_κ, for κ = 0 the one with the smallest Hessian trace.

    Args:
        model: The network; only the squared norms n_p of its parameters are read, in float64.
        traces: c_p by parameter name, such as what ``hessian_trace`` returns.
        group: The scale group of the model.
        gauge: κ in [0, 1]: 0 weighs traces only, 1 norms only.

    Returns:
        The Balance. Nothing is moved.

    Raises:
        ValueError: If the gauge is outside of [0, 1].
        BalanceError: If traces are missing, unknown, negative or not finite, or the group is not the model's.

    Source: arXiv 2106.12612, Theorem 1, generalised to biases, residual sums and normalisers.
    """
    if not 0.0 <= gauge <= 1.0:
        raise ValueError(f"gauge must be in [0, 1], got {gauge}; 0 is the smallest trace, 1 balances norms")
    parameters = dict(model.named_parameters())
    _check_group(parameters, group)
    c = _read_traces(traces, group)
    n = _squared_norms(parameters, group.parameters)
    found = _classes(parameters, group)
    return _balance(found, c, n, gauge)


def _classes(parameters: Mapping[str, nn.Parameter], group: ScaleGroup) -> Classes:
    shapes = tuple(tuple(parameters[name].shape) for name in group.parameters)
    return classes(group.parameters, shapes, group.generators.detach().cpu().double().numpy().tobytes())


def _balance(found: Classes, c: Vector, n: Vector, gauge: float) -> Balance:
    program, pinned, notes = floored(found, found.total(c), found.total(n), gauge)
    closed = closed_form(program)
    t, arrived = (closed, True) if closed is not None else minimise(program)
    if not arrived:
        notes += ("the minimiser was not reached (see residual): norms or traces disagree by tens of powers of ten",)
    representative = Representative(found, c, n, program, pinned, gauge)
    minimum = float(c @ np.exp(-2 * (program.rows @ t))[found.member])
    return _present(representative, t, minimum, notes)


def row_balance(model: nn.Module, group: ScaleGroup) -> Tensor:
    r"""Where the rows of all layers have one size, or as nearly as biases and residual sums let them.

    That is where the usual initialisations put a chain of layers: the minimiser of
    :math:`\log \sum_{g∉F} (N_g/R_g) e^{2a_g}` and of the pins of the scale-free classes, J_1 with mean squares of rows
    in the place of squared norms.  Needs no data, and is one canonical representative of the whole
    equivalence class, as the minimiser of every J_κ is.

    Args:
        model: The network; only the squared norms of its parameters are read, in float64.
        group: The scale group of the model.

    Returns:
        t, ``[G]``, float64.

    Raises:
        BalanceError: If the group is not the model's, or a weight is not finite.
    """
    parameters = dict(model.named_parameters())
    _check_group(parameters, group)
    found = _classes(parameters, group)
    per_row = found.total(_squared_norms(parameters, group.parameters)) / np.maximum(found.size, 1.0)
    program, _, _ = floored(_single_rows(found), np.zeros_like(per_row), per_row, 1.0)
    closed = closed_form(program)
    return torch.from_numpy((minimise(program)[0] if closed is None else closed).copy())


@lru_cache(maxsize=64)
def _single_rows(found: Classes) -> Classes:
    """The same classes, counted as one row each; cached, for other caches hang on it."""
    return replace(found, size=np.ones_like(found.size))


def _present(representative: Representative, t: Vector, minimum: float, notes: tuple[str, ...]) -> Balance:
    found, program = representative.classes, representative.program
    a = program.rows @ t
    trace_weights, pulls = representative.coefficients(a)

    def named(values: Vector) -> dict[str, float]:
        return dict(zip(found.parameters, values.tolist(), strict=True))

    return Balance(
        log_scale=named(a[found.member]),
        weights=named(np.exp(-2 * a)[found.member]),
        trace_weights=named(trace_weights),
        pulls=named(pulls),
        minimum_sharpness=minimum,
        trace=float(representative.traces.sum()),
        t=torch.from_numpy(t.copy()),
        free=tuple(name for name, g in zip(found.parameters, found.member, strict=True) if found.free[g]),
        gauge=representative.gauge,
        residual=program.residual(t),
        notes=notes,
        _representative=representative,
    )


def _check_group(parameters: Mapping[str, nn.Parameter], group: ScaleGroup) -> None:
    shape = tuple(group.generators.shape)
    if len(shape) != 2 or shape[1] != len(group.parameters):
        raise BalanceError(
            f"the group's generators have shape {shape} for {len(group.parameters)} parameters; "
            "they are a matrix [G, P]: rebuild the group with scale_symmetries"
        )
    if parameters.keys() != set(group.parameters):
        raise BalanceError(
            f"the group is not this model's: {_names(parameters.keys() - set(group.parameters))} only in the model, "
            f"{_names(set(group.parameters) - parameters.keys())} only in the group; "
            "rebuild the group with scale_symmetries(model, example_inputs)"
        )
    for name, expected in zip(group.parameters, group.shapes, strict=False):
        if tuple(parameters[name].shape) != expected:
            raise BalanceError(
                f"the group is not this model's: parameter {name} has shape {tuple(parameters[name].shape)}, and "
                f"{expected} in the group; rebuild the group with scale_symmetries(model, example_inputs)"
            )


def _read_traces(traces: Mapping[str, float], group: ScaleGroup) -> Vector:
    names = group.parameters
    # What no scale moves may be missing: a frozen parameter has no trace, and would only add a constant.
    needed = {name for name, moves in zip(names, group.generators.any(0).tolist(), strict=True) if moves}
    if not needed <= traces.keys() <= set(names):
        raise BalanceError(
            f"the traces do not cover the group: {_names(needed - traces.keys())} missing, "
            f"{_names(traces.keys() - set(names))} unknown; measure them on this model with hessian_trace"
        )
    c = np.array([float(traces.get(name, 0.0)) for name in names], dtype=np.float64)
    for name, value in zip(names, c.tolist(), strict=True):
        if not math.isfinite(value) or value < 0:
            raise BalanceError(
                f"the trace of parameter {name} is {value}; a Gauss-Newton trace is finite and >= 0: look for "
                "non-finite weights or inputs"
            )
    return c


def _squared_norms(parameters: Mapping[str, nn.Parameter], names: tuple[str, ...]) -> Vector:
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(parameters[name], dtype=torch.float64) for name in names]
        devices = {norm.device for norm in norms}
        # One transfer, hence one wait for the device, where there is one device.
        if len(devices) > 1:
            norms = [norm.cpu() for norm in norms]
        n = np.array(torch.stack(norms).tolist() if norms else [], dtype=np.float64) ** 2
    for name, value in zip(names, n.tolist(), strict=True):
        if not math.isfinite(value):
            raise BalanceError(
                f"the squared norm of parameter {name} is {value}; the network has diverged: restore finite weights"
            )
    return n


def _names(names: set[str], limit: int = 5) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "") if shown else "nothing"
