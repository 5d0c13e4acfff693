"""Choice: the best setting of each method, by what was held out from training, and never by the test set.

A setting is as good as the mean over its seeds.  One of which a seed failed or diverged comes after all of which none
did, however good the others are: whoever takes the mean of the survivors prefers what breaks now and then.  Where the
best value is the first or last of its axis, better ones may lie beyond: that is marked, and the grid wants extending.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..demo.report import mean_and_error
from ..errors import CommandLineError
from .paired import Difference, holm
from .trial import DIVERGED, FAILED, Result, flat

#: What a setting is chosen by, and what is reported of it.
VALIDATION, TEST = "validation_top1", "test_top1"


@dataclass(frozen=True)
class Setting:
    """The results of a setting, one per seed.

    Attributes:
        results: At least one.
    """

    results: tuple[Result, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings, without a seed."""
        return self.results[0].trial.setting

    @property
    def method(self) -> str:
        """Whose it is."""
        return self.results[0].trial.method

    @property
    def problem(self) -> str:
        """What it is for."""
        return self.results[0].trial.problem

    @property
    def stage(self) -> str:
        """What it was run for."""
        return self.results[0].trial.stage

    def values(self, metric: str) -> dict[Any, float]:
        """A metric of the seeds that ended well.

        Args:
            metric: A number of the outcomes.

        Returns:
            Seed → value.
        """
        found = {result.trial.seed: result.value(metric) for result in self.results}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, metric: str) -> tuple[float, float]:
        """Mean ± standard error over the seeds that ended well.

        Args:
            metric: A number of the outcomes.

        Returns:
            Both; NaN where there are too few.
        """
        values = list(self.values(metric).values())
        return mean_and_error(values) if values else (math.nan, math.nan)

    def count(self, status: str) -> int:
        """How many seeds ended in a certain way.

        Args:
            status: One of those of a result.

        Returns:
            The number.
        """
        return sum(result.status == status for result in self.results)


@dataclass(frozen=True)
class Choice:
    """What was chosen for a method.

    Attributes:
        setting: The setting.
        searched: The names of what differs between the settings of the method.
        edges: Those whose value is the smallest or largest that was tried.
        tried: How many settings there were to choose from.
    """

    setting: Setting
    searched: tuple[str, ...]
    edges: tuple[str, ...]
    tried: int


@dataclass(frozen=True)
class Comparison:
    """A method beside the baseline.

    Attributes:
        problem: On what.
        method: Which.
        baseline: Beside which.
        difference: Method minus baseline, seed by seed.
        unpaired: Seeds that only one of the two has.
        holm_t: The p-value of the t-test after Holm's correction over the methods of the problem.
        holm_signs: The same of the signs.
    """

    problem: str
    method: str
    baseline: str
    difference: Difference
    unpaired: int
    holm_t: float
    holm_signs: float


def settings_of(results: Sequence[Result]) -> list[Setting]:
    """Put together what differs in its seed alone.

    Args:
        results: Results.

    Returns:
        Settings, in the order in which they come.
    """
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        trial = result.trial
        groups.setdefault((trial.problem, trial.method, trial.stage, trial.setting_key), []).append(result)
    return [Setting(tuple(group)) for group in groups.values()]


def choose(results: Sequence[Result], metric: str = VALIDATION, largest: bool = True) -> list[Choice]:
    """The best setting of each method on each problem; the first of equals.

    Args:
        results: Those of the stage ``"tuning"`` count.
        metric: What it is chosen by; of a single setting, which is the best whatever it does, it need not be there.
        largest: Whether the largest is the best.

    Returns:
        The choices.

    Raises:
        CommandLineError: If the metric is one of the test set, or there is none.
    """
    if "test" in metric.lower():
        raise CommandLineError(
            f"a setting cannot be chosen by {metric}: chosen by the test set, its test result means nothing; hold out "
            "a part of the training set and choose by that"
        )
    methods: dict[tuple[str, str], list[Setting]] = {}
    for setting in settings_of([result for result in results if result.trial.stage == "tuning"]):
        methods.setdefault((setting.problem, setting.method), []).append(setting)
    return [_best(settings, metric, largest) for settings in methods.values()]


