"""Protocol: choose with some seeds, report with others.

The best of many settings owes a part of its result to the seeds it was found with.  So the chosen settings are trained
once more, from fresh seeds, the same for all methods, and only those results are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import CommandLineError
from .choice import VALIDATION, choose
from .pool import Listener, Resources, run_locked
from .records import Records
from .trial import Result, Trial


def choose_and_report(
    trials: Sequence[Trial],
    fresh_seeds: Sequence[int],
    function: str,
    folder: Path | str,
    resources: Resources | None = None,
    *,
    metric: str = VALIDATION,
    largest: bool = True,
    retry: bool = False,
    listener: Listener | None = None,
) -> list[Result]:
    """Run trials, choose a setting for each method, and run it from fresh seeds.

    Args:
        trials: What is chosen from.
        fresh_seeds: The seeds to report; without any, nothing is run after the choice.
        function: As of :func:`~ms_optim.sweep.run_trials`.
        folder: Where the records are.
        resources: What the trials share.
        metric: What is chosen by.
        largest: Whether the largest is the best.
        retry: Whether trials that have failed run again.
        listener: Is told of each new result.

    Returns:
        The results of both stages.

    Raises:
        CommandLineError: If a fresh seed is none: a setting was chosen by it.  Or if the metric is of the test set.
    """
    choose([], metric, largest)  # refuses the metric now, and not when everything has been trained
    used = sorted({trial.seed for trial in trials} & set(fresh_seeds))
    if used:
        raise CommandLineError(
            f"seed {used[0]} cannot be fresh: settings are chosen by it; give seeds that are not used"
        )
    resources = resources or Resources.here()
    with Records(folder).locked() as records:
        results = run_locked(trials, function, records, resources, retry, listener)
        if not fresh_seeds:
            return results
        chosen = [choice.setting.results[0].trial for choice in choose(results, metric, largest)]
        fresh = [
            replace(trial, settings={**trial.settings, "seed": seed}, stage="fresh")
            for trial in chosen
            for seed in fresh_seeds
        ]
        return results + run_locked(fresh, function, records, resources, retry, listener)
