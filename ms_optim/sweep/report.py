"""Report: what a sweep has found, for a terminal, a page and a spreadsheet; what went wrong included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli.output import whole_file, write_csv
from ..cli.table import UNKNOWN, number, table, with_error
from .choice import TEST, VALIDATION, Choice, Comparison, Setting, choose, compare, described, reported, settings_of
from .trial import DIVERGED, FAILED, FINISHED, Result, flat

PAGE, SPREADSHEET = "summary.md", "summary.csv"
#: A corrected p-value below it is a difference.
LEVEL = 0.05

Draw = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


@dataclass(frozen=True)
class Report:
    """The choices of a sweep, and the methods compared.

    Attributes:
        results: All results.
        choices: One per problem and method.
        comparisons: One per problem and method but the baseline.
        baseline: What the methods are compared with.
        metric: What settings are chosen by.
        shown: What is reported of them.
    """

    results: Sequence[Result]
    choices: Sequence[Choice]
    comparisons: Sequence[Comparison]
    baseline: str
    metric: str
    shown: str

    @classmethod
    def of(
        cls,
        results: Sequence[Result],
        baseline: str | None = None,
        metric: str = VALIDATION,
        shown: str = TEST,
        largest: bool = True,
    ) -> Report:
        """Choose and compare.

        Args:
            results: Of both stages.
            baseline: What the methods are compared with; by default ``sgd`` in any spelling, or else the first.
            metric: What settings are chosen by.
            shown: What is reported of them.
            largest: Whether the largest is the best.

        Returns:
            The report.

        Raises:
            CommandLineError: If there is nothing to choose by.
        """
        choices = choose(results, metric, largest)
        if baseline is None:
            names = [choice.setting.method for choice in choices]
            baseline = next((name for name in names if name.lower() == "sgd"), names[0] if names else "")
        return cls(results, choices, compare(results, choices, baseline, shown), baseline, metric, shown)

    def text(self) -> str:
        """For a terminal.

        Returns:
            Lines.
        """
        return "\n\n".join(self._parts(table))

    def page(self) -> str:
        """For reading.

        Returns:
            Markdown.
        """
        every = [
            [*self._who(each), str(len(each.values(self.metric))), _mean(each, self.metric), _lost(each)]
            for each in settings_of(self.results)
            if each.stage == "tuning"
        ]
        head = ["problem", "method", "setting", "n", f"{self.metric}, mean ± s.e.", "lost"]
        parts = [
            "# Summary of the sweep",
            *self._parts(markdown),
            "## All settings",
            markdown(*_without_empty(head, every)),
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Write ``summary.md`` and ``summary.csv``.

        Args:
            folder: Where.
        """
        with whole_file(folder / PAGE) as file:
            file.write_text(self.page(), encoding="utf-8")
        rows = self.rows()
        header = list(dict.fromkeys(name for row in rows for name in row))
        write_csv(folder / SPREADSHEET, header, [[row.get(name) for name in header] for row in rows])

    def rows(self) -> list[dict[str, Any]]:
        """A line per setting; what is reported stands with those that were chosen.

        Returns:
            Column → value.
        """
        found = []
        for setting in settings_of([result for result in self.results if result.trial.stage == "tuning"]):
            mean, error = setting.mean(self.metric)
            row: dict[str, Any] = {"problem": setting.problem, "method": setting.method}
            row |= {f"settings.{name}": value for name, value in flat(setting.settings).items()}
            row |= {"n": len(setting.values(self.metric)), "failed": setting.count(FAILED)}
            row |= {"diverged": setting.count(DIVERGED), f"{self.metric}.mean": mean, f"{self.metric}.error": error}
            choice = next((each for each in self.choices if each.setting == setting), None)
            row |= {"chosen": int(choice is not None), "edges": " ".join(choice.edges) if choice else ""}
            found.append(row | (self._reported(choice) if choice else {}))
        return found

    def _reported(self, choice: Choice) -> dict[str, Any]:
        shown = reported(self.results, choice)
        mean, error = shown.mean(self.shown)
        row: dict[str, Any] = {"reported.stage": shown.stage, "reported.n": len(shown.values(self.shown))}
        row |= {"reported.failed": shown.count(FAILED), "reported.diverged": shown.count(DIVERGED)}
        row |= {f"{self.shown}.mean": mean, f"{self.shown}.error": error}
        for each in self.comparisons:
            if (each.problem, each.method) == (choice.setting.problem, choice.setting.method):
                d = each.difference
                row |= {"baseline": each.baseline, "pairs": d.n, "difference": d.mean, "difference.error": d.error}
                row |= {"difference.low": d.low, "difference.high": d.high, "p_t": d.p_t, "p_t.holm": each.holm_t}
                row |= {"p_signs": d.p_signs, "p_signs.holm": each.holm_signs}
        return row

    def _who(self, setting: Setting) -> list[str]:
        searched = self._searched(setting)
        return [setting.problem, setting.method, described(setting.settings, searched) or "as given"]

    def _searched(self, setting: Setting) -> tuple[str, ...]:
        who = (setting.problem, setting.method)
        return next((c.searched for c in self.choices if (c.setting.problem, c.setting.method) == who), ())

    def _parts(self, draw: Draw) -> list[str]:
        parts = [draw(*_without_empty(*self._chosen())), self._about_the_choice()]
        if self.comparisons:
            parts += [draw(*_without_empty(*self._compared())), _ABOUT_P]
        lost = [result for result in self.results if result.status != FINISHED]
        if lost:
            head = ["trial that is lost", "seed", "how", "log"]
            rows = [[self._name(each), str(each.trial.seed), f"{each.status}: {each.error}", each.log] for each in lost]
            parts.append(draw(head, rows))
        return parts

    def _name(self, result: Result) -> str:
        return ", ".join(part for part in self._who(Setting((result,))) if part)

    def _chosen(self) -> tuple[list[str], list[list[str]]]:
        head = ["problem", "method", "chosen setting", "of", f"{self.metric} (n)", f"{self.shown} (n)", "lost"]
        rows = []
        for choice in self.choices:
            shown = reported(self.results, choice)
            edge = f" (edge of its grid: {', '.join(_short(e) for e in choice.edges)})" if choice.edges else ""
            problem, method, setting = self._who(choice.setting)
            cells = [_mean(each, name, True) for each, name in ((choice.setting, self.metric), (shown, self.shown))]
            rows.append([problem, method, setting + edge, str(choice.tried), *cells, _lost(shown)])
        return head, rows

    def _about_the_choice(self) -> str:
        fresh = any(result.trial.stage == "fresh" for result in self.results)
        seeds = "fresh seeds, by which nothing was chosen" if fresh else "the seeds that it was chosen with"
        return (
            f"Settings are chosen by {self.metric}, those of which a seed is lost last; {self.shown} is of {seeds}. "
            "Mean ± standard error over n seeds."
        )

    def _compared(self) -> tuple[list[str], list[list[str]]]:
        head = ["problem", "method", f"{self.shown} minus that of {self.baseline}", "pairs", "95 % interval"]
        head += ["p (t)", "Holm", "p (signs)", "Holm ", "verdict"]
        rows = []
        for each in self.comparisons:
            d = each.difference
            interval = UNKNOWN if math.isnan(d.low) else f"[{d.low:+.3g}, {d.high:+.3g}]"
            pairs = f"{d.n} ({each.unpaired} without a partner)" if each.unpaired else str(d.n)
            p_values = [number(p, 2) for p in (d.p_t, each.holm_t, d.p_signs, each.holm_signs)]
            mean = UNKNOWN if d.n == 0 else with_error(d.mean, d.error)
            rows.append([each.problem, each.method, mean, pairs, interval, *p_values, _verdict(each)])
        return head, rows


