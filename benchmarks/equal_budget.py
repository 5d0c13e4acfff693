r"""Accuracy at equal budget: SGD, SAM, three ASAMs, MSSAM, MSRegularizedSGD, RSAM and Frob-SAM, tuned alike.

*Search.*  Learning rate and weight decay are searched on SGD (three times two values).  At what is best there every
method searches its own scalar (five values: ρ; λ; momentum for SGD, which has no other), and then, at the best of
those, the other weight decay, and learning rates a factor 3 up and down, each also with the next scalar in the
direction in which the two go together.  Where the best scalar or learning rate is then at the edge of what the method
has tried, the search goes on beyond it, up to three times, as long as that is better; what is at an edge even so is
marked (of two weight decays either is at one).  Two seeds each, chosen by accuracy on 5,000 held-out images whose
labels are as noisy as the ones that are trained on.

That it goes on beyond edges is a change of the protocol after three rows had been judged: on the ResNet all of SAM's
kind had chosen their smallest radius, and MSSAM, whose smallest one happened to do less, was "better".  All three were
searched on, and what is chosen otherwise by now was judged again.  On the ResNet MSSAM went on to an eighth of its
smallest radius, where it is as good as SGD, and SAM, at whose second step two seeds were worse, stopped: what is better
there may be to descend at the representative, and a radius of 0 at it was not tried.  What was judged first is in
runs.jsonl.

*Judgement.*  The chosen setting is trained from six fresh seeds, each of which draws images, noise, held-out part,
weights, order and what the optimizer draws itself, the same for all methods, and the 10,000 test images are looked at
once for each setting that is chosen.  Differences are taken seed by seed (paired t-test after Holm's correction over
the methods of a row; flips of signs, uncorrected: of six seeds they cannot be below 0.031, which no correction leaves).
The choice is one for all fresh seeds: that another search might have chosen otherwise is in no interval.  The reference
of a row is the best of SAM and the ASAMs *on the test images*, a choice in their favour: where all are equal it is
hardly ever surpassed.  A training that diverges counts as guessing.

*Rows.*  Two are for development: defaults and grids were chosen by looking at them (benchmarks.gauge, with the same
fresh seeds).  On the other four nothing was chosen; but MNIST with 60 % of noise has the development rows' test images
and MLP, and benchmarks.scale_robustness had shown what all contenders reach with the ResNet on CIFAR-10's test images.
Of the development MLP benchmarks.gauge, whose learning rates are closer together and whose weight decay is 5e-4, has a
better SAM and a better elementwise ASAM than are found here, from the same seeds: a factor 3 is coarse, and over that
ASAM the one at rows has no lead that is shown.  A ResMLP begins with a head of zeros: all other traces are 0 at the
first refresh, and until the second one, a fifth of its training, representatives follow from norms alone.

*Budget.*  Epochs are equal.  SGD is there with twice the epochs as well, which is what SAM's two passes cost.  The last
columns say what a step takes on this machine, by itself and in units of one of SGD's, how many gradients of the loss it
needs, in the mean of the first ten steps (what a refresh or a penalty differentiates is in its time alone), and what
memory it uses above model and images.  RSAM begins with an epoch of SGD, as its authors do.

What the networks of the fresh seeds withstand is a page of its own, benchmarks.weight_noise.

    MS_OPTIM_DATA=... python -m benchmarks.equal_budget
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ms_optim import sweep
from ms_optim.sweep import Choice, Result, Trial

from . import cost, equal_budget_page, training, trials
from .entrants import CONTENDERS, LONGER, SGD, Contender
from .equal_budget_page import best_of, scalar
from .harness import Run
from .problems import PAPER, PROBLEMS, problem_of

details, draw = equal_budget_page.details, equal_budget_page.draw
in_short, overview, summary = equal_budget_page.in_short, equal_budget_page.overview, equal_budget_page.summary
FUNCTION = "benchmarks.equal_budget:trained"
SCALES, DEVICES = trials.SCALES, ("cpu", "cuda")
RATES, DECAYS = (0.02, 0.05, 0.1), (5e-4, 5e-3)
SEEDS, FRESH = (1_000, 1_001), range(6)
#: How often the search follows a best value that is at an edge.
FURTHER = 3


def trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train once, or take the time and memory of steps: the function of the sweep.

    Args:
        settings: As of :func:`benchmarks.training.trained`; or ``cost``, as of :func:`benchmarks.cost.measured`.

    Returns:
        What was found.
    """
    return cost.measured(settings) if "cost" in settings else training.trained(settings)


def trial(
    row: str, name: str, lr: float, weight_decay: float, value: float, seed: int, scale: str, stage: str = "tuning"
) -> Trial:
    """One training.

    Args:
        row: The problem.
        name: Of :data:`CONTENDERS`.
        lr: The learning rate.
        weight_decay: The weight decay.
        value: Of the method's scalar.
        seed: The seed.
        scale: The scale.
        stage: ``"tuning"`` or ``"fresh"``.

    Returns:
        The trial.
    """
    method = CONTENDERS[name]
    settings: dict[str, Any] = {"problem": row, "row": problem_of(row, scale).size, "scale": scale}
    settings |= {"optimizer": method.optimizer}
    settings |= {"options": {**method.options, method.scalar: value}, "lr": lr, "weight_decay": weight_decay}
    settings |= {"seed": seed, "own_stream": True} | ({"epochs": method.epochs} if method.epochs != 1 else {})
    settings |= {"test": True, "withstood": True} if stage == "fresh" else {}
    return Trial(settings, name, row, stage)


