"""Run the scripts of this folder, each in a process of its own with one thread, and say of each whether it ran.

    python -m benchmarks                                every script at smoke scale, two at a time; writes nothing
    python -m benchmarks gauge overhead                 these two
    python -m benchmarks --scale cpu                    all that is committed, anew, one at a time: hours

``make benchmarks`` is the first.  At smoke scale the results go to a folder that is thrown away, after their pages and
figures have been rendered from it.  The exit status is 1 if anything failed.  Peers are not installed by this, nor are
checkouts of theirs given to the scripts that take them: the tables then say "not measured".
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import scripts

ROOT = Path(__file__).parent.parent


def ran(arguments: Sequence[str], label: str) -> bool:
    """Run a module and print one line about it.

    Args:
        arguments: The module's name and its options.
        label: What the line begins with.

    Returns:
        Whether it ended well.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    word = "ok" if done.returncode == 0 else f"failed: {said[-1]}"
    print(f"{label:<20} {time.monotonic() - began:6.1f} s  {word}", flush=True)
    return done.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.

    Returns:
        The exit status.
    """
    known = scripts.names()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="SCRIPT", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--scale", choices=["smoke", "cpu"], default="smoke", help="smoke: tiny, to see that they run")
    parser.add_argument("--jobs", type=int, help="scripts at a time (default: 2 for smoke; 1 for cpu, which is timed)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"there is no script {', '.join(unknown)}; there are {', '.join(known)}")
    smoke = options.scale == "smoke"
    jobs = options.jobs or (2 if smoke else 1)
    chosen = options.names or known
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as nowhere:
        rest = ["--scale", options.scale, "--threads", "1", *(["--out", nowhere] if smoke else [])]
        with ThreadPoolExecutor(jobs) as pool:
            good = list(pool.map(lambda name: ran([f"benchmarks.{name}", *rest], name), chosen))
        good.append(ran(["benchmarks.render", *(["--results", nowhere] if smoke else [])], "render"))
    print(f"{len(good)} run, {good.count(False)} failed, in {(time.monotonic() - began) / 60:.1f} minutes")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
