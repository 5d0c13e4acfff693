"""Rules about passes: at which weights, on which inputs, with which masks and statistics gradients are taken."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .diagnosis import Finding
from .examination import note, problem, rule, shortened
from .observation import Observation, identical, same_streams

# Of ‖ε‖: what subtracting a perturbation leaves is its rounding; a perturbation that was left is all of it.
_ROUNDING = 1e-2


@rule
def step_raised(seen: Observation) -> Iterator[Finding]:
    """The step raised an exception."""
    if seen.error is not None:
        text = " ".join(f"{type(seen.error).__name__}: {seen.error}".split())
        yield problem(
            f"the step raised {text if len(text) < 600 else text[:600] + '…'}",
            "mend this first, for what comes after it was not seen (the exception is in diagnosis.error); everything "
            "has been put back",
        )


@rule
def model_not_called(seen: Observation) -> Iterator[Finding]:
    """No training forward of the model was seen."""
    if not seen.forwards and seen.error is None:
        extra = f"; it was called {seen.unseen} times without gradients" if seen.unseen else ""
        yield problem(
            f"{type(seen.model).__name__} was not called in the step, so that nothing of its passes can be seen, by an "
            f"optimizer that looks for its model either{extra}",
            "call the module itself, model(x), not model.forward(x) and no copy of it; and give doctor the module that "
            "the loop calls",
        )


@rule
def another_model(seen: Observation) -> Iterator[Finding]:
    """Our optimizer was built with another model than the one that is trained."""
    ours = seen.ours
    if ours is None or ours.model is None:
        return
    if all(module is not ours.model for module in seen.model.modules()) and all(
        module is not seen.model for module in ours.model.modules()
    ):
        yield problem(
            f"the optimizer was built with model={type(ours.model).__name__}, which is not part of the module that is "
            "trained: its buffers are not kept, and nothing is balanced on its batches",
            f"build {type(ours).__name__} with the module that the loop calls",
        )


@rule
def evaluation_mode(seen: Observation) -> Iterator[Finding]:
    """The model was trained in evaluation mode."""
    off = [forward for forward in seen.forwards if not forward.training]
    if off:
        yield note(
            "gradients were taken with the model in evaluation mode: dropout is off, BatchNorm uses its running "
            "statistics, and unmodified loops take no perturbation",
            "call model.train() before the step, unless this is meant",
            forward_passes=len(off),
        )


@rule
def stale_autocast(seen: Observation) -> Iterator[Finding]:
    """The perturbed pass was computed with weights from autocast's cache."""
    stale = [(index, f.stale) for index, f in enumerate(seen.forwards) if f.stale]
    if stale:
        where = "forward pass " + ", ".join(str(index + 1) for index, _ in stale)
        yield problem(
            "autocast kept low-precision copies of the weights and did not see that they had changed: the pass was "
            "computed with the weights of an earlier one, so the perturbation had no effect",
            "open autocast around each forward pass, not around the step; or call torch.clear_autocast_cache() "
            "whenever the weights have changed; the optimizers of ms_optim do so",
            where,
            logits_off_by=max(float(off or 0.0) for _, off in stale),
            perturbation=max(seen.forwards[index].look.norm for index, _ in stale),
        )


@rule
def perturbation_without_effect(seen: Observation) -> Iterator[Finding]:
    """The weights changed and the outputs did not."""
    for clean, perturbed in seen.pairs:
        if perturbed.stale or not perturbed.outputs or not identical(clean.inputs, perturbed.inputs):
            continue
        if identical(clean.outputs, perturbed.outputs):
            dtype = str(perturbed.outputs[0].dtype).removeprefix("torch.")
            yield problem(
                "the weights were perturbed and the outputs are the same to the last bit",
                f"if {dtype} cannot resolve so small a step, take a larger rho; otherwise the model computes with "
                "copies of its weights (a cache, a frozen graph): make them anew in each forward pass",
                shortened(perturbed.look.moved(seen.names)),
                perturbation=perturbed.look.norm,
            )
            return


@rule
def no_perturbation(seen: Observation) -> Iterator[Finding]:
    """A radius was asked for, and every gradient was taken at W."""
    radius = max((float(entry.get("rho", 0.0)) for entry in seen.optimizer.param_groups), default=0.0)
    passes, ours = seen.passes, seen.ours
    if radius == 0 or not passes or seen.error is not None or any(one.perturbed for one in passes):
        return
    if ours is not None and not ours.active:
        return
    if ours is not None and getattr(ours, "ascent", "gradient") != "gradient":
        yield note(
            f"no perturbation was taken: ascent={getattr(ours, 'ascent', '')!r} has no direction before the first step",
            "run a step of training, and doctor after it",
            rho=radius,
        )
        return
    gradients = [b.look for one in passes for b in one.backwards]
    if ours is None and len(passes[0].forwards) == 1:
        yield note(
            "the optimizer has a radius, and the step took one pass, at W",
            "if it does not perturb in every step, fine; otherwise its ascent (first_step, a closure) is missing",
            rho=radius,
        )
        return
    reason = ""
    if any(not look.finite for look in gradients):
        reason = ", since the first gradient is not finite"
    elif gradients and gradients[0].norm == 0:
        reason = ", since the first gradient is zero"
    yield problem(
        f"no pass was perturbed{reason}: this was a step of the base optimizer",
        "look at the first gradient" if reason else "take the ascent between the passes, in the model's own parameters",
        rho=radius,
    )