def plan(run: trials.Trainings) -> None:
    """Search, judge, and weigh: row by row.

    Args:
        run: The trainings.
    """
    rows = list(PAPER if run.scale == "paper" else PROBLEMS)
    # LeNet takes longest and comes last, so that a run that is stopped has the more rows.
    rows.sort(key=lambda row: "LeNet" in row)
    for row in rows if run.scale != "smoke" else rows[:4:2]:
        judged(run, row)


def judged(run: trials.Trainings, row: str) -> None:
    """All stages of a row.

    Args:
        run: The trainings.
        row: The problem.
    """
    full = run.scale != "smoke"
    seeds, fresh = (SEEDS, FRESH) if full else (SEEDS[:1], FRESH[:2])
    rates, decays = (RATES, DECAYS) if full else (RATES[-1:], DECAYS[:1])
    middle = 0.9
    first = run([trial(row, SGD, lr, wd, middle, seed, run.scale) for lr in rates for wd in decays for seed in seeds])
    start = sweep.choose(first, "held_out")[0].setting.settings
    lr, wd = start["lr"], start["weight_decay"]
    found = first + run(
        [
            trial(row, name, lr, wd, value, seed, run.scale)
            for name, method in CONTENDERS.items()
            for value in (method.values if full else method.values[2:4])
            for seed in seeds
        ]
    )
    wanted = []
    for choice in best_of(found) if full else ():
        name, best = choice.setting.method, scalar(choice)
        there = [(rate, wd, value) for rate, value in coupled(name, lr, best)]
        there += [(lr, other, best) for other in decays if other != wd]
        wanted += [trial(row, name, *point, seed, run.scale) for point in there for seed in seeds]
    found += run(wanted)
    for _ in range(FURTHER if full else 0):
        found += run(
            [
                trial(row, choice.setting.method, rate, choice.setting.settings["weight_decay"], value, seed, run.scale)
                for choice in best_of(found)
                for rate, value in beyond(choice, found)
                for seed in seeds
            ]
        )
    chosen = []
    for choice in best_of(found):
        settings = choice.setting.settings
        point = (settings["lr"], settings["weight_decay"], scalar(choice))
        chosen += [trial(row, choice.setting.method, *point, seed, run.scale, "fresh") for seed in fresh]
    run(chosen)
    run([cost_trial(row, run.scale)])


def coupled(name: str, lr: float, best: float) -> list[tuple[float, float]]:
    """A third and three times the learning rate, each with the best scalar and with its neighbour.

    A larger step goes with a larger radius, or, of momentum, with a smaller one: searched one after the other, a method
    for which that matters would be worse off than one for which it does not.

    Args:
        name: The method.
        lr: The learning rate of the search so far.
        best: The scalar that was best there.

    Returns:
        Learning rates and scalars.
    """
    method = CONTENDERS[name]
    place = method.values.index(best)
    found = []
    for factor, step in ((1 / 3, -1), (3, 1)):
        neighbour = place + (-step if method.scalar == "momentum" else step)
        inside = 0 <= neighbour < len(method.values)
        found += [(lr * factor, value) for value in (best, *([method.values[neighbour]] if inside else []))]
    return found


def beyond(choice: Choice, tried: Sequence[Result]) -> list[tuple[float, float]]:
    """What lies one step outside the edges that a method's best setting is at.

    Args:
        choice: The best so far.
        tried: The search so far.

    Returns:
        Learning rates and scalars: of each edge one pair, in which the other is as it is.
    """
    name, settings, best = choice.setting.method, choice.setting.settings, scalar(choice)
    method, rate = CONTENDERS[name], settings["lr"]
    mine = [r.trial.settings for r in tried if r.trial.method == name]
    found = []
    if "lr" in choice.edges:
        found.append((rate * 3 if rate == max(each["lr"] for each in mine) else rate / 3, best))
    if f"options.{method.scalar}" in choice.edges:
        found.append((rate, further(method, best, best == max(method.value(each) for each in mine))))
    return found


def further(method: Contender, value: float, up: bool) -> float:
    """The next value of a scalar beyond an edge: as far from it as the last two are apart, or half way to momentum 1.

    Args:
        method: Whose scalar.
        value: At the edge.
        up: Whether it is the upper one.

    Returns:
        The value, to three digits.
    """
    if method.scalar == "momentum" and up:
        return float(f"{1 - (1 - value) / 2:.3g}")
    inner, outer = method.values[-2:] if up else method.values[1::-1]
    return float(f"{value * outer / inner:.3g}")


def cost_trial(row: str, scale: str) -> Trial:
    """Time and memory of a step of every method.

    Args:
        row: The problem.
        scale: The scale.

    Returns:
        The trial.
    """
    methods = {
        name: [method.optimizer, {**method.options, method.scalar: method.values[2]}]
        for name, method in CONTENDERS.items()
        if name != LONGER
    }
    size = problem_of(row, scale).size
    return Trial({"cost": methods, "problem": row, "row": size, "scale": scale, "seed": 0}, "all", row, "cost")


def body(runs: Sequence[Run]) -> list[str]:
    """How it was done, and a table for every row.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    _, protocol = str(__doc__).split("\n", 1)
    protocol, _ = protocol.rsplit("\n\n", 1)  # less the command
    return [*protocol.strip().splitlines(), "", *equal_budget_page.body(runs)]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "equal_budget", FUNCTION, plan, arguments, SCALES)


if __name__ == "__main__":
    main()