def at_edge(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value is the smallest or the largest of those that were tried.

    Args:
        value: The value.
        values: All that were tried.

    Returns:
        Whether it is; never for words, for a single value, and for 0 as the smallest: off is no edge.

    >>> at_edge(0.4, [0.1, 0.2, 0.4]), at_edge(0, [0, 0.1]), at_edge("cosine", ["cosine", "step"])
    (True, False, False)
    """
    tried = [each for each in values if isinstance(each, (int, float)) and not isinstance(each, bool)]
    if len(set(tried)) < 2 or value not in tried or isinstance(value, bool):
        return False
    return value == max(tried) or (value == min(tried) and value != 0)


def compare(
    results: Sequence[Result], choices: Sequence[Choice], baseline: str, metric: str = TEST
) -> list[Comparison]:
    """The chosen setting of each method against that of the baseline, seed by seed.

    Args:
        results: Those of the stage ``"fresh"`` count, where a choice has any; else those it was chosen by.
        choices: One per problem and method.
        baseline: The method that the others are compared with.
        metric: What is compared.

    Returns:
        A comparison per problem and method, the baseline left out; none where the baseline was not run.
    """
    found = []
    for problem in dict.fromkeys(choice.setting.problem for choice in choices):
        mine = {choice.setting.method: choice for choice in choices if choice.setting.problem == problem}
        if baseline not in mine:
            continue
        reference = reported(results, mine[baseline]).values(metric)
        others = {name: reported(results, each).values(metric) for name, each in mine.items() if name != baseline}
        differences = {
            name: Difference.of([value - reference[seed] for seed, value in values.items() if seed in reference])
            for name, values in others.items()
        }
        by_t = holm([each.p_t for each in differences.values()])
        by_signs = holm([each.p_signs for each in differences.values()])
        for (name, difference), t, signs in zip(differences.items(), by_t, by_signs, strict=True):
            unpaired = len(set(others[name]) ^ set(reference))
            found.append(Comparison(problem, name, baseline, difference, unpaired, t, signs))
    return found


def reported(results: Sequence[Result], choice: Choice) -> Setting:
    """The results of a choice that are reported: those of fresh seeds, if there are any.

    Args:
        results: All results.
        choice: The choice.

    Returns:
        The setting with those results.
    """
    first = choice.setting.results[0].trial
    same = (first.problem, first.method, first.setting_key)
    fresh = [
        r
        for r in results
        if r.trial.stage == "fresh" and (r.trial.problem, r.trial.method, r.trial.setting_key) == same
    ]
    return Setting(tuple(fresh)) if fresh else choice.setting


def _best(settings: Sequence[Setting], metric: str, largest: bool) -> Choice:
    seeds = {result.trial.seed for setting in settings for result in setting.results}
    points = [flat(setting.settings) for setting in settings]
    names = dict.fromkeys(name for point in points for name in point)
    searched = tuple(name for name in names if len({str(point.get(name)) for point in points}) > 1)
    if len(settings) > 1 and not any(setting.values(metric) for setting in settings):
        first = settings[0]
        bad = first.count(FAILED) + first.count(DIVERGED)
        why = "every trial has failed or diverged" if bad == len(first.results) else f"no outcome has {metric}"
        raise CommandLineError(
            f"nothing to choose {first.method or 'a setting'} by on {first.problem or 'its problem'}: {why}; see the "
            "records in trials.csv; without a held-out part of the training set there is nothing to choose by"
        )

    def rank(index: int) -> tuple[int, float]:
        mean = settings[index].mean(metric)[0]
        missing = len(seeds) - len(settings[index].values(metric))
        return -missing, (mean if largest else -mean) if not math.isnan(mean) else -math.inf

    best = max(range(len(settings)), key=rank)
    edges = tuple(n for n in searched if at_edge(points[best].get(n), [p[n] for p in points if n in p]))
    return Choice(settings[best], searched, edges, len(settings))


def described(setting: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some settings in words.

    Args:
        setting: All of them.
        names: Which.

    Returns:
        Such as ``lr = 0.1, rho = 0.05``.
    """
    plain = flat(setting)
    parts = [(name.removeprefix("opt_kwargs."), plain[name]) for name in names if name in plain]
    return ", ".join(
        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}" for name, value in parts
    )
