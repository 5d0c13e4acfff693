"""Rules about gradients: whether what is descended along is finite, unscaled, whole, and this step's own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .diagnosis import Finding
from .examination import note, problem, rule, shortened
from .observation import Backward, Observation, ScalerStep, Unscaling

_NEAR = 1e-3  # relative: what an unscaled and a scaled gradient cannot be confused by


@rule
def not_finite(seen: Observation) -> Iterator[Finding]:
    """A loss, a gradient or the weights of a pass are not finite."""
    scaled = seen.scale != 1.0
    make, move = (
        (
            note,
            "an overflow is the scaler's to handle: it skips the step and halves the scale; if every step overflows, "
            "the loss itself does",
        )
        if scaled
        else (problem, "look for the first operation that makes it: torch.autograd.set_detect_anomaly(True)")
    )
    for index, one in enumerate(seen.passes):
        where, look = f"pass {index + 1}", one.forwards[0].look
        gradients = sorted({name for b in one.backwards for name in b.look.bad(seen.names)})
        if not look.finite:
            yield problem(
                "the weights of the pass are not finite: it was perturbed along a gradient that is not",
                "check the norm of the first gradient before perturbing (the optimizers of ms_optim do so)",
                f"{where}: {shortened(look.bad(seen.names))}",
            )
        elif one.backwards and any(not math.isfinite(b.loss) for b in one.backwards) and not math.isfinite(one.loss):
            yield make("the loss is not finite", move, where)
        if gradients:
            yield make("the gradient is not finite", move, f"{where}: {shortened(gradients)}")
    for descent in seen.descents:
        bad = descent.gradients.bad(seen.names)
        if bad and not descent.drives:
            yield problem(
                "the descent is along a gradient that is not finite, and so are the weights after it",
                "skip the step where the gradient's norm is not finite",
                shortened(bad),
            )


@rule
def scaled_gradients(seen: Observation) -> Iterator[Finding]:
    """The descent is along gradients that are still multiplied by the loss scale."""
    last: Backward | None = None
    for event in seen.events:
        if isinstance(event, Backward):
            last = event
        elif isinstance(event, Unscaling) and last is not None and last.scale != 1.0:
            if event.norm < (1 - _NEAR) * last.look.norm:
                yield note(
                    "the gradient shrank between the backward pass and unscale_: clipping acted on scaled gradients",
                    "call scaler.unscale_(optimizer) first, then clip",
                    factor=event.norm / last.look.norm,
                    scale=last.scale,
                )
    for descent in seen.descents:
        start = seen.events.index(descent)
        # What a step that runs a closure descends along is found in it.
        events = seen.events[start:] if descent.drives else seen.events[:start]
        before = [event for event in events if isinstance(event, (Backward, Unscaling))]
        if descent.fused or not before or not isinstance(before[-1], Backward) or before[-1].scale == 1.0:
            continue
        there, found = before[-1].look.norm, descent.gradients_after if descent.drives else descent.gradients
        if there > 0 and found.norm / there > 1.5 / before[-1].scale:
            through = any(isinstance(event, ScalerStep) for event in seen.events)
            yield problem(
                "the gradient that is descended along is still multiplied by the loss scale",
                "give no closure to scaler.step, which unscales before it calls the closure: run all passes first, "
                "then scaler.step(optimizer) (in ms_optim: for gradient_pass in optimizer.passes(scaler=scaler))"
                if through
                else "call scaler.step(optimizer), which unscales, in the place of optimizer.step()",
                type(descent.optimizer).__name__,
                norm=found.norm,
                scale=before[-1].scale,
            )


@rule
def added_gradients(seen: Observation) -> Iterator[Finding]:
    """Gradients of another pass, or of the step before, were not zeroed."""
    passes = seen.passes
    for index, one in enumerate(passes):
        if not one.backwards or one.backwards[0].before == 0:
            continue
        if index and any(earlier.backwards for earlier in passes[:index]):
            if one.perturbed or passes[index - 1].perturbed:
                yield problem(
                    "the gradient of this pass is added to that of the pass before",
                    "zero the gradients between the passes: optimizer.zero_grad()",
                    f"pass {index + 1}",
                    left_before=one.backwards[0].before,
                )
                return
        elif index == 0:
            yield note(
                "the step adds to gradients that were there before it",
                "call optimizer.zero_grad() in every step, unless this is accumulation",
                left_before=one.backwards[0].before,
            )


@rule
def without_gradient(seen: Observation) -> Iterator[Finding]:
    """Parameters that are to be trained got no gradient."""
    descents = [descent for descent in seen.descents if not descent.drives]
    missing = [name for name in seen.names if any(name in descent.missing for descent in descents)]
    trained = [name for name, p in zip(seen.names, seen.parameters, strict=True) if p.requires_grad]
    if missing and len(missing) >= len(trained):
        yield problem(
            "no parameter has a gradient at the descent",
            "call backward on a loss of this model's outputs before the step; zero the gradients before, not after it",
        )
    elif missing:
        yield note(
            "some parameters have no gradient and stay as they are",
            "freeze them (requires_grad_(False)) if that is meant; else use them in the forward pass",
            shortened(missing),
            parameters=len(missing),
        )


@rule
def not_stepped(seen: Observation) -> Iterator[Finding]:
    """The optimizer was not stepped, or another one was."""
    if seen.error is not None:
        return
    steps = seen.descents
    name = type(seen.optimizer).__name__
    if not steps and seen.scale != 1.0 and any(not b.look.finite for b in seen.events if isinstance(b, Backward)):
        yield note(
            "the scaler skipped the step after an overflow, so that the descent was not seen",
            "run doctor again when the scale has settled, or with a smaller init_scale",
            scale=seen.scale,
        )
    elif not steps:
        yield problem(
            "no optimizer was stepped: the weights would not move",
            f"call {name}.step() once per step, and doctor with a step that does so",
        )
    elif seen.ours is not None and not seen.stepped:
        other = type(steps[-1].optimizer).__name__
        yield problem(
            f"{other} was stepped, and {name} was not: its own part was never taken",
            f"call step() of {name} itself, which steps its base optimizer",
        )
    elif len(steps) > 1:
        yield note(
            "the parameters were stepped more than once",
            "give doctor one training step only, unless several optimizers are meant",
            ", ".join(type(step.optimizer).__name__ for step in steps),
            steps=len(steps),
        )