@rule
def perturbation_left(seen: Observation) -> Iterator[Finding]:
    """The weights were not restored before the descent, or not at all."""
    if seen.after is None or seen.error is not None or not seen.descents:
        return
    last = seen.descents[-1]
    perturbation = max((one.norm for one in seen.passes if one.perturbed), default=0.0)
    at_descent, after = last.weights, seen.after
    if not (at_descent.finite and last.gradients.finite):
        return
    left = after if last.drives else at_descent
    if last.has_rate and left.norm != 0 and after.norm != 0:
        rounding = 0 < left.norm < _ROUNDING * perturbation
        coarse = any(p.dtype in (torch.half, torch.bfloat16) for p in seen.parameters)
        make = note if rounding and not coarse else problem
        yield make(
            "the weights were not restored exactly: the perturbation was subtracted again, which drifts"
            if rounding
            else "the perturbation was left in the weights: the descent starts from W + ε",
            "keep a copy of the weights and copy it back before the descent",
            shortened(left.moved(seen.names)),
            left=left.norm,
            perturbation=perturbation,
        )
    elif last.has_rate and after.norm != 0 and after.finite:
        yield note(
            f"{type(last.optimizer).__name__} moves the weights even at lr=0",
            "nothing, if its step size is not lr; what a step leaves in the weights cannot be told then",
            shortened(after.moved(seen.names)),
            moved=after.norm,
        )


@rule
def doubled_statistics(seen: Observation) -> Iterator[Finding]:
    """Buffers, as BatchNorm's statistics, keep what the pass at W and what the perturbed pass have made of them."""
    forwards = seen.forwards
    if seen.error is not None or not forwards:
        return
    following = [*(forward.buffers for forward in forwards), seen.buffers_after][1:]
    kept: dict[bool, set[int]] = {False: set(), True: set()}
    for forward, then in zip(forwards, following, strict=True):
        for index, (a, b) in enumerate(zip(forward.buffers, forward.buffers_after, strict=True)):
            if not torch.equal(a, b) and _equal(b, then[index]):
                kept[forward.look.norm != 0].add(index)
    both = [seen.buffer_names[index] for index in sorted(kept[False] & kept[True])]
    if both:
        counters = all(name.endswith("num_batches_tracked") for name in both)
        make = note if counters else problem
        yield make(
            "the count of batches moves once per pass; the statistics do not"
            if counters
            else "running statistics move in every pass, so twice a step, and the second time at the perturbed weights",
            "restore the model's buffers after the perturbed pass (an optimizer of ms_optim does so if it knows the "
            "model: model=...)",
            shortened(both),
            buffers=len(both),
        )


@rule
def different_masks(seen: Observation) -> Iterator[Finding]:
    """Dropout drew other masks in the perturbed pass."""
    if any(a.draws and b.draws and not same_streams(a.stream, b.stream) for a, b in seen.pairs):
        yield note(
            "the passes draw different random numbers: with dropout or stochastic depth the second gradient is that of "
            "another network than the one whose ascent was taken",
            "set the random streams back before the perturbed pass (the optimizers of ms_optim do so)",
        )


@rule
def different_inputs(seen: Observation) -> Iterator[Finding]:
    """The perturbed pass saw another batch."""
    if any(not identical(clean.inputs, perturbed.inputs) for clean, perturbed in seen.pairs):
        yield note(
            "the pass at W and the perturbed pass were called with different inputs",
            "draw the batch and its augmentation once, outside the closure, unless this is meant",
        )


@rule
def loss_fell(seen: Observation) -> Iterator[Finding]:
    """The ascent lowered the loss."""
    if any(a.draws or not identical(a.inputs, b.inputs) for a, b in seen.pairs) or seen.error is not None:
        return
    passes = seen.passes_seen()
    if len(passes) != 2 or passes[0].perturbation != 0 or not passes[1].perturbation > 0:
        return
    gap = passes[1].loss - passes[0].loss
    ascends = any(entry.get("maximize", False) for entry in seen.optimizer.param_groups)
    if math.isfinite(gap) and (gap > 0 if ascends else gap < 0):
        yield note(
            "the objective improved at W + ε, where it should be worse",
            "take a smaller rho; if it still does, the perturbation has the wrong sign (maximize?)",
            loss_gap=gap,
            perturbation=passes[1].perturbation,
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and torch.equal(a, b)
