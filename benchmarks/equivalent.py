r"""Trainings from equivalent starts: group elements of a given size, and how far trajectories get from one another.

The size of an element is the spread of its factors in orders of magnitude,

    decades(t) = (max a − min a) / ln 10 ,     over the log-scales a of all parameters, or of all their entries.

A seed draws one direction in the group; sizes are multiples of it.  Where a BatchNorm's input would shrink, it grows by
as much instead: a smaller variance is changed by ε in training mode, a larger one is not.

Beside the scaled starts there is one with a relative perturbation of 10⁻⁶ of every weight: it shows how far rounding
alone takes two trainings apart.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ms_optim
from ms_optim.errors import DivergedError, SymmetryError
from ms_optim.symmetry import Group, ScaleGroup

from .problems import Data, Problem
from .training import accuracy, begun, descend, optimizer_in

#: The start whose weights are multiplied by 1 + 10⁻⁶ ξ, ξ ~ N(0, 1).
ROUNDING, RELATIVE = "rounding", 1e-6
#: Held-out images on which trajectories are compared.
WATCHED = 500
#: What ``dtype`` is called where a training is in float64.
DOUBLE = "float64"
#: What float32 may change of the logits in evaluation mode, relative to the largest; what ε may in training mode.
ROUNDED, UNCHANGED = 1e-4, 1e-3


def group_of(model: nn.Module, x: Tensor, granularity: str) -> Group:
    """The rescalings that leave a network's function unchanged.

    Args:
        model: The network.
        x: A batch.
        granularity: ``"layer"`` or ``"neuron"``.

    Returns:
        The group.
    """
    return ms_optim.neuron_symmetries(model, x) if granularity == "neuron" else ms_optim.scale_symmetries(model, x)


def decades(group: Group, t: Tensor) -> float:
    """The size of an element: log₁₀ of its largest factor over its smallest.

    Args:
        group: The group.
        t: The element.

    Returns:
        The size, ≥ 0.
    """
    scales = [torch.as_tensor(a) for a in group.log_scale(t).values()]
    return float(max(a.max() for a in scales) - min(a.min() for a in scales)) / math.log(10)


def element_of(group: Group, size: float, seed: int) -> Tensor:
    """An element of a size, in the direction of a seed.

    Args:
        group: The group; of hidden units, of a network without BatchNorm.
        size: In decades.
        seed: Draws the direction.

    Returns:
        t.
    """
    t = group.random(generator=torch.Generator().manual_seed(seed))
    if isinstance(group, ScaleGroup) and group.statistics:
        rows = torch.stack([statistics.row for statistics in group.statistics])
        inputs = rows @ t
        t = t + torch.linalg.pinv(rows) @ (inputs.abs() - inputs)  # the shortest such step
    return t * (size / decades(group, t))


@torch.no_grad()
def changed(usual: nn.Module, other: nn.Module, x: Tensor, training: bool) -> float:
    """How far apart the logits of two networks are.

    Args:
        usual: The one.
        other: The other.
        x: A batch.
        training: In training mode; neither network's statistics move.

    Returns:
        The largest difference, relative to the largest logit.
    """
    first, second = (copy.deepcopy(model).train(training)(x) for model in (usual, other))
    return float((second - first).abs().max() / first.abs().max())


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """What a network says of images, float64; all classes alike where its logits are not finite.

    Args:
        model: The network; left in evaluation mode.
        x: Images.

    Returns:
        A distribution per image.
    """
    found = model.eval()(x).double().softmax(1)
    return torch.where(found.isfinite().all(1, keepdim=True), found, 1 / found.shape[1])


def distance(found: Tensor, usual: Tensor) -> float:
    """The distance of two networks in function space, relative to the size of one.

    Args:
        found: Probabilities.
        usual: Those it is relative to.

    Returns:
        ‖p − q‖ / ‖q‖.
    """
    return float((found - usual).norm() / usual.norm())


def trajectory(
    model: nn.Module, settings: Mapping[str, Any], problem: Problem, data: Data, epochs: int, group: Group | None
) -> tuple[list[Tensor], bool]:
    """Train a network where it stands.

    Args:
        model: The network.
        settings: As of :func:`benchmarks.training.trained`.
        problem: The row.
        data: Its data.
        epochs: How long.
        group: For an optimizer that rescales, where it is known: to find it takes as long as a few epochs.

    Returns:
        What the network says of the watched images after every epoch, nothing in particular once it has diverged;
        whether it has.
    """
    watched = data.held_out[0][:WATCHED]
    found: list[Tensor] = []
    if group is not None:
        settings = {**settings, "options": {**settings["options"], "group": group}}
    optimizer = optimizer_in(settings, model, problem, data)
    order, watch = settings["seed"], lambda _: found.append(probabilities(model, watched))
    with contextlib.suppress(DivergedError):
        descend(model, optimizer, data.train, epochs, problem.batch, order, watch)
    missing = epochs - len(found)
    return found + missing * [torch.full((len(watched), 10), 0.1, dtype=torch.float64)], missing > 0


def started(usual: nn.Module, group: Group, start: float | str, seed: int) -> nn.Module:
    """A network that computes the same.

    Args:
        usual: The network at its usual scale.
        group: The rescalings.
        start: The size of the element, or :data:`ROUNDING`.
        seed: Draws the element.

    Returns:
        A copy.
    """
    model = copy.deepcopy(usual)
    if start == ROUNDING:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + RELATIVE * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    elif start:
        group.rescale_(model, element_of(group, float(start), seed))
    return model


def compared(settings: Mapping[str, Any], problem: Problem, data: Data) -> dict[str, Any]:
    """Train from equivalent starts, all else being the same.

    Args:
        settings: As of :func:`benchmarks.training.trained`, and ``granularity``, of the group that acts; ``starts``:
            sizes, 0 first, and :data:`ROUNDING`; ``dtype``, if it is :data:`DOUBLE`.
        problem: The row.
        data: Its data.

    Returns:
        ``starts``: of each the accuracy, the distances to the training from the usual start after every epoch, and
        what rescaling changed of the function; and the accuracy from the usual start.

    Raises:
        SymmetryError: If a start is no equivalent one.
    """
    usual, epochs = begun(problem, settings, data)
    if settings.get("dtype") == DOUBLE:
        usual, data = usual.double(), Data(*((x.double(), y) for x, y in (data.train, data.held_out, data.test)))
    batch = data.train[0][: problem.batch]
    acting = group_of(usual, batch, settings["granularity"])
    own = own_group(settings, usual, batch, acting)
    lines: list[dict[str, Any]] = []
    reference: list[Tensor] = []
    for start in settings["starts"]:
        model = started(usual, acting, start, settings["seed"])
        errors = {
            f"{mode}_error": changed(usual, model, batch, mode == "training") for mode in ("function", "training")
        }
        if start != ROUNDING and not errors["function_error"] <= ROUNDED:
            raise SymmetryError(
                f"an element of {start} decades changed the logits by {errors['function_error']:.1e}, more than "
                f"{ROUNDED:g}: the group is another network's"
            )
        found, diverged = trajectory(model, settings, problem, data, epochs, own)
        reference = reference or found
        apart = [distance(p, q) for p, q in zip(found, reference, strict=True)]
        # A network that has diverged is right as often as one that guesses.
        parts = {"test": data.test, "held_out": data.held_out}
        right = {part: 0.1 if diverged else accuracy(model, *images) for part, images in parts.items()}
        lines.append({"start": start, **right, "distances": apart, **errors, "diverged": diverged})
    return {"test": lines[0]["test"], "held_out": lines[0]["held_out"], "starts": lines}


def own_group(settings: Mapping[str, Any], usual: nn.Module, batch: Tensor, acting: Group) -> Group | None:
    """The group that an optimizer rescales by itself.

    Args:
        settings: ``optimizer``, ``options``, ``granularity``.
        usual: The network.
        batch: A batch.
        acting: The group that was found already.

    Returns:
        The group; ``None`` for an optimizer that does not rescale.
    """
    if not settings["optimizer"].startswith("MS"):
        return None
    wanted = settings["options"].get("granularity", "layer")
    return acting if wanted == settings["granularity"] else group_of(usual, batch, wanted)
