"""Rules about settings: what an optimizer was asked for and cannot do, or does not do in this step."""

from __future__ import annotations

from collections.abc import Iterator

from ..symmetry import Group
from .diagnosis import Finding
from .examination import note, problem, rule, shortened
from .observation import Observation


@rule
def unowned_parameters(seen: Observation) -> Iterator[Finding]:
    """Trainable parameters that the optimizer does not have."""
    if seen.foreign:
        yield note(
            "trainable parameters of the model are not in the optimizer: they are neither perturbed nor trained",
            "freeze them, or give the optimizer all of model.parameters()",
            shortened(seen.foreign),
            parameters=len(seen.foreign),
        )


@rule
def zero_radius(seen: Observation) -> Iterator[Finding]:
    """ρ or the strength is 0."""
    for key in ("rho", "strength"):
        values = [float(entry[key]) for entry in seen.optimizer.param_groups if key in entry]
        if values and not any(values):
            yield note(
                f"{key} is 0 in every parameter group: this is the base optimizer",
                f"set {key} > 0 (it lives in the parameter groups, where a schedule may have set it)",
            )
        elif values and not all(values):
            groups = [str(index) for index, value in enumerate(values) if not value]
            yield note(f"{key} is 0 in some parameter groups", "fine, if that is meant", f"groups {shortened(groups)}")


@rule
def window_closed(seen: Observation) -> Iterator[Finding]:
    """This step has no part of the optimizer's own."""
    ours = seen.ours
    if ours is not None and not ours.active:
        schedule = ours.schedule
        yield note(
            f"step {ours.steps} is the base optimizer's alone: start={schedule.start}, end={schedule.end}, "
            f"every={schedule.every}, so that its own part was not seen",
            "run doctor with an optimizer whose window is open; the window counts optimizer steps, not epochs",
            step=ours.steps,
        )


@rule
def no_symmetry(seen: Observation) -> Iterator[Finding]:
    """Balancing was asked for, and nothing can be balanced."""
    ours, group = seen.ours, seen.group
    if ours is None or ours.rebalance is None or group is None or _moved(seen):
        return
    yield problem(
        f"rebalance={ours.rebalance!r} has nothing to do: no rescaling that the optimizer may make leaves the function "
        "unchanged",
        "use rebalance=None, or activations and normalisers that a scale passes (ReLU, BatchNorm), and give the "
        "optimizer all trainable parameters; print(ms_optim.scale_symmetries(model, inputs)) shows what is in the way",
        _obstacles(group),
    )


@rule
def fixed_parameters(seen: Observation) -> Iterator[Finding]:
    """Parameters that no symmetry moves."""
    ours, group = seen.ours, seen.group
    if ours is None or ours.rebalance is None or group is None or not _moved(seen):
        return
    named = zip(seen.names, seen.parameters, strict=True)
    fixed = [name for name, p in named if p.requires_grad and id(p) not in seen.movable]
    if fixed:
        obstacles = _obstacles(group)
        yield note(
            "no symmetry moves these parameters, so that balancing leaves them as they are",
            "nothing: a bias of the last layer, say, has no equivalent; print(optimizer.group) shows the rest",
            shortened(fixed) + (f"; what no scale passes: {obstacles}" if obstacles else ""),
            parameters=len(fixed),
        )


@rule
def said(seen: Observation) -> Iterator[Finding]:
    """The package itself has warned."""
    for message in dict.fromkeys(seen.said):
        yield note(message, "see the warning")


def _moved(seen: Observation) -> list[str]:
    """The trainable parameters of the optimizer that some symmetry moves."""
    named = zip(seen.names, seen.parameters, strict=True)
    return [n for n, p in named if p.requires_grad and n not in seen.foreign and id(p) in seen.movable]


def _obstacles(group: Group) -> str:
    """What no scale passes, where, and why."""
    found = [f"{o.operation} in {o.where or '(model)'}: {o.reason}" for o in group.opaque]
    return shortened(list(dict.fromkeys(found)))
