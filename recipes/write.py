"""Write: every recipe and the table of recipes/README.md, from one table of settings and from what has been measured.

    python -m recipes.write

The settings are those of :mod:`recipes.families`.

What a recipe gave is read from ``recipes/results/<recipe>/<anything>/result.json``, as a run leaves it: ``recipe``,
``command``, ``device``, ``seconds``, ``epochs``, ``validation_top1``, ``test_top1``, ``seed``, ``environment``.  There
is one run per seed; a run of other epochs than the recipe's, or of another recipe, is an error.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ms_optim.demo.report import mean_and_error

from .families import FAMILIES, OPT, OPTIMIZERS, Family, Said

FOLDER = Path(__file__).parent
MARKERS = ("<!-- table: begin -->\n", "<!-- table: end -->\n")
NOT_MEASURED = "not measured"


def names() -> Iterator[tuple[str, str, str]]:
    """All recipes.

    Yields:
        Name, family, optimizer.
    """
    for family in FAMILIES:
        for optimizer in OPTIMIZERS:
            yield f"{family}_{optimizer}", family, optimizer


def results(name: str, epochs: int, folder: Path = FOLDER / "results") -> list[dict[str, Any]]:
    """What has been measured with a recipe.

    Args:
        name: Of the recipe.
        epochs: That it trains for.
        folder: Of all results.

    Returns:
        One object per seed, by seed.

    Raises:
        ValueError: If one is of another recipe or of other epochs, or a seed is there twice.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in sorted((folder / name).glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for key, wanted in (("recipe", name), ("epochs", epochs)):
            if result[key] != wanted:
                raise ValueError(f"{path} has {key} {result[key]!r}, and stands where {wanted!r} belongs; move it away")
        if result["seed"] in found:
            raise ValueError(f"{path} is the second run with seed {result['seed']} in {path.parent.parent}; keep one")
        found[result["seed"]] = result
    return [found[seed] for seed in sorted(found)]


def measured(found: Sequence[Mapping[str, Any]]) -> str:
    """Top-1 on the test images, where the data has none on the held-out ones, mean ± standard error (seeds).

    Args:
        found: As of :func:`results`.

    Returns:
        Words.
    """
    if not found:
        return NOT_MEASURED
    tested = all(result.get("test_top1") is not None for result in found)
    mean, error = mean_and_error([result["test_top1" if tested else "validation_top1"] for result in found])
    spread = f" ± {error:.2f}" if len(found) > 1 else ""
    return f"{'' if tested else 'held out: '}{mean:.2f}{spread} ({len(found)})"


def duration(seconds: float) -> str:
    """Seconds in words.

    Args:
        seconds: How many.

    Returns:
        Words.
    """
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def yaml_value(value: Any) -> str:
    """A value in YAML, where ``5e-05`` would be text.

    Args:
        value: A number, a word, a truth value, or a dictionary of them.

    Returns:
        Its text.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0") + ("0" if value == int(value) else "")
    return str(value)


def heading(name: str, family: Family, optimizer: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What, command, device, time, result, log.

    Args:
        name: Of the recipe.
        family: Its family.
        optimizer: Its optimizer.
        found: As of :func:`results`.

    Returns:
        Lines.
    """
    device, time = f"{family.device} (what it is written for)", NOT_MEASURED
    if found:
        times: dict[str, list[float]] = {}
        for result in found:
            times.setdefault(result["device"], []).append(result["seconds"])
        device = ", ".join(times)
        time = ", ".join(duration(statistics.median(seconds)) for seconds in times.values()) + " a run"
    lines = [f"{family.title}, {OPTIMIZERS[optimizer]}", ""]
    for case, options in family.commands.items():
        command = f"{family.start} -m ms_optim.train -c recipes/{name}.yaml {options}".rstrip()
        lines += [f"{case}:"] if case else []
        lines += ["    " + line for line in wrapped(command, 112)]
    result = "test top-1 in per cent, mean ± standard error (seeds): " if found else ""
    lines += ["", f"device: {device}", f"time:   {time}", f"result: {result}{measured(found)}"]
    lines += [f"log:    recipes/results/{name}/"] if found else []
    return [f"# {line}".rstrip() for line in lines]


def wrapped(command: str, width: int) -> list[str]:
    """A command in lines that a shell takes for one.

    Args:
        command: The command.
        width: The largest length of a line.

    Returns:
        Its lines, all but the last with a backslash.
    """
    lines = textwrap.wrap(command, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def recipe(name: str, family: Family, optimizer: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The file of a recipe.

    Args:
        name: Of the recipe.
        family: Its family.
        optimizer: Its optimizer.
        found: As of :func:`results`.

    Returns:
        YAML.
    """
    own = family.own[optimizer]
    settings = {**family.settings, "opt": Said(OPT[optimizer])}
    if own.value:
        settings["opt_kwargs"] = own
    lines = []
    for key, said in settings.items():
        line = f"{key}: {yaml_value(said.value)}"
        if key == "opt_kwargs" and said.source:
            lines.append(f"# {said.source}")
        elif said.source:
            line += f"  # {said.source}"
        lines.append(line)
    return "\n".join([*heading(name, family, optimizer, found), "", *lines]) + "\n"


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Families × optimizers.

    Args:
        found: Recipe → as of :func:`results`.

    Returns:
        Markdown.
    """
    lines = [f"| recipe | trains | {' | '.join(f'`_{key}`' for key in OPTIMIZERS)} |", "| --- " * 7 + "|"]
    for name, family in FAMILIES.items():
        cells = [measured(found[f"{name}_{optimizer}"]) for optimizer in OPTIMIZERS]
        lines.append(f"| `{name}` | {family.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rendered(folder: Path = FOLDER) -> dict[str, str]:
    """All files that this script writes.

    Args:
        folder: Where README.md and results/ are.

    Returns:
        File name → text.
    """
    found = {
        name: results(name, FAMILIES[family].settings["epochs"].value, folder / "results")
        for name, family, _ in names()
    }
    files = {f"{name}.yaml": recipe(name, FAMILIES[family], opt, found[name]) for name, family, opt in names()}
    before, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    return {**files, "README.md": "".join([before, MARKERS[0], table(found), MARKERS[1], after])}


def main() -> None:
    """Write them."""
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
