r"""Every optimizer here keeps every law of a sharpness-aware optimizer that applies to it.

The laws are those of :mod:`ms_optim.testing`: what a step is, what it leaves as it was, which parameters it takes, what
a checkpoint holds, and what a training loop may put around it.  Each is run on every optimizer, on networks of about a
hundred weights, in float64 if the law is not about another precision; nothing depends on the machine, so there is
nothing to repeat.  Tests show that each law is kept by a textbook's SAM and broken by a copy of it with one defect.

Ours are one of each kind.  Peers are driven as their authors say (see :mod:`benchmarks.sam_peers`); a law that says
nothing about a method, or that a peer's documentation takes out, does not apply to it, and the reason is given.
Whatever is not kept is listed with what was found.  Peers come from checkouts (``--davda54 PATH --asam PATH --moskomule
PATH``) and, ``pytorch_optimizer``, from the package; who is not there is not measured.

Goal: ours, all that apply.  No tolerance.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
from collections.abc import Mapping, Sequence

from ms_optim.testing import LAWS, Outcome, Subject, check
from ms_optim.testing.family import FAMILY

from . import harness, sam_peers
from .harness import Run
from .render import matrix
from .rows import Row

PEERS = {"davda54": "davda54/sam", "asam": "SamsungLabs/ASAM", "moskomule": "moskomule/sam.pytorch"}
# A trial: laws that ours keep and that take no time.
SMOKE = (
    "a_step_returns_the_loss",
    "the_perturbation_has_norm_rho",
    "weights_are_restored_bitwise",
    "a_pickle_goes_on_alike",
)
MARKS = {"passed": "✓", "failed": "✗", "crashed": "error", "not applicable": "–"}
OURS = tuple(subject.name for subject in FAMILY)


def measure(scale: str, paths: Mapping[str, str | None]) -> list[Run]:
    """One line per optimizer and law.

    Args:
        scale: ``"cpu"`` or ``"smoke"``.
        paths: Peer → the folder of its checkout, or ``None``.

    Returns:
        The lines; one with ``failed`` for a peer that is not there, one with the commit of each checkout.
    """
    laws = tuple(LAWS) if scale == "cpu" else SMOKE
    runs: list[Run] = []
    peers = sam_peers.subjects(**paths)
    for name, subject in {**{subject.name: subject for subject in FAMILY}, **peers}.items():
        runs += [harness.missing("", name)] if subject is None else lines_of(subject, laws)
    commits = [(PEERS[peer], revision(path)) for peer, path in paths.items() if path is not None]
    return runs + [{"network": "", "contender": peer, "commit": commit} for peer, commit in commits]


def lines_of(subject: Subject, laws: Sequence[str]) -> list[Run]:
    """The lines of one optimizer.

    Args:
        subject: The optimizer.
        laws: Names.

    Returns:
        One line per law.
    """
    return [
        {"network": "", "contender": subject.name, "law": law, "verdict": found.verdict, "message": found.message}
        for law, found in check(subject, laws).items()
    ]


def revision(path: str) -> str:
    """The commit of a checkout.

    Args:
        path: Its folder.

    Returns:
        The hash, or ``"unknown"``.
    """
    command = ["git", "-C", path, "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def outcomes(runs: Sequence[Run]) -> dict[str, dict[str, Outcome]]:
    """The lines, by optimizer and law.

    Args:
        runs: All lines of one run.

    Returns:
        Optimizer → law → outcome, both in the order of the lines.
    """
    found: dict[str, dict[str, Outcome]] = {}
    for run in runs:
        if "law" in run:
            found.setdefault(run["contender"], {})[run["law"]] = Outcome(run["verdict"], run["message"])
    return found


def kept(found: Mapping[str, Outcome]) -> tuple[int, int]:
    """How many laws an optimizer keeps, and how many apply to it.

    Args:
        found: Law → outcome.

    Returns:
        Both.
    """
    applying = [outcome for outcome in found.values() if outcome.verdict != "not applicable"]
    return sum(not outcome.broken for outcome in applying), len(applying)


def summary(runs: Sequence[Run]) -> list[Row]:
    """Ours, and the peer that keeps the largest share.

    Args:
        runs: All lines of one run.

    Returns:
        Rows.
    """
    counts = {name: kept(found) for name, found in outcomes(runs).items()}
    ours = {name: count for name, count in counts.items() if name in OURS}
    peers = {name: count for name, count in counts.items() if name not in OURS}
    broken = [name for name, (good, all_) in ours.items() if good < all_]
    fewest, most = (choose(count for _, count in ours.values()) for choose in (min, max))
    claim = "laws of a sharpness-aware optimizer that are kept, of those that apply: all"
    text = f"{len(ours) - len(broken)} of {len(ours)} optimizers keep all, which are {fewest} to {most}"
    rows = [Row(claim, text, f"**missed**: {', '.join(broken)}" if broken else "reached")]
    if peers:
        best, worst = (choose(peers, key=lambda name: peers[name][0] / peers[name][1]) for choose in (max, min))
        text = f"{peers[worst][0]} of {peers[worst][1]} ({worst}) to {peers[best][0]} of {peers[best][1]} ({best})"
        rows.append(Row(f"the same of {len(peers)} optimizers of other authors", text, "for comparison"))
    return rows


def body(runs: Sequence[Run]) -> list[str]:
    """How many laws each keeps, which, and what was found where one is not kept.

    Args:
        runs: All lines of one run.

    Returns:
        Lines of Markdown.
    """
    found = outcomes(runs)
    peers = [name for name in found if name not in OURS]
    lines = ["| optimizer | laws kept | of those that apply | verdict |", "| --- | --- | --- | --- |"]
    for name, of in found.items():
        good, applying = kept(of)
        verdict = "for comparison" if name in peers else "reached" if good == applying else "**missed**"
        lines.append(f"| {name} | {good} | {applying} | {verdict} |")
    absent = [run["contender"] for run in runs if "failed" in run]
    lines += [] if not absent else ["", f"Not measured: {', '.join(absent)}."]
    legend = f"{MARKS['passed']} kept, {MARKS['failed']} broken, {MARKS['crashed']}: the optimizer raised one, "
    lines += ["", f"{legend}{MARKS['not applicable']} does not apply."]
    for title, names in (("Ours", [name for name in found if name in OURS]), ("Peers", peers)):
        if names:
            laws = list(dict.fromkeys(law for name in names for law in found[name]))
            cells = {(words(law), name): MARKS[of.verdict] for name in names for law, of in found[name].items()}
            lines += ["", f"## {title}", "", *matrix(cells, [words(law) for law in laws], names, "law")]
    lines += ["", "## What was found", ""]
    if not any(outcome.broken for of in found.values() for outcome in of.values()):
        lines += ["Every law that applies is kept.", ""]
    for name, of in found.items():
        broken = {law: outcome for law, outcome in of.items() if outcome.broken}
        lines += [f"**{name}**", ""] if broken else []
        lines += [f"- *{words(law)}*: {_plain(outcome.message)}" for law, outcome in broken.items()]
        lines += [""] if broken else []
    lines += ["## What does not apply, and why", ""]
    for name, of in found.items():
        reasons: dict[str, list[str]] = {}
        for law, outcome in of.items():
            if outcome.verdict == "not applicable":
                reasons.setdefault(outcome.message, []).append(words(law))
        lines += [f"**{name}**", ""] if reasons else []
        lines += [f"- {_plain(reason)}: *{'*, *'.join(laws)}*" for reason, laws in reasons.items()]
        lines += [""] if reasons else []
    commits = [f"{run['contender']} {run['commit'][:10]}" for run in runs if "commit" in run]
    return lines[:-1] + (["", f"Checkouts: {', '.join(commits)}."] if commits else [])


def words(law: str) -> str:
    """A law's name as the sentence that it is."""
    return law.replace("_", " ")


def _plain(text: str) -> str:
    """A message in which nothing is markup."""
    return "".join(f"\\{letter}" if letter in "*_<|`" else letter for letter in text)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--threads", default="1")
    for peer in PEERS:
        parser.add_argument(f"--{peer}")
    options, rest = parser.parse_known_args(arguments)
    paths = {peer: getattr(options, peer) for peer in PEERS}
    rest += ["--threads", options.threads]
    harness.main(str(__doc__), "conformance", functools.partial(measure, paths=paths), rest)


if __name__ == "__main__":
    main()