_ABOUT_P = (
    "Differences are paired by seed. p (t): paired t-test; p (signs): all choices of their signs, at least 2 / 2^n; "
    f"Holm: corrected for the methods of the problem; the verdict is that of the corrected t-test at {LEVEL:g}."
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, padded so that it can be read as it is.

    Args:
        header: Names of the columns.
        rows: Their texts.

    Returns:
        Lines.
    """
    cells = [[cell.replace("|", "\\|").strip() for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without columns that say nothing: the problem, where there is one; what is lost, where nothing is."""
    kept = [index for index in range(len(header)) if any(row[index] for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _verdict(comparison: Comparison) -> str:
    d = comparison.difference
    if d.n < 2:
        return "too few pairs"
    if math.isnan(d.p_t):
        return "no difference" if d.mean == 0 else "no spread to judge by"
    if comparison.holm_t >= LEVEL:
        return "no difference shown"
    return "larger" if d.mean > 0 else "smaller"


def _mean(setting: Setting, metric: str, with_n: bool = False) -> str:
    n = f" ({len(setting.values(metric))})" if with_n else ""
    return with_error(*setting.mean(metric)) + n


def _lost(setting: Setting) -> str:
    words = [f"{setting.count(status)} {status}" for status in (FAILED, DIVERGED) if setting.count(status)]
    return ", ".join(words)


def _short(name: str) -> str:
    return name.removeprefix("opt_kwargs.")
