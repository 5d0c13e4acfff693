"""Rules about ranks: what all have to agree on, and what each was to have of its own."""

from __future__ import annotations

from collections.abc import Iterator

from .diagnosis import Finding
from .examination import problem, rule
from .observation import Look, Observation


@rule
def no_sync_too_late(seen: Observation) -> Iterator[Finding]:
    """``no_sync()`` was entered after the forward pass, when it is too late."""
    for index, one in enumerate(seen.passes):
        late = [b for b in one.backwards if b.synchronised is False]
        if late and all(f.synchronised for f in one.forwards):
            yield problem(
                "no_sync() was entered for the backward pass only, and DistributedDataParallel decides in the forward "
                "pass whether gradients are averaged: they were, and the perturbation is the same on all ranks",
                "put the forward pass into no_sync() as well (in ms_optim: m='local')",
                f"pass {index + 1}",
            )
            return


@rule
def ranks_start_apart(seen: Observation) -> Iterator[Finding]:
    """The ranks have different weights."""
    apart = _apart([view.start for view in seen.ranks])
    if apart:
        yield problem(
            "the weights differ between the ranks before the step",
            "build all ranks with the same seed or load the same checkpoint, and wrap the model in "
            "DistributedDataParallel, which sends the first rank's",
            f"rank {apart[0]}",
            ranks=len(seen.ranks),
        )


@rule
def gradients_apart(seen: Observation) -> Iterator[Finding]:
    """The ranks descend along different gradients."""
    views = [view.gradients for view in seen.ranks if view.gradients is not None]
    if 0 < len(views) < len(seen.ranks):
        yield problem(
            "some ranks descend and others do not",
            "take the same steps on all ranks: decide by numbers that are reduced over them",
            descending=len(views),
            ranks=len(seen.ranks),
        )
    apart = _apart(views)
    if apart and not _apart([view.start for view in seen.ranks]):
        yield problem(
            "the gradients that are descended along differ between the ranks, so their weights will drift apart",
            "call the DistributedDataParallel module, not the module inside it, and leave no_sync() before the last "
            "backward pass of a step",
            f"rank {apart[0]}",
            largest_norm=max(view.norm for view in views),
            smallest_norm=min(view.norm for view in views),
        )


@rule
def perturbations_apart(seen: Observation) -> Iterator[Finding]:
    """Perturbations are shared where each rank was to have its own, or the other way around."""
    ours = seen.ours
    numbers = {len(view.perturbed) for view in seen.ranks}
    if len(seen.ranks) < 2 or numbers == {0} or _apart([view.start for view in seen.ranks]):
        return
    views = [view.perturbed for view in seen.ranks]
    differ = len(numbers) > 1 or any(_apart(list(looks)) for looks in zip(*views, strict=True))
    if ours is not None and ours.m == "local" and not differ:
        yield problem(
            "m='local' asks for a perturbation per rank, and it is the same on all",
            "give the optimizer the DistributedDataParallel module, and each rank its own part of the batch",
        )
    elif ours is not None and ours.m == "global" and differ:
        yield problem(
            "m='global' asks for one perturbation, and the ranks have different ones: no average of the first gradient",
            "call the DistributedDataParallel module in every pass, outside of no_sync(); m='local' means one per rank",
        )


def _apart(looks: list[Look]) -> list[int]:
    """The ranks whose tensors are not the first one's."""
    return [rank for rank, look in enumerate(looks) if not look.agrees_with(looks[0])]
